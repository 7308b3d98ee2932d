"""What a CUDA graph goes on with behind a refit. Where there is no torch or no GPU this says so; `REFIT_REQUIRE_CUDA=1` makes that a
failure.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from refit_rl.errors import EngineError
from refit_rl.vllm.graphs import Captured


def test_a_captured_graph_goes_on_with_the_scales_of_a_kernel_that_was_made_anew() -> None:
    required = bool(os.environ.get("REFIT_REQUIRE_CUDA"))
    torch: Any = __import__("torch") if required else pytest.importorskip("torch", reason="torch is not installed")
    if not required and not torch.cuda.is_available():
        pytest.skip("no GPU")

    class Layer(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, weight: Any) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
            self.process()

        def process(self) -> None:
            # A scale that is no parameter, as kernels of experts keep it.
            self.kernel = {"scales": (self.weight.abs().amax().reshape(1),)}

        def forward(self, x: Any) -> Any:
            return x @ self.weight.t() * self.kernel["scales"][0]

    weights = [torch.randn(256, 128, device="cuda") * (number + 1) for number in range(4)]
    x = torch.randn(8, 128, device="cuda")
    layer = Layer(weights[0])
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    captured = Captured([("layer", layer)], torch.is_tensor)
    for weight in weights[1:]:
        layer.weight.data.copy_(weight)
        layer.process()
        # What nobody keeps is somebody else's by then.
        others = [torch.full((1,), float("nan"), device="cuda") for _ in range(64)]
        graph.replay()
        assert not torch.equal(out, layer(x))
        captured.refill()
        graph.replay()
        assert torch.equal(out, layer(x))
        del others
    layer.kernel["scales"] = (torch.ones(2, device="cuda"),)
    with pytest.raises(EngineError, match="enforce_eager"):
        captured.refill()
