"""A name that Megatron-Bridge writes in a signature: its adapters are fused from operations, which are not there."""

from __future__ import annotations


class Sequential: ...
