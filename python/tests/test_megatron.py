"""What is read from a trainer's modules and groups, without Megatron-Core: module trees of the names and bytes that real ranks
had. `test_megatron_real.py` has the real modules."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from megatron_fakes import GOLDEN, Case, Module, Parameter, Tensor, model

from refit_rl import Target, errors, layouts
from refit_rl.megatron import Coordinates, Publisher, coordinates, place, publisher, walk

CASES = sorted(folder.name for folder in GOLDEN.iterdir())


def publish(monkeypatch: pytest.MonkeyPatch, case: Case, store: str, chunks: list[Any]) -> list[Publisher]:
    """The publishers of all ranks, as if each had asked the others."""
    every = [coordinates(chunk) for chunk in chunks]
    made = []
    for number, chunk in enumerate(chunks):
        monkeypatch.setattr(publisher, "gather", lambda *_, number=number: (number, every))
        made.append(Publisher(chunk, case.config, rendezvous=store, model=case.case["model"]))
    return made


def refresh(case: Case, store: str) -> list[dict[str, Tensor]]:
    """What every rank of an engine has after a refresh; they read one after the other."""
    found = []
    for rank in case.target["ranks"]:
        live = {name: Parameter(np.full_like(it.array, 99), it.dtype) for name, it in case.tensors(rank).items()}
        layout = layouts.vllm(
            case.config,
            live,
            rank=rank["rank"],
            tp_rank=rank["tp"],
            tp_size=case.target["tp"],
            expert_parallel="linear" if case.target["expert_parallel"] else None,
        )
        with Target(
            store,
            layout,
            live,
            model=case.case["model"],
            ranks=case.target["tp"],
            mode="direct",
            post_actions=lambda _: None,
            replica=f"replica-{rank['rank']}",
        ) as target:
            target.refresh()
        found.append(live)
    return found


@pytest.mark.parametrize("name", CASES)
def test_modules_of_every_golden_trainer_reach_every_golden_engine(
    name: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(name)
    ranks = case.source["ranks"]
    publishers = publish(monkeypatch, case, store, [case.module(rank) for rank in ranks])
    assert [it.place.rank for it in publishers] == [rank["rank"] for rank in ranks]
    assert {it.place.copies for it in publishers} == {1}
    for it in publishers:
        it.publish(1)
    for rank, live in zip(case.target["ranks"], refresh(case, store), strict=True):
        for tensor, expected in case.tensors(rank).items():
            got = live[tensor].array
            assert got.tobytes() == expected.array.tobytes(), tensor
    for it in publishers:
        assert it.close() == 0


def test_layers_are_numbered_by_modules_and_chunks_by_their_order() -> None:
    first, second = model({}, [4, 5]), model({}, [12, 13])
    held = walk([first, second])
    assert held.chunks == [[4, 5], [12, 13]]
    second.parameters["x"] = Parameter(np.zeros(2, np.float32))
    assert list(walk([first, second]).parameters) == ["model1.x"]
    assert list(walk(second).parameters) == ["x"]


def test_layers_without_numbers_are_refused() -> None:
    bare = model({}, [0])
    del bare.decoder.layers.children["0"].layer_number
    with pytest.raises(errors.LayoutError, match="layer 0 of the rank"):
        walk(bare)
    with pytest.raises(errors.LayoutError, match="no `decoder.layers`"):
        walk(Module())
    with pytest.raises(errors.LayoutError, match="empty"):
        walk([])


def test_a_tied_head_is_one_tensor_and_nothing_else_may_be() -> None:
    shared = Parameter(np.zeros((4, 2), np.float32))
    tied = {"embedding.word_embeddings.weight": shared, "output_layer.weight": shared}
    assert list(walk(model(tied, [])).parameters) == ["embedding.word_embeddings.weight"]
    with pytest.raises(errors.LayoutError, match="are one tensor") as caught:
        walk(model({"a.weight": shared, "b.weight": shared}, []))
    assert caught.value.tensors == ("a.weight", "b.weight")


def wrapped(chunk: Module, **ddp: Any) -> Any:
    settings = {"use_distributed_optimizer": True, **ddp}
    return SimpleNamespace(module=SimpleNamespace(module=chunk), ddp_config=SimpleNamespace(**settings))


def test_settings_come_from_configurations_of_the_model_and_of_wrappers() -> None:
    chunk = model({}, [0])
    assert walk(wrapped(chunk)).settings == {
        "gtp_weight_remat_size": 1,
        "megatron_fsdp": False,
        "overlap_param_gather": False,
        "reuse_grad_buf_for_mxfp8_param_ag": False,
    }
    chunk.config = SimpleNamespace(moe_single_grouped_weight=True, moe_mlp_glu_interleave_size=32, gtp_weight_remat_size=2)
    held = walk([wrapped(model({}, [1])), wrapped(chunk, use_megatron_fsdp=True, overlap_param_gather=True)])
    facts = held.facts(params_synced=False)
    assert facts["moe_single_grouped_weight"] is True and facts["moe_mlp_glu_interleave_size"] == 32
    assert facts["gtp_weight_remat_size"] == 2
    assert facts["megatron_fsdp"] and facts["overlap_param_gather"] and not facts["params_synced"]


@pytest.mark.parametrize(
    ("config", "ddp", "fix"),
    [
        ({"moe_single_grouped_weight": True}, {}, "set moe_single_grouped_weight to false"),
        ({"moe_mlp_glu_interleave_size": 32}, {}, "leave both interleave sizes unset"),
        ({"moe_shared_expert_glu_interleave_size": 32}, {}, "leave both interleave sizes unset"),
        ({"gtp_weight_remat_size": 2}, {}, "set gtp_weight_remat_size to 1"),
        ({"expert_gtp_weight_remat_size": 2}, {}, "set gtp_weight_remat_size to 1"),
        ({}, {"use_megatron_fsdp": True}, "Megatron's own data parallelism"),
        ({}, {"reuse_grad_buf_for_mxfp8_param_ag": True}, "set reuse_grad_buf_for_mxfp8_param_ag to false"),
        (
            {},
            {"overlap_param_gather": True, "use_distributed_optimizer": False},
            "set overlap_param_gather to false",
        ),
    ],
)
def test_unsafe_settings_are_refused_with_what_to_change(
    store: str, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], ddp: dict[str, Any], fix: str
) -> None:
    sized(monkeypatch, 4)
    case = Case("llama_tp4_to_tp1")
    chunk = case.module(case.source["ranks"][0])
    chunk.config = SimpleNamespace(**config)
    with pytest.raises(errors.RefusedError, match=fix):
        Publisher(wrapped(chunk, **ddp), case.config, rendezvous=store, model="m")


@pytest.mark.parametrize(
    ("kind", "fix"),
    [
        ("Float8Tensor", "keep parameters in bf16"),
        ("MXFP8Tensor", "keep parameters in bf16"),
        ("DTensor", "Megatron's own data parallelism"),
        ("Strange", "plain torch parameters"),
    ],
)
def test_parameters_of_other_classes_are_refused(
    store: str, monkeypatch: pytest.MonkeyPatch, kind: str, fix: str
) -> None:
    sized(monkeypatch, 4)
    case = Case("llama_tp4_to_tp1")
    chunk = case.module(case.source["ranks"][0])
    norm = chunk.decoder.children["final_layernorm"]
    old = norm.parameters["weight"]
    norm.parameters["weight"] = type(kind, (Tensor,), {})(old.array, old.dtype)
    with pytest.raises(errors.RefusedError, match=fix) as caught:
        Publisher(chunk, case.config, rendezvous=store, model="m")
    assert "decoder.final_layernorm.weight" in str(caught.value)


def test_adapters_are_refused_by_their_names(store: str) -> None:
    case = Case("llama_tp4_to_tp1")
    tensors = case.tensors(case.source["ranks"][0])
    tensors["decoder.layers.0.mlp.linear_fc1.adapter.linear_in.weight"] = Parameter(np.zeros((4, 4), np.uint16))
    with pytest.raises(errors.RefusedError, match="merge adapters"):
        Publisher(model(tensors, [0, 1]), case.config, rendezvous=store, model="m")


def test_a_model_without_its_wrapper_is_refused() -> None:
    weight = Parameter(np.zeros(4, np.float32))
    weight.main_grad = object()
    with pytest.raises(errors.RefusedError, match="as `get_model` gives them back"):
        walk(model({"decoder.final_layernorm.weight": weight}, []))


def test_blockwise_parameters_are_two_tensors() -> None:
    class Float8BlockwiseQTensor(Tensor):
        _rowwise_data = Tensor(np.zeros((128, 128), np.uint8), "torch.uint8")
        _rowwise_scale_inv = Tensor(np.zeros((1, 4), np.float32))
        _is_2D_scaled = True

    held = walk(model({"a.weight": Float8BlockwiseQTensor(np.zeros((128, 128), np.uint16))}, []))
    assert held.specs() == {
        "a.weight": ((128, 128), "torch.uint8"),
        "a.weight_scale_inv": ((1, 4), "torch.float32"),
    }
    assert held.params[0]["scaled_2d"] is True


def one_rank(store: str) -> tuple[Case, Module, Publisher]:
    case = Case("qwen3_tp4_to_tp2")
    chunk = case.module(case.source["ranks"][0])
    chunk.pg_collection = SimpleNamespace(tp=SimpleNamespace(rank=lambda: 0, size=lambda: 4))
    return case, chunk, Publisher(chunk, case.config, rendezvous=store, model="m")


def sized(monkeypatch: pytest.MonkeyPatch, sizes: int) -> None:
    every = [Coordinates(tp_rank=rank, tp_size=sizes) for rank in range(sizes)]
    monkeypatch.setattr(publisher, "gather", lambda *_: (0, every))


def test_a_step_without_a_fence_is_refused(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sized(monkeypatch, 4)
    _, _, it = one_rank(store)
    assert it.version is None
    it.publish(1)
    assert it.version == 1
    with pytest.raises(errors.NotFencedError, match="before_step"):
        it.publish(2)
    it.before_step()
    assert it.version is None
    with pytest.raises(errors.VersionError):
        it.publish(1)
    it.publish(2)
    with it.updating(3):
        assert it.version is None
    assert it.version == 3
    with pytest.raises(RuntimeError), it.updating(4):
        raise RuntimeError
    assert it.version is None
    assert it.close() == 0
    with pytest.raises(errors.ClosedError):
        it.publish(5)


def test_parameters_that_moved_are_named(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sized(monkeypatch, 4)
    _, chunk, it = one_rank(store)
    it.publish(1)
    it.before_step()
    norm = chunk.decoder.children["final_layernorm"].parameters
    norm["weight"].array = norm["weight"].array.copy()
    with pytest.raises(errors.TensorError, match="moved to other memory") as caught:
        it.publish(2)
    assert caught.value.tensors == ("decoder.final_layernorm.weight",)
    assert it.version is None


def test_overlapped_gathers_are_finished_before_anything_is_offered(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(no_grad=contextlib.nullcontext))
    sized(monkeypatch, 4)
    case = Case("qwen3_tp4_to_tp2")
    chunk = wrapped(case.module(case.source["ranks"][0]), overlap_param_gather=True)
    seen: list[Any] = []
    it = Publisher(chunk, case.config, rendezvous=store, model="m")
    chunk.start_param_sync = lambda force_sync: seen.append((force_sync, it.version))
    it.publish(1)
    assert seen == [(True, None)]
    assert it.version == 1


def test_a_buffer_is_published_as_it_was_at_publish(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("deepseekv3_tp2ep2_to_tp2")
    chunks = [case.module(rank) for rank in case.source["ranks"]]
    publishers = publish(monkeypatch, case, store, chunks)
    biases = [
        (f"model.layers.{number}.mlp.gate.e_score_correction_bias", module)
        for number, layer in enumerate(chunks[0].decoder.layers)
        for path, module in layer.named_modules()
        if path == "mlp.router"
    ]
    assert biases
    for value in (1.0, 2.0):
        for chunk in chunks:
            for _, module in chunk.named_modules():
                for name, buffer in list(module.buffers.items()):
                    # Another tensor under the same name, as casts leave behind.
                    module.buffers[name] = Tensor(np.full_like(buffer.array, value), buffer.dtype)
        for it in publishers:
            it.before_step()
            it.publish(int(value))
        for chunk in chunks:
            for _, module in chunk.named_modules():
                for buffer in module.buffers.values():
                    buffer.array[...] = -1.0
        live = refresh(case, store)[0]
        for name, _ in biases:
            assert set(live[name].array.tolist()) == {value}, name


def ranks(**sizes: int) -> list[Coordinates]:
    """All ranks in Megatron-Core's default order, tp-cp-ep-dp-pp."""
    tp, cp, ep, etp, dp, pp = (sizes.get(name, 1) for name in ("tp", "cp", "ep", "etp", "dp", "pp"))
    stage = tp * cp * dp
    return [
        Coordinates(
            tp_rank=at % tp,
            tp_size=tp,
            pp_rank=number,
            pp_size=pp,
            ep_rank=at // etp % ep,
            ep_size=ep,
            etp_rank=at % etp,
            etp_size=etp,
        )
        for number in range(pp)
        for at in range(stage)
    ]


