"""Kernels that permute, rename and pack what they are given, as those of GPUs do, in plain torch: for `vllm_engine.py`.

Import it before an engine is made, in its processes too: it registers the quantisations `refit_permuted` and `refit_packed`.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.model_executor.utils import replace_parameter, set_weight_attrs


class Linear(LinearMethodBase):
    """What all of them are loaded into: a weight as it is in a checkpoint."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: Any,
        **attributes: Any,
    ) -> None:
        shape = (sum(output_partition_sizes), input_size_per_partition)
        loader = attributes.pop("weight_loader")
        data = torch.empty(shape, dtype=params_dtype)
        weight = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, attributes)


def order(rows: int) -> torch.Tensor:
    return torch.arange(rows).flip(0).roll(3)


class Permuted(Linear):
    """The same shape with its rows in another order, biases too: nothing that can be seen from outside."""

    def process_weights_after_loading(self, layer: Any) -> None:
        rows = order(layer.weight.shape[0])
        replace_parameter(layer, "weight", layer.weight.data[rows].contiguous())
        if getattr(layer, "bias", None) is not None:
            layer.bias = torch.nn.Parameter(layer.bias.data[rows].contiguous(), requires_grad=False)
        # Kernels keep things of their own, such as this one's way back.
        self.back = torch.argsort(rows)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        back = order(layer.weight.shape[0]).argsort()
        return torch.nn.functional.linear(x, layer.weight, bias)[..., back]


class PermutedHead(Permuted):
    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Packed(Linear):
    """Other names, another shape and another type: int8 columns under `packed`, and a scale of each row."""

    def process_weights_after_loading(self, layer: Any) -> None:
        weight = layer.weight.data.float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        packed = (weight / scale).round().to(torch.int8).t().contiguous()
        del layer.weight
        layer.register_parameter("packed", torch.nn.Parameter(packed, requires_grad=False))
        layer.register_parameter("scale", torch.nn.Parameter(scale.t().contiguous(), requires_grad=False))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weight = (layer.packed * layer.scale).t().to(x.dtype)
        return torch.nn.functional.linear(x, weight, bias)


class Swapped(FusedMoEMethodBase):
    """Experts with gate and up the other way round, in the same shape, and the second weight transposed."""

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        return None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: Any,
        **attributes: Any,
    ) -> None:
        for name, rows, columns in (
            ("w13_weight", 2 * intermediate_size_per_partition, hidden_size),
            ("w2_weight", hidden_size, intermediate_size_per_partition),
        ):
            data = torch.empty(num_experts, rows, columns, dtype=params_dtype)
            weight = torch.nn.Parameter(data, requires_grad=False)
            layer.register_parameter(name, weight)
            set_weight_attrs(weight, attributes)

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        gate, up = layer.w13_weight.data.chunk(2, dim=1)
        layer.w13_weight.data.copy_(torch.cat([up, gate], dim=1))
        replace_parameter(layer, "w2_weight", layer.w2_weight.data.transpose(1, 2).contiguous())
        layer._already_called_process_weights_after_loading = True

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: Any = None,
    ) -> torch.Tensor:
        out = torch.zeros_like(x)
        for token in range(x.shape[0]):
            for weight, expert in zip(topk_weights[token], topk_ids[token].tolist(), strict=True):
                up, gate = (layer.w13_weight[expert] @ x[token]).chunk(2)
                out[token] += weight.to(x.dtype) * ((torch.nn.functional.silu(gate) * up) @ layer.w2_weight[expert])
        return out


class Config(QuantizationConfig):
    linear: type[Linear]
    head: type[LinearMethodBase] | None = None

    def __init__(self) -> None:
        super().__init__()

    @classmethod
    def get_supported_act_dtypes(cls) -> list[Any]:
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Config:
        return cls()

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        if isinstance(layer, ParallelLMHead):
            return UnquantizedEmbeddingMethod() if self.head is None else self.head()
        if isinstance(layer, RoutedExperts):
            return Swapped(layer.moe_config)
        return self.linear() if isinstance(layer, LinearBase) else None


@register_quantization_config("refit_permuted")
class PermutedConfig(Config):
    linear, head = Permuted, PermutedHead

    @classmethod
    def get_name(cls) -> Any:
        return "refit_permuted"


@register_quantization_config("refit_packed")
class PackedConfig(Config):
    linear = Packed

    @classmethod
    def get_name(cls) -> Any:
        return "refit_packed"
