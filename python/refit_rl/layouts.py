"""What one rank holds, as a `Layout`: how Megatron-Core and vLLM lay models out, boxes of tensors, and your own bands."""

from __future__ import annotations

from ._core import Layout, bands, megatron, shards, vllm

__all__ = ["Layout", "bands", "megatron", "shards", "vllm"]
