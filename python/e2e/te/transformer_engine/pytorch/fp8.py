"""Names that Megatron-Core imports, and uses with quantisation only."""

from __future__ import annotations

import contextlib


class FP8GlobalStateManager:
    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return False


fp8_autocast = fp8_model_init = contextlib.nullcontext
