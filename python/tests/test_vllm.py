"""The vLLM backend without vLLM: what it decides, against fakes of the modules and settings that it looks at."""

from __future__ import annotations

import inspect
import json
import struct
import subprocess
import sys
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from refit_rl import Target
from refit_rl.errors import ConfigError, EngineError, InvalidTargetError, NotReadyError, RefusedError, VersionError
from refit_rl.vllm import install, places, plugin, receiver, update
from refit_rl.vllm.capture import _pad, checkpoint_of
from refit_rl.vllm.graphs import Captured
from refit_rl.vllm.options import InitInfo, UpdateInfo, check_version

INFO: dict[str, Any] = {"rendezvous": "dir:/tmp/meet", "model": "m"}


class Tensor:
    """A parameter, as far as it is looked at."""

    __slots__ = ("dtype", "shape")  # As torch's: neither is in `__dict__`, which is copied from one to another.

    def __init__(self, shape: tuple[int, ...], dtype: str = "bfloat16") -> None:
        self.shape, self.dtype = shape, dtype

    @property
    def data(self) -> Tensor:
        return self

    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


class Module:
    def __init__(self, params: dict[str, Any] | None = None, quant_method: Any = None, **modules: Module) -> None:
        self._parameters = params or {}
        self._modules = modules
        #: As vLLM remembers it.
        self.loaded: dict[str, Any] | None = None
        if quant_method is not None:
            self.quant_method = quant_method

    def named_modules(self, prefix: str = "") -> Any:
        yield prefix, self
        for name, module in self._modules.items():
            yield from module.named_modules(f"{prefix}.{name}" if prefix else name)

    def modules(self) -> Any:
        return [module for _, module in self.named_modules()]


def method(name: str, **attributes: Any) -> Any:
    return type(name, (), attributes)()


def find(model: Module, device: str, **facts: Any) -> places.Places:
    return places.find(model, device, lambda module: module.loaded, Tensor, facts)


def linear() -> Module:
    """As a CPU engine leaves it: emptied, with the bias in f32."""
    module = Module({"weight": Tensor((0,)), "bias": Tensor((8,), "float32")}, method("UnquantizedLinearMethod"))
    module.loaded = {"weight": Tensor((8, 4)), "bias": Tensor((8,))}
    return module


def experts(kernel: str, **remembered: Tensor) -> Module:
    backend = types.SimpleNamespace(name=kernel)
    module = Module({"w13_weight": Tensor((2, 8, 4))}, method("UnquantizedFusedMoEMethod", unquantized_backend=backend))
    module.loaded = remembered or None
    return module


def test_what_a_cpu_packs_is_written_beside_it_in_load_time_shape_and_dtype() -> None:
    found = find(Module(proj=linear(), norm=Module({"weight": Tensor((4,))})), "cpu")
    weight, bias, norm = (found.by_name[name] for name in ("proj.weight", "proj.bias", "norm.weight"))
    assert weight.staged and weight.tensor.shape == (8, 4)
    assert bias.staged and bias.tensor.dtype == "bfloat16"
    assert not norm.staged and norm.tensor is norm.module._parameters["weight"]
    assert found.facts["layers"][0]["written"] == "load_time"
    ((name, module, tensors),) = found.processed
    assert (name, module, set(tensors)) == ("proj", weight.module, {"weight", "bias"})


def test_what_a_gpu_keeps_is_written_in_place() -> None:
    dense = Module({"weight": Tensor((8, 4))}, method("UnquantizedLinearMethod"))
    dense.loaded = {"weight": Tensor((8, 4))}
    found = find(Module(dense=dense, experts=experts("TRITON")), "cuda")
    assert not any(place.staged for place in found.by_name.values()) and not found.processed
    assert found.facts["layers"][1] == {
        "name": "experts",
        "quant_method": "UnquantizedFusedMoEMethod",
        "kernel": "TRITON",
    }


def test_experts_of_a_permuting_kernel_are_written_as_they_are_loaded() -> None:
    found = find(Module(experts=experts("FLASHINFER_TRTLLM", w13_weight=Tensor((2, 8, 4)))), "cuda")
    place = found.by_name["experts.w13_weight"]
    # The same shape, and other memory.
    assert place.staged and place.tensor is not place.module._parameters["w13_weight"]
    assert [name for name, _, _ in found.processed] == ["experts"]