@pytest.mark.parametrize(
    ("sizes", "copies", "members"),
    [
        ({}, 1, 1),
        ({"tp": 4}, 1, 4),
        ({"dp": 3}, 3, 1),
        ({"tp": 2, "dp": 2}, 2, 2),
        ({"tp": 2, "cp": 2, "dp": 2}, 4, 2),
        ({"tp": 2, "pp": 3, "dp": 2}, 2, 6),
        ({"dp": 4, "ep": 2}, 2, 2),
        ({"tp": 2, "dp": 4, "ep": 4}, 2, 4),
        ({"tp": 2, "dp": 4, "ep": 4, "etp": 2}, 1, 8),
        ({"tp": 4, "dp": 2, "ep": 2}, 2, 4),
        ({"tp": 2, "dp": 4, "ep": 8, "pp": 2}, 1, 16),
    ],
)
def test_copies_are_as_small_as_they_can_be(sizes: dict[str, int], copies: int, members: int) -> None:
    every = ranks(**sizes)
    places = [place(every, rank) for rank in range(len(every))]
    assert {(it.copies, it.ranks) for it in places} == {(copies, members)}
    assert len({(it.copy, it.rank) for it in places}) == len(every)
    for copy in range(copies):
        of = [at for at, it in zip(every, places, strict=True) if it.copy == copy]
        one = of[0]
        assert len({(at.pp_rank, at.tp_rank) for at in of}) == one.pp_size * one.tp_size
        experts = {(at.pp_rank, at.ep_rank, at.etp_rank) for at in of}
        assert len(experts) == one.pp_size * one.ep_size * one.etp_size


def test_ranks_in_another_order_find_their_copies() -> None:
    # pp before dp: the stages of a copy lie next to each other.
    every = [Coordinates(pp_rank=rank % 2, pp_size=2) for rank in range(4)]
    assert [(place(every, rank).copy, place(every, rank).rank) for rank in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_ranks_that_make_no_model_are_refused() -> None:
    with pytest.raises(errors.LayoutError, match="have to be equal") as caught:
        place([Coordinates(tp_size=2), Coordinates()], 0)
    assert caught.value.ranks == (1, 0)
    with pytest.raises(errors.LayoutError, match="none has some shard"):
        place([Coordinates(tp_size=2), Coordinates(tp_size=2)], 0)
    with pytest.raises(errors.LayoutError, match=r"pipeline stages have \[1, 2\] ranks"):
        place([Coordinates(pp_rank=rank > 0, pp_size=2) for rank in range(3)], 0)


def test_coordinates_come_from_the_groups_of_the_model() -> None:
    chunk = model({}, [], {"tp": (1, 2), "expt_tp": (0, 1), "ep": (3, 4)})
    assert coordinates(chunk) == Coordinates(tp_rank=1, tp_size=2, ep_rank=3, ep_size=4)
    assert coordinates(Module()) == Coordinates()
