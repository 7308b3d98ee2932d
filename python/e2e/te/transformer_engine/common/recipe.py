"""Names that Megatron-Core imports or derives from, and uses with quantisation only."""

from __future__ import annotations


class DelayedScaling: ...
