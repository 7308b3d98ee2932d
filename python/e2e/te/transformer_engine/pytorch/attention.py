"""Attention of a causal decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


class DotProductAttention(torch.nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        attention_dropout: float = 0.0,
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        **options: Any,
    ) -> None:
        super().__init__()
        if attention_dropout or softmax_type != "vanilla" or "window_size" in options or "cp_group" in options:
            raise NotImplementedError("attention with dropout, sinks, a window or context parallelism")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: str = "causal",
        **options: Any,
    ) -> torch.Tensor:
        """Of tensors `[sequence, batch, head, channel]`."""
        if attn_mask_type != "causal" or options:
            raise NotImplementedError(f"attention {attn_mask_type} {options}")
        q, k, v = (it.permute(1, 2, 0, 3) for it in (query, key, value))
        done = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
        return done.permute(2, 0, 1, 3).flatten(2)