def test_a_permuting_kernel_that_vllm_does_not_process_anew_is_refused_by_name() -> None:
    with pytest.raises(RefusedError, match="`experts` of UnquantizedFusedMoEMethod on FLASHINFER_TRTLLM.*moe_backend"):
        find(Module(experts=experts("FLASHINFER_TRTLLM")), "cuda")
    # Its wrapper processes nothing.
    wrapped = experts("FLASHINFER_CUTLASS", w13_weight=Tensor((2, 8, 4)))
    wrapped.quant_method = types.SimpleNamespace(old_quant_method=wrapped.quant_method)
    with pytest.raises(RefusedError, match="FLASHINFER_CUTLASS.*moe_backend"):
        find(Module(experts=wrapped), "cuda")
    wrapped.loaded = {"w13_weight": Tensor((2, 4, 8))}
    with pytest.raises(RefusedError, match=r"experts\.w13_weight|moe_backend"):
        find(Module(experts=wrapped), "cuda")
    # Of one that keeps what it loads nothing has to be processed.
    wrapped = experts("TRITON", w13_weight=Tensor((2, 8, 4)))
    wrapped.quant_method = types.SimpleNamespace(old_quant_method=wrapped.quant_method)
    assert not find(Module(experts=wrapped), "cuda").processed


def test_a_kernel_that_is_known_to_keep_what_it_loads_is_not_believed_against_what_it_has() -> None:
    dense = Module({"weight": Tensor((8, 4))}, method("UnquantizedLinearMethod"))
    for loaded in (Tensor((8, 8)), Tensor((8, 4), "float32")):
        dense.loaded = {"weight": loaded}
        found = find(Module(dense=dense), "cuda")
        assert found.by_name["dense.weight"].staged and found.by_name["dense.weight"].tensor.dtype == loaded.dtype


def test_what_quantising_adds_and_attention_derives_is_not_written() -> None:
    live = {"weight": Tensor((4, 8), "float8_e4m3fn"), "weight_scale": Tensor((1,), "float32")}
    dense = Module(live, method("Fp8PerTensorOnlineLinearMethod"))
    dense.loaded = {"weight": Tensor((8, 4))}
    attention = Module({"W_UV": Tensor((2, 4))})
    attention.loaded = {}
    found = find(Module(dense=dense, attention=attention), "cuda")
    assert list(found.by_name) == ["dense.weight"] and found.by_name["dense.weight"].tensor.shape == (8, 4)


def test_what_is_loaded_into_while_it_is_live_is_written_in_place() -> None:
    gate = linear()
    bias = gate._parameters["e_score_correction_bias"] = Tensor((8,), "float32")
    assert gate.loaded is not None
    gate.loaded["e_score_correction_bias"] = bias
    found = find(Module(gate=gate), "cpu")
    assert not found.by_name["gate.e_score_correction_bias"].staged
    ((_, _, tensors),) = found.processed
    assert "e_score_correction_bias" not in tensors


def test_a_tied_parameter_has_one_place_and_both_modules_are_processed_from_it() -> None:
    shared = Tensor((8, 4))
    embed = Module({"weight": shared}, method("UnquantizedEmbeddingMethod"))
    head = Module({"weight": shared, "bias": Tensor((8,))}, method("UnquantizedEmbeddingMethod"))
    embed.loaded = {"weight": Tensor((8, 4))}
    head.loaded = {"weight": Tensor((8, 4)), "bias": Tensor((8,))}
    found = find(Module(embed=embed, head=head), "cpu")
    assert list(found.by_name) == ["embed.weight", "head.bias"]
    (_, _, first), (_, second, tensors) = found.processed
    assert second is head and tensors["weight"] is first["weight"] and set(tensors) == {"weight", "bias"}


def test_a_tied_parameter_that_one_module_packs_and_the_other_reads_is_refused() -> None:
    shared = Tensor((8, 4))
    embed = Module({"weight": shared}, method("UnquantizedEmbeddingMethod"))
    head = Module({"weight": shared}, method("PackedHeadMethod"))
    embed.loaded = head.loaded = {"weight": Tensor((8, 4))}
    with pytest.raises(RefusedError, match=r"head\.weight"):
        find(Module(embed=embed, head=head), "cuda")


