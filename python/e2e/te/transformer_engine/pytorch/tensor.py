"""The base of quantised tensors: no tensor here is one."""

from __future__ import annotations


class QuantizedTensor: ...
