"""What one rank holds, as a `Layout`: how Megatron-Core and vLLM lay models out, boxes of tensors, and your own bands."""

from __future__ import annotations

from ._core import Layout, bands, check_engine, keeps, megatron, shards, vllm

__all__ = ["Layout", "bands", "check_engine", "keeps", "megatron", "shards", "vllm"]