@pytest.mark.parametrize(
    ("loaded", "says"),
    [
        ({"weight": "bfloat16"}, "load_time"),
        ({"weight": "torch.bfloat16", "bias": "torch.float32"}, "load_time"),
        ({"weight": "float8_e4m3fn", "weight_scale_inv": "float32"}, "load_time_blocks"),
        ({"weight": "float8_e4m3fn", "weight_scale": "float32"}, "load_time_quantized"),
        ({"weight": "int8", "weight_scale": "float32"}, "load_time_quantized"),
        ({"qweight": "int32", "scales": "bfloat16"}, "load_time_quantized"),
    ],
)
def test_what_a_layer_loads_is_told_from_its_tensors(loaded: dict[str, str], says: str) -> None:
    assert places.written_as({name: Tensor((8, 4), dtype) for name, dtype in loaded.items()}) == says


def test_a_layer_that_loads_what_a_checkpoint_has_quantised_is_refused_before_anything_is_made_for_it() -> None:
    dense = Module({"weight": Tensor((8, 4), "int8")}, method("CompressedTensorsLinearMethod"))
    dense.loaded = {"weight": Tensor((8, 4), "int8"), "weight_scale": Tensor((8, 1), "float32")}
    model = Module(dense=dense)

    def never(*_: Any) -> Any:
        raise AssertionError("nothing is to be made")

    with pytest.raises(RefusedError, match='`dense` of CompressedTensorsLinearMethod.*quantization="fp8_per_tensor"'):
        places.find(model, "cuda", lambda module: module.loaded, never)
    dense.loaded = {"weight": Tensor((8, 4), "float8_e4m3fn"), "weight_scale_inv": Tensor((1, 1), "float32")}
    assert find(model, "cuda").quantized == ["dense"]


def test_a_parameter_without_a_shape_before_it_is_loaded_is_refused_and_not_stumbled_over() -> None:
    class Shapeless:
        dtype = "uint8"

        @property
        def shape(self) -> Any:
            raise RuntimeError("uninitialized")

    dense = Module({"qweight": Tensor((8, 4), "uint8")}, method("GGUFLinearMethod"))
    dense.loaded = {"qweight": Shapeless()}
    with pytest.raises(RefusedError, match="GGUFLinearMethod"):
        find(Module(dense=dense), "cuda")


def test_experts_that_move_are_refused_whatever_is_written() -> None:
    model = Module(experts=experts("FLASHINFER_TRTLLM", w13_weight=Tensor((2, 8, 4))))
    for fact in ({"enable_eplb": True}, {"redundant_experts": 2}, {"fused_shared_experts": True}):
        with pytest.raises(RefusedError):
            find(model, "cuda", **fact)


def test_a_parameter_that_is_not_what_was_loaded_and_has_no_method_is_refused() -> None:
    norm = Module({"weight": Tensor((4,))})
    norm.loaded = {"weight": Tensor((8,))}
    with pytest.raises(RefusedError, match=r"norm\.weight") as raised:
        find(Module(norm=norm), "cuda")
    assert raised.value.tensors == ("norm.weight",)


def test_an_emptied_parameter_of_unknown_shape_is_refused_by_name() -> None:
    module = linear()
    module.loaded = None
    with pytest.raises(RefusedError, match="proj"):
        find(Module(proj=module), "cpu")
    module.quant_method = method("UnquantizedLinearMethod")
    with pytest.raises(RefusedError, match=r"proj\.weight.*0\.25"):
        find(Module(proj=module), "cuda")


class Memory:
    """A tensor whose memory is a list: what a graph has captured goes on reading that."""

    dtype = "float32"

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    @property
    def shape(self) -> Any:
        return (len(self.values),)

    def stride(self) -> Any:
        return (1,)

    def detach(self) -> Memory:
        other = Memory()
        other.values = self.values
        return other

    def data_ptr(self) -> int:
        return id(self.values)

    def copy_(self, other: Memory) -> None:
        self.values[:] = other.values


class Kernel:
    __slots__ = ("scales", "strides")

    def __init__(self, scale: float) -> None:
        self.scales, self.strides = {"w1": Memory(scale)}, (Memory(1.0), None)


