"""Records what an engine's own loader copies into its parameters, for `refit plan --target-bands`.

    with torch.device("meta"):
        model = ...                                   # the engine's own model class, one rank of it
    capture = Capture(dict(model.named_parameters()))
    weights = [(name, capture.checkpoint(name, shape, dtype)) for name, shape, dtype in checkpoint]
    with capture, torch.no_grad():
        model.load_weights(iter(weights))             # the engine's own loader; nothing is moved
    json.dump(capture.document(rank), open(f"rank{rank}.json", "w"))

`checkpoint` is what the trainer's side calls the logical tensors: names, shapes and types of a Hugging Face checkpoint.
A loader that does anything else than copy views of them (arithmetic, `cat`, `contiguous` of a transpose) is refused
with the parameter's name. docs/bands.md describes the format.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def storage(tensor):
    """What all views of a tensor share."""
    return tensor.untyped_storage()._cdata


def strided(tensor):
    return {
        "offset": tensor.storage_offset(),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
    }


class Capture(TorchDispatchMode):
    def __init__(self, params):
        super().__init__()
        self.params = params
        self.owners = {storage(param): name for name, param in params.items()}
        self.entries = {
            name: {"dtype": DTYPES[param.dtype], "shape": list(param.shape), "copies": [], "fill": []}
            for name, param in params.items()
        }
        self.tensors, self.names = {}, {}

    def checkpoint(self, name, shape, dtype):
        """A tensor of the checkpoint, to be given to the loader."""
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        self.tensors[name] = tensor  # kept: the storage of one that is gone may become another's
        self.names[storage(tensor)] = name
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        into = args[0] if args and isinstance(args[0], torch.Tensor) else None
        param = None if into is None else self.owners.get(storage(into))
        if param is not None and func._schema.is_mutable:
            self.record(param, func, into, args[1:])
        return func(*args, **(kwargs or {}))

    def record(self, param, func, into, rest):
        entry = self.entries[param]
        aten = torch.ops.aten
        if func is aten.copy_.default:
            name = self.names.get(storage(rest[0]))
            if name is None or rest[0].element_size() != self.tensors[name].element_size():
                raise NotImplementedError(f"`{param}` gets values that no view of a checkpoint tensor has")
            entry["copies"].append({"tensor": name, "from": strided(rest[0]), "to": strided(into)})
        elif func is aten.zero_.default or (func is aten.fill_.Scalar and rest[0] == 0):
            entry["fill"].append(strided(into))
        else:
            raise NotImplementedError(f"`{param}` is changed by {func}, which is not a copy")

    def document(self, rank):
        used = {copy["tensor"] for entry in self.entries.values() for copy in entry["copies"]}
        return {
            "schema": 1,
            "side": "target",
            "tensors": {name: list(tensor.shape) for name, tensor in self.tensors.items() if name in used},
            "ranks": [{"rank": rank, "params": self.entries}],
        }
