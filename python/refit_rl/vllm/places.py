"""Where each parameter of an engine is written: in place, or beside it, to be processed as if it had been loaded.

What vLLM does with a parameter behind loading shows neither in its name nor, with some kernels, in its shape. So every
module is looked at: what is known to keep what was loaded is *live*; what is known to be processed, and how to do that again, is
*staged*; the rest is live for the checks of `layouts.vllm`, which refuse it with what to change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    facts: dict[str, Any]

    @property
    def staged_modules(self) -> list[tuple[Any, dict[str, Any]]]:
        """Each module with something staged, and its tensors by their own names."""
        found: dict[int, tuple[Any, dict[str, Any]]] = {}
        for place in self.by_name.values():
            if place.staged:
                found.setdefault(id(place.module), (place.module, {}))[1][place.name] = place.tensor
        return list(found.values())


def method_of(module: Any) -> str:
    """The class of a module's `quant_method`; empty where it has none."""
    method = getattr(module, "quant_method", None)
    return "" if method is None else type(method).__name__


def kernel_of(module: Any) -> str | None:
    """The kernel that the method chose, by name."""
    method = getattr(module, "quant_method", None)
    for attribute in ("unquantized_backend", "fp8_backend"):
        backend = getattr(method, attribute, None)
        if backend is not None:
            return str(getattr(backend, "name", backend))
    linear = getattr(method, "fp8_linear", None)
    return None if linear is None else type(linear).__name__


def processed_on_cpu(module: Any) -> bool:
    """Whether a CPU engine packs what this module has loaded, and is known to do so again when it is asked to."""
    method = method_of(module)
    if method == "UnquantizedFusedMoEMethod":
        return (kernel_of(module) or "").upper() == "CPU"
    # Heads keep their weight and a packed copy of it, which is what is computed with.
    return method in ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")


def find(model: Any, device: str, loaded: Any, empty: Any) -> Places:
    """Looks at every module of a model.

    Args:
        device: `cpu`, `cuda`, `rocm` or `xpu`.
        loaded: of a module, its parameters as a checkpoint is loaded into them: tensors without storage, by name.
        empty: makes a tensor like one of these (`shape`, `dtype`), on the engine's device.

    Raises:
        RefusedError: a module with parameters that vLLM does not remember the load-time shape of.
    """
    by_name: dict[str, Place] = {}
    layers: list[dict[str, Any]] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        staged = device == "cpu" and processed_on_cpu(module)
        method = method_of(module)
        if method and not staged and any(value is not None for value in module._parameters.values()):
            layers.append({"name": path, "quant_method": method, "kernel": kernel_of(module)})
        before = loaded(module) if staged else {}
        for name, live in module._parameters.items():
            if live is None or id(live) in seen:
                # Tied: one entry, under the first name, as `named_parameters` has it.
                continue
            seen.add(id(live))
            full = f"{path}.{name}" if path else name
            if not staged:
                by_name[full] = Place(module, name, live.data, staged=False)
                continue
            like = before.get(name)
            if like is None and name == "bias" and "weight" in before:
                # Not remembered, because it is made behind the weight; and a CPU may keep it in f32.
                by_name[full] = Place(module, name, empty(live.shape, before["weight"].dtype), staged=True)
            elif like is None and live.numel():
                by_name[full] = Place(module, name, empty(live.shape, live.dtype), staged=True)
            elif like is None:
                raise RefusedError(
                    f"`{full}` was emptied when it was loaded, and vLLM does not remember its shape: use vLLM 0.25 or later",
                    tensors=[full],
                )
            else:
                by_name[full] = Place(module, name, empty(like.shape, like.dtype), staged=True)
    # Of what is staged, kernels do not matter; of the rest, each is checked.
    facts = {"device": device, "load_time": device == "cpu" and not layers, "layers": layers}
    return Places(by_name, facts)