def captured(module: Module) -> Captured:
    return Captured([("experts", module)], lambda value: isinstance(value, Memory))


@pytest.mark.parametrize("method", [types.SimpleNamespace, Module])
def test_what_a_graph_reads_is_filled_with_what_a_new_kernel_holds(method: Any) -> None:
    module = Module(quant_method=method())
    module.quant_method.kernel = Kernel(1.0)
    weight = Memory(5.0)
    module._parameters = {"weight": weight}
    module.apply = lambda x: weight  # type: ignore[attr-defined]
    scale = module.quant_method.kernel.scales["w1"].values
    graph = captured(module)
    for version in (2.0, 3.0):
        # The kernel is made anew, and the one before is gone.
        module.quant_method.kernel = Kernel(version)
        graph.refill()
        assert scale == [version]
    module.quant_method.kernel.scales["w1"] = Memory(1.0, 2.0)
    with pytest.raises(EngineError, match=r"experts\.quant_method\.kernel\.scales\.w1.*enforce_eager"):
        graph.refill()
    del module.quant_method.kernel.scales["w1"]
    with pytest.raises(EngineError, match="enforce_eager"):
        graph.refill()


def test_what_a_graph_reads_is_found_through_closures_partials_and_methods_and_ends() -> None:
    import functools

    hidden = Memory(1.0)
    holder = types.SimpleNamespace(inner=hidden)
    holder.itself = holder

    class Bound:
        def __init__(self) -> None:
            self.memory = hidden

        def call(self) -> None: ...

    for reached in (lambda: hidden, functools.partial(print, hidden), Bound().call, holder, [holder], {"a": (hidden,)}):
        module = Module()
        module.kernel = reached  # type: ignore[attr-defined]
        assert [tensor for _, tensor in captured(module)._found()] == [hidden]
    # Other modules' are theirs.
    module = Module()
    module.other = Module({"weight": Memory(1.0)})  # type: ignore[attr-defined]
    assert not list(captured(module)._found())


def settings(**of: Any) -> Any:
    cache = types.SimpleNamespace(enable_prefix_caching=of.get("prefix", False), calculate_kv_scales=of.get("scales", False))
    offload = types.SimpleNamespace(uva=types.SimpleNamespace(cpu_offload_gb=of.get("offload", 0)))
    model = types.SimpleNamespace(enforce_eager=of.get("eager", True), enable_sleep_mode=of.get("sleep", False))
    return types.SimpleNamespace(cache_config=cache, model_config=model, offload_config=offload)


@pytest.mark.parametrize(
    ("of", "device", "says"),
    [
        ({"prefix": True}, "cuda", "enable_prefix_caching=False"),
        ({"scales": True}, "cuda", "calculate_kv_scales"),
        ({"eager": False}, "cpu", "enforce_eager=True"),
        ({"offload": 1.5}, "cuda", "cpu_offload_gb"),
    ],
)
def test_engines_that_would_go_on_with_old_state_are_refused(of: dict[str, Any], device: str, says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        receiver.check_settings(settings(**of), InitInfo(**INFO), device)


def test_a_relay_whose_parameters_go_when_the_engine_sleeps_is_refused() -> None:
    info = InitInfo(**INFO, relay=True)
    with pytest.raises(RefusedError, match='"mode": "staged".*enable_sleep_mode=False'):
        receiver.check_settings(settings(sleep=True), info, "cuda")
    receiver.check_settings(settings(), info, "cuda")
    # The second set is the target's own, and nobody reads what does not relay.
    receiver.check_settings(settings(sleep=True), InitInfo(**INFO, relay=True, mode="staged"), "cuda")
    receiver.check_settings(settings(sleep=True), InitInfo(**INFO), "cuda")


def test_settings_that_do_not_matter_pass() -> None:
    receiver.check_settings(settings(), InitInfo(**INFO), "cpu")
    receiver.check_settings(settings(eager=False), InitInfo(**INFO), "cuda")
    receiver.check_settings(settings(prefix=True), InitInfo(**INFO, prefix_cache="caller_resets"), "cuda")


def test_an_unknown_vllm_is_refused_unless_it_is_wanted() -> None:
    check_version("0.32.0", False)
    check_version("0.32.1rc1", False)
    for version in ("0.31.0", "1.0", "dev", ""):
        with pytest.raises(ConfigError, match="allow_unknown_vllm"):
            check_version(version, False)
        check_version(version, True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "x"},
        {"layout": 1},
        {"prefix_cache": None},
        {"model": ""},
        {"rendezvous": 7},
        {"relay": "false"},
        {"allow_unknown_vllm": 0},
    ],
)
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        InitInfo(**{**INFO, **wrong})


