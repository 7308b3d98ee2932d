"""Which objects are tensors, and what is said of those that are not."""

from __future__ import annotations

import ctypes
import gc
import weakref

import numpy as np
import pytest

from refit_rl import Source, Target, errors, layouts


def layout(dtype: str = "float32", rows: int = 4, side: str = "source") -> layouts.Layout:
    return layouts.shards({"w": ((rows, 2), dtype, (0, 0), (rows, 2))}, rank=0, side=side)


def source(store: str, tensors: dict[str, object], of: layouts.Layout | None = None) -> Source:
    return Source(store, of or layout(), tensors, model="m")


def test_a_missing_and_a_stray_tensor_are_named(store: str) -> None:
    with pytest.raises(errors.TensorError, match="no tensor was given for `w`") as caught:
        source(store, {})
    assert (caught.value.tensors, caught.value.ranks) == (("w",), (0,))
    with pytest.raises(errors.TensorError, match="`v`, which the layout does not have") as caught:
        source(store, {"w": np.zeros((4, 2), np.float32), "v": np.zeros(1)})
    assert caught.value.tensors == ("v",)


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        (np.zeros((4, 2), np.float64), "dtype float64, its layout says F32"),
        (np.zeros((5, 2), np.float32), "40 bytes, its layout says 32"),
        (np.zeros((4, 4), np.float32)[:, ::2], "not contiguous"),
        (np.zeros((2, 4), np.float32).T, "not contiguous"),
        ([[0.0, 0.0]] * 4, "is a list"),
        (None, "is a NoneType"),
    ],
)
def test_what_cannot_be_read_in_place_is_refused(store: str, tensor: object, part: str) -> None:
    with pytest.raises(errors.TensorError, match=part) as caught:
        source(store, {"w": tensor})
    assert caught.value.tensors == ("w",)


def test_what_cannot_be_written_is_refused_by_targets_only(store: str) -> None:
    frozen = np.zeros((4, 2), np.float32)
    frozen.flags.writeable = False
    source(store, {"w": frozen}).close()
    with pytest.raises(errors.TensorError, match="read-only"):
        Target(store, layout(side="target"), {"w": frozen}, model="m")


def test_raw_numbers_may_be_anybodys_data(store: str) -> None:
    source(store, {"w": np.zeros((4, 2), np.uint16)}, layout("bfloat16")).close()
    ml_dtypes = pytest.importorskip("ml_dtypes")
    source(store, {"w": np.zeros((4, 2), ml_dtypes.bfloat16)}, layout("bfloat16")).close()


def test_tensors_that_share_memory_are_refused(store: str) -> None:
    both = layouts.shards({name: ((4, 2), "float32", (0, 0), (4, 2)) for name in "ab"}, rank=0)
    base = np.zeros((7, 2), np.float32)
    with pytest.raises(errors.TensorError, match="share memory") as caught:
        source(store, {"a": base[:4], "b": base[3:]}, both)
    assert set(caught.value.tensors) == {"a", "b"}


def test_a_tensor_lives_as_long_as_its_source(store: str) -> None:
    class Array(np.ndarray):
        pass

    tensor = np.zeros((4, 2), np.float32).view(Array)
    gone = weakref.ref(tensor)
    held = source(store, {"w": tensor})
    del tensor
    gc.collect()
    assert gone() is not None
    held.close()
    gc.collect()
    assert gone() is None


class OnlyDlpack:
    """A framework that speaks DLPack and nothing else."""

    def __init__(self, tensor: np.ndarray) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: object) -> object:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()


def test_dlpack_does_too(store: str) -> None:
    held = np.arange(8, dtype=np.float32).reshape(4, 2)
    into = np.zeros((4, 2), np.float32)
    with source(store, {"w": OnlyDlpack(held)}) as there:
        with Target(store, layout(side="target"), {"w": OnlyDlpack(into)}, model="m") as here:
            there.publish(1)
            here.refresh(1)
    assert (into == held).all()
    for tensor, part in [(held.astype(np.float64), "float64"), (held.T, "not contiguous")]:
        with pytest.raises(errors.TensorError, match=part):
            source(store, {"w": OnlyDlpack(tensor)})


class LikeTorch:
    """As much of a torch tensor as is asked for; on a device that need not be there."""

    def __init__(self, buffer: ctypes.Array, device: str = "cpu", contiguous: bool = True) -> None:
        self.buffer = buffer
        self.device = type("device", (), {"type": device, "index": None})()
        self.dtype = type("dtype", (), {"__str__": lambda _: "torch.bfloat16"})()
        self.contiguous = contiguous

    def data_ptr(self) -> int:
        return ctypes.addressof(self.buffer)

    def is_contiguous(self) -> bool:
        return self.contiguous

    def element_size(self) -> int:
        return 2

    def numel(self) -> int:
        return len(self.buffer) // 2


def test_torch_tensors_are_read_without_torch(store: str) -> None:
    held = (ctypes.c_char * 16)(*b"0123456789abcdef")
    into = (ctypes.c_char * 16)()
    with source(store, {"w": LikeTorch(held)}, layout("bfloat16")) as there:
        of = layout("bfloat16", side="target")
        with Target(store, of, {"w": LikeTorch(into)}, model="m", mode="direct") as here:
            there.publish(1)
            here.refresh()
    assert into.raw == held.raw
    with pytest.raises(errors.TensorError, match="not contiguous"):
        source(store, {"w": LikeTorch(held, contiguous=False)}, layout("bfloat16"))
    with pytest.raises(errors.TensorError, match="device `xla`"):
        source(store, {"w": LikeTorch(held, device="xla")}, layout("bfloat16"))
    sharded = LikeTorch(held)
    sharded.placements = ()
    with pytest.raises(errors.TensorError, match="to_local"):
        source(store, {"w": sharded}, layout("bfloat16"))


def test_no_method_takes_or_gives_an_address(store: str) -> None:
    with pytest.raises(errors.TensorError, match="is a int"):
        source(store, {"w": 12345})
