"""Stands in for Transformer Engine on a machine without a GPU, where the real one cannot be imported.

It is what Megatron-Core's own subclasses of Transformer Engine's modules (`megatron/core/extensions/transformer_engine.py`)
stand on: modules with the same parameters, of the same names, shapes and attributes, that compute the same, forward and
backward, in plain torch. So a trainer has the module tree, the names and the code of Megatron-Core that it has with the real one.

It is not Transformer Engine: nothing is fused, overlapped or quantised, and what no model of this test needs is missing or
refused. What the real modules allocate was read in their source; that they do is not proved by anything that runs on this.
"""

from __future__ import annotations

from . import common, pytorch

#: The release whose interface this has. Megatron-Core asks for it, and calls accordingly.
__version__ = "2.14.0"

__all__ = ["common", "pytorch"]
