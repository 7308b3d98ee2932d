"""Moves a training step's weights from the ranks of a trainer into the ranks of an inference engine.

A trainer's rank makes a `Source` of its parameters, an engine's rank a `Target` of its own; what each of them holds is a
`Layout`, from `refit_rl.layouts`. The first refresh plans and registers, every later one only moves bytes. torch is not needed
to import this.
"""

from __future__ import annotations

from . import errors, layouts, types
from ._core import FEATURES, Layout, Source, Target, __version__, nixl_library
from .errors import RefitError

__all__ = [
    "FEATURES",
    "Layout",
    "RefitError",
    "Source",
    "Target",
    "__version__",
    "errors",
    "layouts",
    "nixl_library",
    "types",
]