#: Options that the backend itself is about.
OWN = {"layout", "checkpoint", "prefix_cache", "allow_unknown_vllm"}


def test_options_are_those_of_a_target_with_its_defaults() -> None:
    of_target = inspect.signature(Target).parameters
    others = {field.name: field.default for field in fields(InitInfo) if field.name not in OWN | {"rendezvous", "model"}}
    assert others.pop("mode") == "direct"
    # A text's default is not shown.
    shown = {name: of_target[name].default for name in others}
    assert others == {name: others[name] if default is ... else default for name, default in shown.items()}


def test_what_is_said_reaches_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[str, Any] = {
        **{"rendezvous": "dir:/elsewhere", "model": "n", "replica": "r", "job": "j", "key_file": "k", "transport": "nixl"},
        **{"insecure_tcp": "lo", "mode": "staged", "checks": "always", "relay": True, "fanout": 3},
        **{"timeout": 1.0, "ttl": 2.0, "lease": 3.0, "attempt": 4.0, "drain": 5.0},
    }
    assert said.keys() == {field.name for field in fields(InitInfo)} - OWN
    given: dict[str, Any] = {}

    def target(rendezvous: str, layout: Any, tensors: Any, **options: Any) -> None:
        given.update(options, rendezvous=rendezvous)

    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__="0.32.0"))  # type: ignore[misc]
    model = Module()
    model.parameters = lambda: iter([types.SimpleNamespace(device="cpu")])  # type: ignore[attr-defined]
    config = settings()
    config.parallel_config = types.SimpleNamespace()
    layout = types.SimpleNamespace(names=[], post_actions=[])
    for name, value in {"platform": "cpu", "check_hooks": None, "world": (0, 1)}.items():
        monkeypatch.setattr(receiver, name, lambda *_, value=value: value)
    monkeypatch.setattr(receiver.reload, "as_loaded", lambda _: None)
    monkeypatch.setattr(receiver.Receiver, "_layout", lambda *_: layout)
    monkeypatch.setattr(receiver, "Target", target)
    receiver.Receiver(model, config, InitInfo(**said))
    assert said == {name: given[name] for name in said}


@pytest.mark.parametrize("version", [-1, "3", True, 1.5])
def test_a_version_is_a_number(version: Any) -> None:
    with pytest.raises(ConfigError, match="version"):
        UpdateInfo(version)


class Laid(Tensor):
    """One that says in whose memory it lies."""

    __slots__ = ("memory",)

    def __init__(self, shape: tuple[int, ...], memory: int, dtype: str = "bfloat16") -> None:
        super().__init__(shape, dtype)
        self.memory = memory

    def untyped_storage(self) -> Any:
        return types.SimpleNamespace(data_ptr=lambda: self.memory)


@pytest.mark.parametrize("packed", [True, False])
def test_a_view_that_a_module_has_of_a_childs_weight_is_filled_where_that_has_moved(packed: bool) -> None:
    loaded = Tensor((768, 1, 4))
    convolution = Module({"weight": Laid((768, 1, 4), 2 if packed else 1)})
    mixer = Module(conv1d=convolution)
    view = Laid((768, 4), 1)
    mixer._buffers = {"conv_weights": view, "of_another_type": Laid((768, 4), 1, "float32"), "none": None}  # type: ignore[attr-defined]
    model = Module(mixer=mixer)
    found = install.views(model, [("mixer.conv1d", convolution, {"weight": loaded})])
    assert found == ([(view, loaded)] if packed else [])


class Engine:
    """An `LLM`, as far as `update` calls it."""

    def __init__(self, busy: bool = False, resets: bool = True) -> None:
        self.calls: list[Any] = []
        self.resets = resets
        self.llm_engine = types.SimpleNamespace(has_unfinished_requests=lambda: busy)

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return self.resets

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.calls.append((name, *args))


