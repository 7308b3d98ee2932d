"""The layout of any vLLM model, taken from its own loader. Nothing is loaded and nothing moved: the model's parameters are
replaced by tensors without storage for the time of one `load_weights`, whose copies are written down.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LayoutError
from .places import Loaded

#: A safetensors header may say that it is longer than anything a model needs.
_LONGEST_HEADER = 100 << 20

_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
}

#: Name, shape and safetensors' name of the dtype.
Checkpoint = list[tuple[str, tuple[int, ...], str]]


def checkpoint_of(folder: str | Path) -> Checkpoint:
    """Every tensor of a folder of safetensors, from the headers alone.

    Raises:
        ConfigError: no such folder, or files that are not safetensors.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{folder} has no *.safetensors, and a capture needs the names of a checkpoint: "
            'say "checkpoint": FOLDER in init_info'
        )
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        try:
            with open(file, "rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                if length > _LONGEST_HEADER:
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(opened.read(length))
            for name, of in header.items():
                if name != "__metadata__":
                    found[name] = tuple(of["shape"]), of["dtype"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ConfigError(f"{file} is not a safetensors file: {error}") from error
    return [(name, shape, dtype) for name, (shape, dtype) in sorted(found.items())]


def capture(model: Any, checkpoint: Checkpoint, loaded: Loaded, *, rank: int) -> dict[str, Any]:
    """The document (docs/bands.md) of one rank of an engine that stands still.

    Args:
        loaded: of a module, its parameters as a checkpoint is loaded into them.

    Raises:
        LayoutError: a loader that does more than copy, or a parameter that the checkpoint does not fill.
    """
    import torch

    from .recorder import Capture

    with emptied(model, loaded) as params:
        recorder = Capture(params)
        weights = []
        for name, shape, dtype in checkpoint:
            if dtype not in _TORCH_NAMES:
                raise LayoutError(f"`{name}` of the checkpoint is {dtype}, which bands cannot say", tensors=[name])
            weights.append((name, recorder.checkpoint(name, shape, getattr(torch, _TORCH_NAMES[dtype]))))
        try:
            with recorder, torch.no_grad():
                model.load_weights(iter(weights))
        except (NotImplementedError, RuntimeError) as error:
            raise LayoutError(
                f"the engine's loader of this model does more than copy, so it cannot be captured: {error}"
            ) from error
        for name, entry in recorder.entries.items():
            if not entry["copies"]:
                raise LayoutError(f"the checkpoint has nothing for the engine's `{name}`", tensors=[name])
        _pad(recorder.entries)
        return recorder.document(rank)


def _pad(entries: dict[str, Any]) -> None:
    """Rows behind the last one that a loader writes are padding of the vocabulary, which vLLM sets to zero when it makes it."""
    for entry in entries.values():
        shape = entry["shape"]
        columns = 1
        for size in shape[1:]:
            columns *= size
        whole = [
            copy["to"]
            for copy in entry["copies"]
            if copy["to"]["shape"][1:] == shape[1:] and _is_contiguous(copy["to"]) and copy["to"]["offset"] % columns == 0
        ]
        if len(whole) != len(entry["copies"]) or entry["fill"]:
            continue
        end = max(to["offset"] + to["shape"][0] * columns for to in whole)
        written = sum(to["shape"][0] * columns for to in whole)
        total = shape[0] * columns
        if written == end < total:
            entry["fill"].append({"offset": end, "shape": [total - end], "stride": [1]})


def _is_contiguous(strided: dict[str, Any]) -> bool:
    expected = 1
    for size, stride in zip(reversed(strided["shape"]), reversed(strided["stride"]), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


@contextmanager
def emptied(model: Any, loaded: Loaded) -> Iterator[dict[str, Any]]:
    """The model with parameters on the meta device, as they are loaded into; what it had is put back whatever happens."""
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor

    before = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    made: dict[int, Any] = {}
    try:
        for module, params, buffers in before:
            as_loaded = loaded(module)
            for name, like in (params if as_loaded is None else as_loaded).items():
                if like is None:
                    continue
                # Tied parameters stay so.
                live = params.get(name)
                key = id(like if live is None else live)
                if key not in made:
                    made[key] = like if like.is_meta else to_meta_tensor(like)
                module._parameters[name] = made[key]
            if as_loaded is not None:
                for name in params.keys() - as_loaded.keys():
                    module._parameters[name] = None
            for name, buffer in buffers.items():
                if buffer is not None:
                    module._buffers[name] = to_meta_tensor(buffer)
        yield dict(model.named_parameters())
    finally:
        for module, params, buffers in before:
            module._parameters.clear()
            module._parameters.update(params)
            module._buffers.clear()
            module._buffers.update(buffers)
