from __future__ import annotations

from . import distributed, fp8, ops, router, tensor
from .attention import DotProductAttention
from .linear import GroupedLinear, LayerNormLinear, Linear
from .norm import RMSNorm

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8",
    "ops",
    "router",
    "tensor",
]