def test_an_update_resets_the_cache_before_anybody_sees_the_version() -> None:
    engine = Engine()
    update(engine, 7, timeout=3.0)
    assert engine.calls == [
        ("start_weight_update",),
        ("update_weights", {"update_info": {"version": 7, "timeout": 3.0}}),
        "reset",
        ("finish_weight_update", "7"),
    ]


def test_an_engine_whose_weights_have_no_name_is_given_none() -> None:
    engine = Engine()
    finished: list[str] = []
    engine.finish_weight_update = lambda: finished.append("finished")  # type: ignore[attr-defined]
    update(engine, 7)
    assert finished == ["finished"]


@pytest.mark.parametrize(
    "said",
    [
        "Worker failed with error 'NotReadyError: no group offers one', please check the stack trace above for the root cause",
        "Call to collective_rpc method failed: NotReadyError: no group offers one",
    ],
)
def test_what_a_worker_raised_is_raised_again(said: str) -> None:
    def fails(_: Any) -> None:
        raise Exception(said)

    engine = Engine()
    engine.update_weights = fails  # type: ignore[attr-defined]
    with pytest.raises(NotReadyError, match="^no group offers one$"):
        update(engine, 7)


def test_an_engine_that_is_not_paused_is_left_alone() -> None:
    engine = Engine(busy=True)
    with pytest.raises(EngineError, match="pause_generation"):
        update(engine, 7)
    assert engine.calls == []


def test_a_cache_that_is_not_dropped_is_an_error() -> None:
    with pytest.raises(EngineError, match="prefix cache"):
        update(Engine(resets=False), 7)


