"""The model of a trainer as Megatron-Bridge builds it: from a checkpoint of Hugging Face's, and back to one."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

#: Kernels for GPUs, and a dispatcher of tokens that counts them on a GPU only. Everything else stays as Bridge sets it up.
NOT_ON_CPU: dict[str, Any] = {
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "cross_entropy_loss_fusion": False,
    "moe_permute_fusion": False,
    "moe_shared_expert_overlap": False,
    "moe_token_dispatcher_type": "allgather",
}


def auto_bridge() -> Any:
    """Bridge's class. It imports OmegaConf for reading files of settings, which nothing here does."""
    omegaconf = sys.modules.setdefault("omegaconf", ModuleType("omegaconf"))
    for name in ("OmegaConf", "DictConfig"):
        setattr(omegaconf, name, getattr(omegaconf, name, type(name, (), {})))
    from megatron.bridge import AutoBridge

    return AutoBridge


def build(checkpoint: str, settings: dict[str, Any], ddp: Any) -> list[Any]:
    """The chunks of the model in their wrappers, with the checkpoint's weights."""
    provider = auto_bridge().from_hf_pretrained(checkpoint, dtype=torch.bfloat16).to_megatron_provider()
    provider.apply_overrides_and_finalize(torch.bfloat16, {**NOT_ON_CPU, **settings})
    return provider.provide_distributed_model(ddp_config=ddp, use_cpu_initialization=True)


def export(checkpoint: str, model: list[Any], file: Path) -> None:
    """What all ranks together hold, under Hugging Face's names: a collective."""
    from safetensors.torch import save_file

    bridge = auto_bridge().from_hf_pretrained(checkpoint, dtype=torch.bfloat16)
    with torch.no_grad():
        tensors = {
            name: tensor.detach().clone()
            for name, tensor in bridge.export_hf_weights(model, cpu=True, show_progress=False)
        }
    if dist.get_rank() == 0:
        save_file(tensors, file, metadata={"format": "pt"})
