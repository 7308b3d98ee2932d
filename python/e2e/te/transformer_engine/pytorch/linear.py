"""Linear layers: alone, behind a norm, and one for each expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from .norm import normalize, ones


def _cut(tensor: torch.Tensor, dim: int) -> None:
    """What Megatron-Core reads of a parameter that is cut."""
    for name, value in {"tensor_model_parallel": True, "partition_dim": dim, "partition_stride": 1}.items():
        setattr(tensor, name, value)


class Linear(torch.nn.Module):
    """Its weight is cut by rows (`column`), by columns (`row`) or not at all. Megatron-Core's own collectives join the
    activations."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        init_method: Callable[[torch.Tensor], Any] = torch.nn.init.normal_,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        params_dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
        **of_kernels: Any,
    ) -> None:
        super().__init__()
        if fuse_wgrad_accumulation:
            raise NotImplementedError("gradients that a kernel adds up")
        if bias and parallel_mode != "column":
            raise NotImplementedError("biases that are not cut")
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.parallel_mode, self.tp_group, self.tp_size = parallel_mode, tp_group, tp_size
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.use_bias, self.return_bias = bias, return_bias
        self._allocate(init_method, dtype=params_dtype, device=device)

    def _allocate(self, init_method: Callable[[torch.Tensor], Any], **of: Any) -> None:
        self._add_weight("weight", init_method, **of)
        self.bias = torch.nn.Parameter(torch.zeros(self.out_features, **of)) if self.use_bias else None
        if self.bias is not None:
            _cut(self.bias, 0)

    def _add_weight(self, name: str, init_method: Callable[[torch.Tensor], Any], **of: Any) -> None:
        weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, **of))
        with torch.no_grad():
            init_method(weight)
        _cut(weight, 1 if self.parallel_mode == "row" else 0)
        self.register_parameter(name, weight)

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        y = self._joined(linear(self._spread(x), self.weight, None if self.return_bias else self.bias))
        return (y, self.bias) if self.return_bias else y

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        """The whole of what a weight that is cut by rows is multiplied with."""
        if self.parallel_mode != "column" or self.tp_size == 1:
            return x
        from megatron.core.tensor_parallel import mappings

        if self.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
        return mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def _joined(self, y: torch.Tensor) -> torch.Tensor:
        """The sum of what ranks have whose weights are cut by columns."""
        if self.parallel_mode != "row" or self.tp_size == 1:
            return y
        from megatron.core.tensor_parallel import mappings

        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(y, group=self.tp_group)


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        return_layernorm_output: bool = False,
        **options: Any,
    ) -> None:
        if normalization != "RMSNorm" or return_layernorm_output:
            raise NotImplementedError(f"{normalization} before a linear layer, return_layernorm_output")
        self.zero_centered_gamma = zero_centered_gamma
        super().__init__(in_features, out_features, **options)
        self.eps = eps

    def _allocate(self, init_method: Callable[[torch.Tensor], Any], **of: Any) -> None:
        how = {"sequence_parallel": self.sequence_parallel, "zero_centered_gamma": self.zero_centered_gamma}
        self.layer_norm_weight = ones(self.in_features, **how, **of)
        super()._allocate(init_method, **of)

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        return super()._spread(normalize(x, self.layer_norm_weight, self.eps))


class GroupedLinear(Linear):
    """`num_gemms` weights: rows of the input go to one after the other, as many as `m_splits` says."""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, **options: Any) -> None:
        if options.pop("single_grouped_weight", False) or options.pop("single_grouped_bias", False):
            raise NotImplementedError("one tensor for all experts")
        self.num_gemms = num_gemms
        super().__init__(in_features, out_features, **options)

    def _allocate(self, init_method: Callable[[torch.Tensor], Any], **of: Any) -> None:
        if self.tp_size > 1 or self.use_bias:
            raise NotImplementedError("Megatron-Core cuts experts by itself, and these have no biases")
        for number in range(self.num_gemms):
            self._add_weight(f"weight{number}", init_method, **of)

    def forward(self, x: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Any:
        weights = [getattr(self, f"weight{number}") for number in range(self.num_gemms)]
        return torch.cat([linear(part, weight) for part, weight in zip(x.split(m_splits), weights, strict=True)])