class Rank(receiver.Receiver):
    """A receiver without an engine: `refreshes` are the versions or errors of its target, `others` what another rank says in each
    exchange: what is live, whether it has landed, what came of it."""

    def __init__(self, refreshes: list[Any], others: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.installs = 0
        self._actions = []

        def refresh(version: Any, timeout: float) -> Any:
            self.asked.append(version)
            outcome = refreshes.pop(0)
            if isinstance(outcome, Exception):
                raise outcome
            if outcome != self._target.version:
                try:
                    self._install([])
                except Exception as error:
                    raise EngineError(f"post_actions: {error}") from error
            self._target.version = outcome
            return {"version": outcome}

        self._target = types.SimpleNamespace(version=None, refresh=refresh)  # type: ignore[assignment]
        monkeypatch.setattr(receiver, "everywhere", lambda said: [said, others.pop(0)])

    def _process(self, actions: Any) -> None:
        self.installs += 1


def test_ranks_end_with_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank([4, 5], [None, None, (5, None), None, (5, None), 5], monkeypatch)
    assert rank.refresh(UpdateInfo(4))["version"] == 5
    assert rank.asked == [4, 5] and rank.installs == 2
    with pytest.raises(VersionError, match="5 is live"):
        rank.refresh(UpdateInfo(5))


def test_a_rank_that_has_the_newest_waits_for_the_others_and_processes_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank([5], [None, None, (4, None), None, (5, None)], monkeypatch)
    assert rank.refresh(UpdateInfo())["version"] == 5
    assert rank.asked == [None] and rank.installs == 2


def test_a_rank_that_has_it_from_an_update_that_failed_elsewhere_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank([5], [4, None, (5, None)], monkeypatch)
    rank._target.version = 5
    assert rank.refresh(UpdateInfo(5))["version"] == 5
    assert rank.installs == 1


def test_no_rank_goes_on_when_one_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    # Before it has landed there: nothing is processed here.
    rank = Rank([4], [None, "TransportError: gone", (0, "TransportError: gone")], monkeypatch)
    with pytest.raises(InvalidTargetError, match="rank 1.*gone") as raised:
        rank.refresh(UpdateInfo(4))
    assert raised.value.ranks == (1,) and rank.installs == 0 and rank._target.version is None
    # And while it was processed.
    with pytest.raises(InvalidTargetError, match="rank 1.*gone"):
        Rank([4], [None, None, (0, "TransportError: gone")], monkeypatch).refresh(UpdateInfo(4))
    exchanges = [None, None, (4, None)]
    with pytest.raises(RuntimeError, match="mine"):
        Rank([RuntimeError("mine")], exchanges, monkeypatch).refresh(UpdateInfo(4))
    assert exchanges == []


def test_post_actions_reach_their_modules_and_unknown_ones_are_refused() -> None:
    derived = []
    projection = Module()
    attention = Module(kv_b_proj=projection)
    attention.kv_b_proj, attention.kv_lora_rank, attention.impl = projection, 4, object()  # type: ignore[attr-defined]
    attention.process_weights_after_loading = derived.append  # type: ignore[attr-defined]
    model = Module(attn=attention)
    actions: list[Any] = [{"kind": "absorb_mla", "params": ["attn.kv_b_proj.weight"]}, {"kind": "drop_caches", "params": []}]
    install.post_actions(model, actions, "bf16")
    assert derived == ["bf16"]
    # A layout that does not say so gets the same from the modules.
    assert install.actions_of(model, ["attn.sinks"]) == [actions[0], {"kind": "copy_sinks", "params": ["attn.sinks"]}]
    assert [name for name, _ in install.latent_attention(model)] == ["attn"]
    with pytest.raises(EngineError, match="other.kv_b_proj.weight"):
        install.post_actions(model, [{"kind": "absorb_mla", "params": ["other.kv_b_proj.weight"]}], "bf16")
    with pytest.raises(RefusedError, match="sing"):
        install.post_actions(model, [{"kind": "sing", "params": []}], "bf16")  # type: ignore[typeddict-item]


def safetensors(path: Path, header: Any) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def test_a_checkpoint_is_read_from_its_headers(tmp_path: Path) -> None:
    safetensors(tmp_path / "a.safetensors", {"__metadata__": {}, "w": {"shape": [2, 3], "dtype": "BF16"}})
    safetensors(tmp_path / "b.safetensors", {"b": {"shape": [], "dtype": "F32"}})
    assert checkpoint_of(tmp_path) == [("b", (), "F32"), ("w", (2, 3), "BF16")]


@pytest.mark.parametrize("header", [b"{", b"[1]", b'{"w": 1}', b'{"w": {"shape": 3, "dtype": "F32"}}', b"\xff"])
def test_what_is_no_checkpoint_is_named(tmp_path: Path, header: bytes) -> None:
    safetensors(tmp_path / "a.safetensors", header)
    with pytest.raises(ConfigError, match=r"a\.safetensors"):
        checkpoint_of(tmp_path)
    with pytest.raises(ConfigError, match='"checkpoint"'):
        checkpoint_of(tmp_path / "nowhere")


def test_only_rows_behind_the_last_are_padding() -> None:
    def entry(*rows: tuple[int, int]) -> dict[str, Any]:
        return {
            "shape": [8, 2],
            "fill": [],
            "copies": [{"to": {"offset": a * 2, "shape": [b - a, 2], "stride": [2, 1]}} for a, b in rows],
        }

    padded, hole, whole = entry((0, 5)), entry((0, 2), (4, 6)), entry((0, 8))
    _pad({"padded": padded, "hole": hole, "whole": whole})
    assert padded["fill"] == [{"offset": 10, "shape": [6], "stride": [1]}]
    assert hole["fill"] == whole["fill"] == []


def test_the_backend_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Factory:
        _registry: dict[str, Any] = {}
        calls: list[Any] = []

        @classmethod
        def register_engine(cls, name: str, *where: str) -> None:
            cls._registry[name] = where
            cls.calls.append(where)

    module = types.ModuleType("vllm.distributed.weight_transfer")
    module.WeightTransferEngineFactory = Factory  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.distributed", types.ModuleType("vllm.distributed"))
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer", module)
    plugin.register()
    plugin.register()
    assert Factory.calls == [("refit_rl.vllm.engine", "RefitWeightTransferEngine")]


def test_an_older_vllm_has_no_backends_and_still_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer", None)
    plugin.register()


def test_neither_vllm_nor_torch_is_imported_before_it_is_needed() -> None:
    modules = "refit_rl.vllm, refit_rl.vllm.plugin, refit_rl.vllm.worker"
    code = f"import sys, {modules}; print(sorted({{'vllm', 'torch'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
