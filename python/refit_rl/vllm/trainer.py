"""The trainer's side of vLLM's weight transfer, for loops that drive an engine through it. Importing this makes vLLM's
`WeightTransferTrainerFactory` know the backend `refit`; it needs vLLM, as that factory does, and raises `ImportError` for one whose
factory is of another kind (0.26).

::

    from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, WeightTransferTrainerFactory
    from refit_rl.vllm.trainer import RefitTrainerInitInfo

    publisher = refit_rl.torch.Publisher("etcd:http://store:2379", model.named_parameters(), model="qwen3-4b")
    info = RefitTrainerInitInfo(publisher, {"rendezvous": "etcd:http://store:2379", "model": "qwen3-4b"}, rank=rank)
    engine = WeightTransferTrainerFactory.trainer_init(info, client=HTTPVLLMWeightSyncClient(url))
    for version in range(1, steps):
        with publisher.updating(version):
            optimizer.step()
        engine.send_weights()
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from vllm.distributed.weight_transfer import TrainerWeightTransferEngine, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import TrainerInitInfo

from ..errors import ConfigError, NotFencedError, NotReadyError
from .options import InitInfo
from .plugin import BACKEND

if "config" in inspect.signature(WeightTransferTrainerFactory.trainer_init).parameters:
    # Up to 0.26 at least its trainers are made with a configuration of the engine's.
    raise ImportError(
        "this vLLM's WeightTransferTrainerFactory is older than 0.32's: publish as ever, and call update_weights on the engine"
    )


class Publishes(Protocol):
    """`refit_rl.torch.Publisher`, `refit_rl.megatron.Publisher` or `refit_rl.Source`."""

    @property
    def version(self) -> int | None: ...


@dataclass
class RefitTrainerInitInfo(TrainerInitInfo):
    """What each rank of a trainer says.

    Args:
        publisher: this rank's. It is the caller's: nothing here closes it.
        engine: what the engine is given as `init_info`; the fields of `refit_rl.vllm.InitInfo`. Only the sender's counts.
        timeout: what one update may take, seconds.
        rank: this process's; rank 0 speaks with the engine.
    """

    backend: ClassVar[str] = BACKEND

    publisher: Publishes
    engine: dict[str, Any] = field(default_factory=dict)
    timeout: float = 60.0


class RefitTrainerWeightTransferEngine(TrainerWeightTransferEngine[RefitTrainerInitInfo]):
    """Asks an engine to pull what a publisher has on offer. Nothing is gathered, packed or pushed here."""

    init_info_cls = RefitTrainerInitInfo

    def __init__(self, info: RefitTrainerInitInfo, client: Any) -> None:
        super().__init__(client=client, source=None, is_sender=info.is_sender)
        self._publisher = info.publisher
        self._timeout = info.timeout
        self._sent: int | None = None

    @classmethod
    def trainer_init(
        cls, init_info: RefitTrainerInitInfo, *, client: Any, source: Any = None
    ) -> RefitTrainerWeightTransferEngine:
        """Has the engine join, if this is the sender.

        Raises:
            ConfigError: a `source` was given, whose tensors would be gathered: the publisher says where the parameters lie.
        """
        if source is not None:
            raise ConfigError("trainer_init: leave `source` out: the publisher in init_info knows where the parameters lie")
        if init_info.is_sender:
            try:
                InitInfo(**init_info.engine)
            except TypeError as error:
                raise ConfigError(f"engine of RefitTrainerInitInfo: {error}") from error
            client.init_weight_transfer_engine(dict(init_info.engine))
        return cls(init_info, client)

    def send_weights(self) -> None:
        """Has the engine take the version that is on offer, and returns when it has. Call it behind the update, on all ranks:
        those that are not the sender check only that there is one.

        Raises:
            NotReadyError: nothing is on offer: an update is open, or nothing was published yet.
            NotFencedError: that version was sent before, so parameters may have been written without an update.
        """
        version = self._publisher.version
        if version is None:
            raise NotReadyError("send_weights: nothing is on offer. Publish first: `with publisher.updating(version)`, or `publish`")
        if version == self._sent:
            raise NotFencedError(
                f"send_weights: version {version} was sent before. Write parameters within an update of the next version"
            )
        if self.is_sender:
            self.client.start_weight_update()
            self.client.update_weights({"version": version, "timeout": self._timeout})
            self.client.finish_weight_update(str(version))
        self._sent = version


if BACKEND not in WeightTransferTrainerFactory._registry:
    WeightTransferTrainerFactory.register_engine(BACKEND, RefitTrainerWeightTransferEngine)
