"""Fused kernels that Megatron-Core imports: it takes `None` for their not being there."""

from __future__ import annotations

fused_topk_with_score_function = None
fused_compute_score_for_moe_aux_loss = None
fused_moe_aux_loss = None
