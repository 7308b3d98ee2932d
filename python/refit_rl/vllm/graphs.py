"""What a captured CUDA graph reads of a module, beside what vLLM's reload keeps in place.

A graph reads the addresses that it was captured with. Processing a module anew makes its kernel anew as well, and with it scales,
strides and workspaces that are no parameters: the graph goes on reading the old ones, which nobody keeps. So they are kept here, and
filled with what the new ones hold.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import EngineError

#: Of torch's own and of vLLM's settings nothing is a kernel's.
_PASSED_OVER = ("torch.", "vllm.config", "vllm.distributed", "vllm.platforms", "logging", "threading", "enum")
#: What makes up a module of torch. Its children are modules of their own.
_MACHINERY = {"_modules", "_non_persistent_buffers_set", "training"}
_DEEPEST = 12


class Captured:
    """Tensors of some modules as they are now. Make it behind the capture of graphs, and call `refill` behind every refit.

    Args:
        modules: by name.
        is_tensor: whether a value is one.
    """

    def __init__(self, modules: Iterable[tuple[str, Any]], is_tensor: Callable[[Any], bool]) -> None:
        self._modules = list(modules)
        self._is_tensor = is_tensor
        self._before = {path: tensor.detach() for path, tensor in self._found()}

    def refill(self) -> None:
        """Has the tensors hold what stands in their places now.

        Raises:
            EngineError: nothing stands there any more, or something of another shape.
        """
        after = dict(self._found())
        for path, old in self._before.items():
            new = after.get(path)
            if new is None or (new.shape, new.dtype, new.stride()) != (old.shape, old.dtype, old.stride()):
                raise EngineError(
                    f"the kernel of `{path}` is not what CUDA graphs were captured with, so they would go on with old "
                    "weights: start the engine with enforce_eager=True, or with another backend",
                    tensors=[path],
                )
            if new.data_ptr() != old.data_ptr():
                old.copy_(new)

    def _found(self) -> Iterator[tuple[str, Any]]:
        # What looks after weights may be a module itself, without any of its own.
        roots = [
            (f"{name}{path}", root)
            for name, module in self._modules
            for path, root in (("", module), (".quant_method", getattr(module, "quant_method", None)))
            if root is not None
        ]
        seen = {id(root) for _, root in roots}
        for name, root in roots:
            for key, value in vars(root).items():
                if key not in _MACHINERY and not key.endswith("_hooks"):
                    yield from self._within(f"{name}.{key}", value, seen, 0)

    def _within(self, path: str, value: Any, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
        """Every tensor that can be reached, by how it is."""
        if self._is_tensor(value):
            # A tensor may be reached in several ways, now or then, so each is one of its own.
            yield path, value
            return
        if depth == _DEEPEST or id(value) in seen:
            return
        children = list(_children(value))
        if children:
            seen.add(id(value))
        for key, child in children:
            yield from self._within(f"{path}.{key}", child, seen, depth + 1)


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((str(key), child) for key, child in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(number), child) for number, child in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield "self", value.__self__
    elif isinstance(value, types.FunctionType):
        for number, cell in enumerate(value.__closure__ or ()):
            try:
                yield f"closure{number}", cell.cell_contents
            except ValueError:  # Not filled yet.
                continue
    elif not isinstance(value, type) and not type(value).__module__.startswith(_PASSED_OVER):
        # Another module's tensors are that one's.
        if not hasattr(value, "_parameters"):
            yield from getattr(value, "__dict__", {}).items()
            for owner in type(value).__mro__:
                slots = owner.__dict__.get("__slots__", ())
                for name in (slots,) if isinstance(slots, str) else slots:
                    if hasattr(value, name):
                        yield name, getattr(value, name)
