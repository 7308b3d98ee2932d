"""The norm of these models."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import rms_norm


def normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """In f32, as the kernels do."""
    return rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def ones(size: int, *, sequence_parallel: bool, zero_centered_gamma: bool, **of: Any) -> torch.nn.Parameter:
    if zero_centered_gamma:
        raise NotImplementedError("weights of norms that count from zero")
    made = torch.nn.Parameter(torch.ones(size, **of))
    # Whoever finalises gradients adds up those of the parts of a sequence.
    made.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
    return made


class RMSNorm(torch.nn.Module):
    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = ones(
            normalized_shape,
            sequence_parallel=sequence_parallel,
            zero_centered_gamma=zero_centered_gamma,
            dtype=params_dtype,
            device=device,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalize(x, self.weight, self.eps)
