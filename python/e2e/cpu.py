"""Lets Megatron-Core train on a machine without a GPU.

It names the device `cuda` in a few places and looks for CUDA's random numbers. Nothing that it computes changes: its modules,
process groups (gloo), schedules, distributed data parallelism and distributed optimizer run as they are.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class OnCpu(TorchFunctionMode):
    """Tensors that were asked for on `cuda` are made on the host, and say that they are what was asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The distributed optimizer sorts parameters by this name.
            return func(*args).replace("torch.", "torch.cuda.")
        if func is torch.Tensor.cuda:
            return args[0]
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Stream:
    """The host's only one: whatever was begun on it is done."""

    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...


def enter() -> None:
    """For the rest of this process."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.Stream = Stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda *_: Stream()  # type: ignore[assignment,return-value]
    torch.cuda.default_stream = torch.cuda.current_stream
    torch.cuda.stream = lambda _: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    # Without dropout no random number is drawn in a forward pass.
    CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    OnCpu().__enter__()
