"""The vLLM backend without vLLM: what it decides, against fakes of the modules and settings that it looks at."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from refit_rl.errors import ConfigError, EngineError, InvalidTargetError, RefusedError, VersionError
from refit_rl.vllm import install, places, plugin, receiver, update
from refit_rl.vllm.capture import _pad, checkpoint_of
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
        self.loaded: dict[str, Any] = {}
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


def find(model: Module, device: str) -> places.Places:
    return places.find(model, device, lambda module: module.loaded, Tensor)


def linear() -> Module:
    """As a CPU engine leaves it: emptied, with the bias in f32."""
    module = Module({"weight": Tensor((0,)), "bias": Tensor((8,), "float32")}, method("UnquantizedLinearMethod"))
    module.loaded = {"weight": Tensor((8, 4))}
    return module


def test_what_a_cpu_packs_is_written_beside_it_in_load_time_shape_and_dtype() -> None:
    found = find(Module(proj=linear(), norm=Module({"weight": Tensor((4,))})), "cpu")
    weight, bias, norm = (found.by_name[name] for name in ("proj.weight", "proj.bias", "norm.weight"))
    assert weight.staged and weight.tensor.shape == (8, 4)
    assert bias.staged and bias.tensor.dtype == "bfloat16"
    assert not norm.staged and norm.tensor is norm.module._parameters["weight"]
    assert found.facts == {"device": "cpu", "load_time": True, "layers": []}
    ((module, tensors),) = found.staged_modules
    assert module is weight.module and set(tensors) == {"weight", "bias"}


def test_on_a_gpu_everything_is_live_and_reported_to_the_checks() -> None:
    dense = Module({"weight": Tensor((8, 4))}, method("UnquantizedLinearMethod"))
    backend = types.SimpleNamespace(name="FLASHINFER_TRTLLM")
    experts = Module({"w13_weight": Tensor((2, 8, 4))}, method("UnquantizedFusedMoEMethod", unquantized_backend=backend))
    found = find(Module(dense=dense, experts=experts), "cuda")
    assert not any(place.staged for place in found.by_name.values())
    assert found.facts["load_time"] is False
    assert found.facts["layers"][1] == {
        "name": "experts",
        "quant_method": "UnquantizedFusedMoEMethod",
        "kernel": "FLASHINFER_TRTLLM",
    }
    assert receiver.raw(found.facts["layers"][0], "cuda") and not receiver.raw(found.facts["layers"][1], "cuda")


def test_experts_of_other_kernels_on_a_cpu_are_not_taken_for_staged() -> None:
    experts = Module({"w13_weight": Tensor((2, 8, 4))}, method("UnquantizedFusedMoEMethod", unquantized_backend="OOT"))
    found = find(Module(experts=experts), "cpu")
    assert not found.by_name["experts.w13_weight"].staged
    assert found.facts["load_time"] is False and found.facts["layers"][0]["kernel"] == "OOT"


def test_a_tied_parameter_has_one_place_and_its_twin_is_found() -> None:
    shared = Tensor((8, 4))
    embed = Module({"weight": shared}, method("UnquantizedEmbeddingMethod"))
    head = Module({"weight": shared}, method("UnquantizedEmbeddingMethod"))
    model = Module(embed=embed, head=head)
    found = find(model, "cpu")
    assert list(found.by_name) == ["embed.weight"]
    assert install.sharers(model, found.staged_modules) == [head]


def test_an_emptied_parameter_of_unknown_shape_is_refused_by_name() -> None:
    module = linear()
    module.loaded = {}
    with pytest.raises(RefusedError, match="proj.weight") as raised:
        find(Module(proj=module), "cpu")
    assert raised.value.tensors == ("proj.weight",)


def settings(**of: Any) -> Any:
    cache = types.SimpleNamespace(enable_prefix_caching=of.get("prefix", False), calculate_kv_scales=of.get("scales", False))
    return types.SimpleNamespace(
        cache_config=cache, model_config=types.SimpleNamespace(enforce_eager=of.get("eager", True))
    )


@pytest.mark.parametrize(
    ("of", "device", "says"),
    [
        ({"prefix": True}, "cuda", "enable_prefix_caching=False"),
        ({"scales": True}, "cuda", "calculate_kv_scales"),
        ({"eager": False}, "cpu", "enforce_eager=True"),
    ],
)
def test_engines_that_would_go_on_with_old_state_are_refused(of: dict[str, Any], device: str, says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        receiver.check_settings(settings(**of), InitInfo(**INFO), device)


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


@pytest.mark.parametrize("wrong", [{"mode": "x"}, {"layout": 1}, {"prefix_cache": None}, {"model": ""}, {"rendezvous": 7}])
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        InitInfo(**{**INFO, **wrong})


@pytest.mark.parametrize("version", [-1, "3", True, 1.5])
def test_a_version_is_a_number(version: Any) -> None:
    with pytest.raises(ConfigError, match="version"):
        UpdateInfo(version)


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


def test_an_engine_that_is_not_paused_is_left_alone() -> None:
    engine = Engine(busy=True)
    with pytest.raises(EngineError, match="pause_generation"):
        update(engine, 7)
    assert engine.calls == []


def test_a_cache_that_is_not_dropped_is_an_error() -> None:
    with pytest.raises(EngineError, match="prefix cache"):
        update(Engine(resets=False), 7)


class Rank(receiver.Receiver):
    """A receiver without an engine: `refreshes` are the versions or errors of its target, `others` what other ranks say."""

    def __init__(self, refreshes: list[Any], others: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []

        def refresh(version: Any, timeout: float) -> Any:
            self.asked.append(version)
            outcome = refreshes.pop(0)
            if isinstance(outcome, Exception):
                raise outcome
            self._target.version = outcome
            return {"version": outcome}

        self._target = types.SimpleNamespace(version=None, refresh=refresh)  # type: ignore[assignment]
        monkeypatch.setattr(receiver, "everywhere", lambda said: [said, others.pop(0)])


def test_ranks_end_with_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank([4, 5], [(5, None), (5, None)], monkeypatch)
    assert rank.refresh(UpdateInfo(4))["version"] == 5
    assert rank.asked == [4, 5]
    with pytest.raises(VersionError, match="5 is live"):
        rank.refresh(UpdateInfo(5))


def test_a_rank_that_has_the_newest_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank([5], [(4, None), (5, None)], monkeypatch)
    assert rank.refresh(UpdateInfo())["version"] == 5
    assert rank.asked == [None]


def test_no_rank_goes_on_when_one_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidTargetError, match="rank 1.*gone") as raised:
        Rank([4], [(0, "TransportError: gone")], monkeypatch).refresh(UpdateInfo(4))
    assert raised.value.ranks == (1,)
    with pytest.raises(RuntimeError, match="mine"):
        Rank([RuntimeError("mine")], [(4, None)], monkeypatch).refresh(UpdateInfo(4))


def test_experts_that_have_a_kernel_are_packed_again() -> None:
    class Value(Tensor):
        def clone(self) -> Value:
            return self

    seen = []

    class Method:
        moe_kernel: Any = "kernel"

        def process_weights_after_loading(self, module: Any) -> None:
            seen.append((self.moe_kernel, module._parameters["w13_weight"].shape))

    module = Module({"w13_weight": Value((2, 4, 8))}, Method())
    install.process(module, {"w13_weight": Value((2, 8, 4))}, lambda tensor: tensor)
    assert seen == [(None, (2, 8, 4))]


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
