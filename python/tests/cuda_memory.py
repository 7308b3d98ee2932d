"""Tensors in the memory of a GPU without torch: as much of the driver, and of a torch tensor, as tests need."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np


class Driver:
    """The driver and its first GPU."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        if count.value == 0:
            raise OSError("there is no GPU")
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            raise OSError(f"{name} failed with {code}")


class Tensor:
    """A float32 tensor, which says of itself what torch's says."""

    def __init__(self, driver: Driver, values: np.ndarray) -> None:
        self.driver, self.shape = driver, values.shape
        self.device = type("device", (), {"type": "cuda", "index": 0})()
        self.dtype = "torch.float32"
        self.pointer = ctypes.c_uint64()
        driver.call("cuMemAlloc_v2", ctypes.byref(self.pointer), ctypes.c_size_t(values.nbytes))
        self.write(values)

    def write(self, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, np.float32)
        data = ctypes.c_void_p(values.ctypes.data)
        self.driver.call("cuMemcpyHtoD_v2", self.pointer, data, ctypes.c_size_t(values.nbytes))

    def read(self) -> np.ndarray:
        values = np.empty(self.shape, np.float32)
        data = ctypes.c_void_p(values.ctypes.data)
        self.driver.call("cuMemcpyDtoH_v2", data, self.pointer, ctypes.c_size_t(values.nbytes))
        return values

    def data_ptr(self) -> int:
        return self.pointer.value

    def is_contiguous(self) -> bool:
        return True

    def element_size(self) -> int:
        return 4

    def numel(self) -> int:
        return int(np.prod(self.shape))
