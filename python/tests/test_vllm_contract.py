"""What vLLM's tests ask of its own weight-transfer backends, asked of this one, by vLLM's own factory, configuration and calls.

Skipped, and counted as skipped, where vLLM is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import numpy
import torch
from vllm.config.parallel import ParallelConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer import VLLMWeightSyncClient, WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.plugins import load_general_plugins

from refit_rl import Source, layouts
from refit_rl.errors import ConfigError, NotFencedError, NotReadyError
from refit_rl.vllm import plugin
from refit_rl.vllm.options import InitInfo, UpdateInfo

INFO: dict[str, Any] = {"rendezvous": "dir:/tmp/meet", "model": "m"}


@pytest.fixture(autouse=True)
def _plugins() -> None:
    """As vLLM does at the start of each of its processes: by the entry point of the wheel."""
    load_general_plugins()


def settings() -> MagicMock:
    """vLLM's configuration of a rank, as far as a backend's constructor looks at it."""
    parallel = MagicMock(spec=ParallelConfig)
    parallel.rank, parallel.world_size = 0, 1
    parallel.data_parallel_rank = parallel.data_parallel_index = 0
    return MagicMock(parallel_config=parallel)


def engine(backend: str = "refit") -> Any:
    config = WeightTransferConfig(backend=backend)
    return WeightTransferEngineFactory.create_engine(config, settings(), torch.device("cpu"), MagicMock(spec=torch.nn.Module))


def test_the_factory_makes_it_by_its_name() -> None:
    from refit_rl.vllm.engine import RefitWeightTransferEngine

    assert WeightTransferConfig(backend="refit").backend == "refit"
    assert isinstance(engine(), RefitWeightTransferEngine)


def test_another_name_is_refused_with_ours_among_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="Invalid weight transfer backend: refti.*'refit'"):
        engine("refti")


def test_a_name_is_given_once_however_often_plugins_are_loaded() -> None:
    plugin.register()
    plugin.register()
    with pytest.raises(ValueError, match="already registered"):
        WeightTransferEngineFactory.register_engine("refit", "refit_rl.vllm.engine", "RefitWeightTransferEngine")


def test_init_info_becomes_options() -> None:
    info = engine().parse_init_info({**INFO, "replica": "r", "timeout": 5.0})
    assert isinstance(info, InitInfo)
    assert (info.rendezvous, info.model, info.replica, info.timeout) == ("dir:/tmp/meet", "m", "r", 5.0)


@pytest.mark.parametrize(
    ("said", "about"),
    [
        ({"model": "m"}, "Invalid init_info.*rendezvous"),
        ({**INFO, "no_such_option": 1}, "Invalid init_info.*no_such_option"),
        ({**INFO, "mode": "both"}, "`mode` is one of direct, staged"),
    ],
)
def test_init_info_that_cannot_be_is_a_value_error(said: dict[str, Any], about: str) -> None:
    with pytest.raises(ValueError, match=about):
        engine().parse_init_info(said)


def test_update_info_becomes_options() -> None:
    info = engine().parse_update_info({"version": 7})
    assert isinstance(info, UpdateInfo)
    assert info.version == 7
    # One newer than what is there, for those who do not count.
    assert engine().parse_update_info({}).version is None


def test_update_info_that_cannot_be_is_a_value_error() -> None:
    # What the built-in backends take, and this one does not need.
    with pytest.raises(ValueError, match="Invalid update_info"):
        engine().parse_update_info({"names": ["w"], "dtype_names": ["float32"], "shapes": [[10]]})
    with pytest.raises(ConfigError, match="`version` is a number from 0"):
        engine().parse_update_info({"version": -1})


@pytest.mark.parametrize("call", ["start_weight_update", "update_weights", "receive_weights"])
def test_nothing_goes_before_init(call: str) -> None:
    arguments = {"start_weight_update": (), "update_weights": ({"version": 1},), "receive_weights": (UpdateInfo(1),)}
    with pytest.raises(RuntimeError, match="not initialized: call init_weight_transfer_engine first") as raised:
        getattr(engine(), call)(*arguments[call])
    assert isinstance(raised.value, NotFencedError)


def test_shutdown_can_be_called_at_any_time() -> None:
    backend = engine()
    backend.shutdown()
    backend.shutdown()


def test_a_draft_model_is_not_said_to_be_updated() -> None:
    assert not engine().supports_draft_weight_update


class Client:
    """What an engine was asked, in order."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.asked.append(("init", init_info))

    def start_weight_update(self) -> None:
        self.asked.append(("start",))

    def update_weights(self, update_info: Any) -> None:
        self.asked.append(("update", update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.asked.append(("finish", weight_version))


@pytest.fixture
def source(store: str) -> Iterator[Source]:
    layout = layouts.shards({"w": ((2, 2), "float32", (0, 0), (2, 2))}, rank=0)
    with Source(store, layout, {"w": numpy.ones((2, 2), "float32")}, model="m") as source:
        yield source


def trainer(publisher: Any, client: Client, rank: int = 0, **more: Any) -> Any:
    from refit_rl.vllm.trainer import RefitTrainerInitInfo

    info = RefitTrainerInitInfo(publisher, dict(INFO), timeout=5.0, rank=rank)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, **more)


def test_the_sender_asks_for_what_is_on_offer(source: Source) -> None:
    client = Client()
    assert isinstance(client, VLLMWeightSyncClient)
    sender = trainer(source, client)
    assert client.asked == [("init", INFO)]
    for version in (1, 5):
        client.asked.clear()
        with source.updating(version):
            pass
        sender.send_weights()
        assert client.asked == [("start",), ("update", {"version": version, "timeout": 5.0}), ("finish", str(version))]
    # What is asked is what an engine takes.
    assert engine().parse_update_info({"version": 5, "timeout": 5.0}) == UpdateInfo(5, 5.0)


def test_another_rank_asks_nothing(source: Source) -> None:
    client = Client()
    rank = trainer(source, client, rank=1)
    source.publish(1)
    rank.send_weights()
    assert client.asked == []


def test_nothing_is_sent_that_may_be_half_written(source: Source) -> None:
    client = Client()
    sender = trainer(source, client)
    with pytest.raises(NotReadyError, match="nothing is on offer"):
        sender.send_weights()
    source.publish(1)
    sender.send_weights()
    with pytest.raises(NotFencedError, match="version 1 was sent before"):
        sender.send_weights()
    source.begin_update()
    with pytest.raises(NotReadyError):
        sender.send_weights()
    assert [what for what, *_ in client.asked] == ["init", "start", "update", "finish"]


def test_what_failed_can_be_sent_again(source: Source) -> None:
    class Refusing(Client):
        def update_weights(self, update_info: Any) -> None:
            super().update_weights(update_info)
            if len(self.asked) == 3:
                raise OSError("away")

    client = Refusing()
    sender = trainer(source, client)
    source.publish(1)
    with pytest.raises(OSError, match="away"):
        sender.send_weights()
    sender.send_weights()
    assert client.asked[-1] == ("finish", "1")


def test_a_trainer_that_says_what_cannot_be_is_refused_before_the_engine_is_asked(source: Source) -> None:
    from refit_rl.vllm.trainer import RefitTrainerInitInfo

    client = Client()
    with pytest.raises(ConfigError, match="leave `source` out"):
        trainer(source, client, source=MagicMock())
    for options, about in (({"model": "m"}, "rendezvous"), ({**INFO, "nope": 1}, "nope")):
        with pytest.raises(ConfigError, match=about):
            WeightTransferTrainerFactory.trainer_init(RefitTrainerInitInfo(source, options, rank=0), client=client)
    assert client.asked == []
