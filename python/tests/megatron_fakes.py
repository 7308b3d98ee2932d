"""Modules and tensors as Megatron-Core's look from outside, so that neither it nor torch is needed; and golden cases of real ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parents[2] / "tests/golden/models"
#: safetensors' names, torch's, and raw numbers of that size.
DTYPES = {
    "BF16": ("torch.bfloat16", np.uint16),
    "F32": ("torch.float32", np.float32),
    "F16": ("torch.float16", np.float16),
}


class Tensor:
    """What refit asks of a torch tensor."""

    device = SimpleNamespace(type="cpu", index=None)

    def __init__(self, array: np.ndarray, dtype: str = "torch.float32") -> None:
        self.array, self.dtype, self.shape = array, dtype, array.shape

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def numel(self) -> int:
        return self.array.size

    def element_size(self) -> int:
        return self.array.itemsize

    def is_contiguous(self) -> bool:
        return bool(self.array.flags.c_contiguous)

    def detach(self) -> Tensor:
        return Tensor(self.array, self.dtype)

    def clone(self) -> Tensor:
        return Tensor(self.array.copy(), self.dtype)

    def copy_(self, other: Tensor) -> None:
        self.array[...] = other.array


class Parameter(Tensor):
    pass


class Module:
    """A module with children by name; those of numbers are a list's."""

    def __init__(self, **attributes: Any) -> None:
        self.children: dict[str, Module] = {}
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        for held in ("buffers", "parameters", "children"):
            if name in self.__dict__.get(held, {}):
                return self.__dict__[held][name]
        raise AttributeError(name)

    def __iter__(self) -> Iterator[Module]:
        return iter(self.children.values())

    def child(self, name: str) -> Module:
        return self.children.setdefault(name, Module())

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        yield prefix, self
        for name, child in self.children.items():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
        for path, module in self.named_modules() if recurse else [("", self)]:
            for name, tensor in module.parameters.items():
                yield (f"{path}.{name}" if path else name), tensor

    def named_buffers(self, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
        assert not recurse
        yield from self.buffers.items()


class Group:
    """A process group."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = lambda: rank, lambda: size


def model(tensors: dict[str, Tensor], layers: list[int], groups: dict[str, tuple[int, int]] | None = None) -> Module:
    """The module tree of these names; `layers` are the numbers, from 0, that its layers have in the whole model."""
    root = Module(config=SimpleNamespace())
    listed = root.child("decoder").child("layers")
    for local, number in enumerate(layers):
        listed.child(str(local)).layer_number = number + 1
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            at = at.child(part)
        (at.buffers if last == "expert_bias" else at.parameters)[last] = tensor
    root.pg_collection = SimpleNamespace(**{name: Group(*at) for name, at in (groups or {}).items()})
    return root


class Case:
    """A golden case: what real ranks of both frameworks held."""

    def __init__(self, name: str) -> None:
        self.folder = GOLDEN / name
        self.case = json.loads((self.folder / "case.json").read_text())
        self.config = json.loads((self.folder / "config.json").read_text())
        self.source, self.target = self.case["source"], self.case["target"]

    def tensors(self, rank: dict[str, Any]) -> dict[str, Tensor]:
        """What a rank's file holds."""
        data = (self.folder / rank["file"]).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        found = {}
        for name, entry in json.loads(data[8:end]).items():
            if name == "__metadata__":
                continue
            dtype, raw = DTYPES[entry["dtype"]]
            begin, stop = entry["data_offsets"]
            array = np.frombuffer(data[end + begin : end + stop], raw).reshape(entry["shape"]).copy()
            found[name] = Parameter(array, dtype)
        return found

    def groups(self, rank: dict[str, Any]) -> dict[str, tuple[int, int]]:
        fields = {"tp": "tp", "pp": "pp", "ep": "ep", "expt_tp": "etp"}
        return {field: (rank[name], self.source[name]) for field, name in fields.items()}

    def module(self, rank: dict[str, Any]) -> Module:
        return model(self.tensors(rank), rank["layers"], self.groups(rank))
