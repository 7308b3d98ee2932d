"""What Megatron-Core imports for dropout and for activations that are computed twice, and uses with these only."""

from __future__ import annotations

import contextlib
from typing import Any


class CudaRNGStatesTracker:
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.states: dict[str, Any] = {}

    def set_states(self, states: dict[str, Any]) -> None:
        self.states = states

    def add(self, name: str, seed: int) -> None:
        self.states[name] = seed


def activation_recompute_forward(**phase: bool) -> contextlib.AbstractContextManager[None]:
    """Marks one of the two, for quantisation."""
    return contextlib.nullcontext()
