"""Where each parameter of an engine is written: in place, or beside it, to be processed as if it had been loaded.

What vLLM does with a parameter behind loading shows neither in its name nor, with some kernels, in its shape. So every
module is looked at: what is known to keep what was loaded is *live*; anything else is *staged* where vLLM remembers what it is
loaded into, which is what its own reload builds on. `layouts.keeps` knows the kernels and `layouts.check_engine` refuses the rest, both
for each module by its `quant_method`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import layouts
from ..errors import RefusedError


@dataclass
class Place:
    """One parameter: `tensor` is what is written."""

    module: Any
    name: str
    tensor: Any
    staged: bool


@dataclass
class Places:
    by_name: dict[str, Place]
    #: What each layer is and how it is written, as `layouts.vllm` takes it.
    facts: dict[str, Any]
    #: Each module that is processed: its name, itself, and all of its load-time tensors by their own names.
    processed: list[tuple[str, Any, dict[str, Any]]]
    #: Names of modules that load what a checkpoint has quantised, whether they keep it or not.
    quantized: list[str]


def method_of(module: Any) -> str:
    """The class of a module's `quant_method`; empty where it has none."""
    method = _method(module)
    return "" if method is None else type(method).__name__


def kernel_of(module: Any) -> str | None:
    """The kernel that the method chose, by name."""
    method = _method(module)
    for attribute in ("unquantized_backend", "fp8_backend"):
        backend = getattr(method, attribute, None)
        if backend is not None:
            return str(getattr(backend, "name", backend))
    linear = getattr(method, "fp8_linear", None)
    return None if linear is None else type(linear).__name__


def _method(module: Any) -> Any:
    """What looks after a module's weights. vLLM wraps that of experts behind loading, for some ways to reach other ranks."""
    method = getattr(module, "quant_method", None)
    return getattr(method, "old_quant_method", method)


#: Of a module, its parameters as a checkpoint is loaded into them, by name: tensors without storage, or the live one where that is
#: what is loaded into. `None` where vLLM does not remember.
Loaded = Callable[[Any], Mapping[str, Any] | None]


@dataclass
class _Module:
    """A module with parameters, before anything is made for it."""

    path: str
    module: Any
    #: What is written, by name: live parameters, or of a staged module what they are loaded into.
    written: dict[str, Any]
    staged: bool
    #: Whether it loads what a checkpoint has quantised.
    quantized: bool

    def named(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def find(
    model: Any, device: str, loaded: Loaded, empty: Callable[[Any, Any], Any], facts: Mapping[str, Any] | None = None
) -> Places:
    """Looks at every module of a model, and makes what is written beside it once nothing is refused.

    Args:
        device: `cpu`, `cuda`, `rocm` or `xpu`.
        empty: makes a tensor of a shape and a dtype on the engine's device.
        facts: what else there is to say of the engine.

    Raises:
        RefusedError: with what to change.
    """
    modules: list[_Module] = []
    layers: list[dict[str, Any]] = []
    for path, module in model.named_modules():
        found = _look(path, module, device, loaded(module), layers)
        if found is not None:
            modules.append(found)
    known: dict[str, Any] = {"device": device, "layers": layers, **(facts or {})}
    layouts.check_engine(known)  # type: ignore[arg-type]
    places = Places({}, known, [], [at.path for at in modules if at.quantized])
    owners: dict[int, Place] = {}
    for at in modules:
        tensors: dict[str, Any] = {}
        for name, like in at.written.items():
            live = at.module._parameters.get(name)
            staged = at.staged and like is not live
            place = None if live is None else owners.get(id(live))
            if place is None:
                place = Place(at.module, name, empty(like.shape, like.dtype) if staged else like.data, staged)
                places.by_name[at.named(name)] = place
                if live is not None:
                    owners[id(live)] = place
            # Tied: one entry, under the first name, as `named_parameters` has it.
            elif staged and not place.staged:
                raise RefusedError(
                    f"`{at.named(name)}` is packed, and what it is tied to is not: serve it unquantised", tensors=[at.named(name)]
                )
            if staged:
                tensors[name] = place.tensor
        if tensors:
            places.processed.append((at.path, at.module, tensors))
    return places


def _look(
    path: str, module: Any, device: str, before: Mapping[str, Any] | None, layers: list[dict[str, Any]]
) -> _Module | None:
    """What is written of a module; what is to be checked about it goes into `layers`."""
    live = {name: value for name, value in module._parameters.items() if value is not None}
    if before is not None:
        # What is not loaded is derived.
        live = {name: value for name, value in live.items() if name in before}
    loads = written_as(before or {})
    found = _Module(path, module, live, staged=False, quantized=loads != "load_time")
    changed = [name for name, like in (before or {}).items() if not _same(live.get(name), like)]
    if not live and not changed:
        return None
    method = method_of(module)
    if method:
        layer: dict[str, Any] = {"name": path, "quant_method": method, "kernel": kernel_of(module)}
        layers.append(layer)
        keeps = layouts.keeps(layer, device)  # type: ignore[arg-type]
        # A wrapper's own way to process weights is none.
        if before and not (keeps and not changed) and _method(module) is module.quant_method:
            layer["written"] = loads
            found.staged, found.written = True, dict(before)
            return found
    emptied = [name for name, value in live.items() if before is None and not value.numel()]
    for name in changed:
        raise RefusedError(
            f"`{found.named(name)}` is not what was loaded, and vLLM does not process it anew: start the engine without what "
            f"changes it ({type(getattr(module, 'quant_method', module)).__name__})",
            tensors=[found.named(name)],
        )
    for name in emptied:
        raise RefusedError(
            f"`{found.named(name)}` was emptied when it was loaded, and vLLM does not remember its shape: use vLLM 0.25 or "
            "later, and a loader that reads a checkpoint",
            tensors=[found.named(name)],
        )
    return found


def _same(live: Any, like: Any) -> bool:
    if live is None:
        return False
    try:
        return tuple(live.shape) == tuple(like.shape) and bool(live.dtype == like.dtype)
    except RuntimeError:  # One that has no shape before something is loaded.
        return False


#: What a checkpoint of a model in 16 or 32 bit has.
_PLAIN = {"float32", "bfloat16", "float16"}


def written_as(before: Mapping[str, Any]) -> str:
    """What load-time tensors are: the model's own, blockwise FP8, or something else."""
    dtypes = {str(like.dtype).removeprefix("torch.") for like in before.values()}
    if dtypes <= _PLAIN:
        return "load_time"
    blocks = any(name.endswith("_scale_inv") for name in before)
    return "load_time_blocks" if blocks and dtypes <= {*_PLAIN, "float8_e4m3fn"} else "load_time_quantized"
