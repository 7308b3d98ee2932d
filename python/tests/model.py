"""A small dense model as Megatron-Core and vLLM lay it out, written down by hand: what the package is compared with."""

from __future__ import annotations

import numpy as np

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "torch_dtype": "float32",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 60,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
HIDDEN, FFN, LAYERS, HEADS, GROUPS, DIM, VOCAB = 16, 24, 2, 4, 2, 8, 60


def checkpoint(seed: int) -> dict[str, np.ndarray]:
    """Every tensor in Hugging Face's names."""
    random = np.random.default_rng(seed)

    def tensor(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    out = {
        "model.embed_tokens.weight": tensor(VOCAB, HIDDEN),
        "model.norm.weight": tensor(HIDDEN),
        "lm_head.weight": tensor(VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        out |= {
            at + "input_layernorm.weight": tensor(HIDDEN),
            at + "post_attention_layernorm.weight": tensor(HIDDEN),
            at + "self_attn.q_proj.weight": tensor(HEADS * DIM, HIDDEN),
            at + "self_attn.k_proj.weight": tensor(GROUPS * DIM, HIDDEN),
            at + "self_attn.v_proj.weight": tensor(GROUPS * DIM, HIDDEN),
            at + "self_attn.o_proj.weight": tensor(HIDDEN, HEADS * DIM),
            at + "self_attn.q_norm.weight": tensor(DIM),
            at + "self_attn.k_norm.weight": tensor(DIM),
            at + "mlp.gate_proj.weight": tensor(FFN, HIDDEN),
            at + "mlp.up_proj.weight": tensor(FFN, HIDDEN),
            at + "mlp.down_proj.weight": tensor(HIDDEN, FFN),
        }
    return out


def _part(tensor: np.ndarray, rank: int, size: int, axis: int = 0) -> np.ndarray:
    return np.split(tensor, size, axis)[rank]


def megatron(full: dict[str, np.ndarray], rank: int, size: int) -> dict[str, np.ndarray]:
    """What tensor-parallel rank `rank` of `size` holds, with Transformer Engine's names."""
    pad = np.zeros((4, HIDDEN), np.float32)
    out = {
        "embedding.word_embeddings.weight": _part(
            np.concatenate([full["model.embed_tokens.weight"], pad]), rank, size
        ),
        "decoder.final_layernorm.weight": full["model.norm.weight"],
        "output_layer.weight": _part(np.concatenate([full["lm_head.weight"], pad]), rank, size),
    }
    for layer in range(LAYERS):
        at, to = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        q = full[at + "self_attn.q_proj.weight"].reshape(GROUPS, -1, HIDDEN)
        k = full[at + "self_attn.k_proj.weight"].reshape(GROUPS, -1, HIDDEN)
        v = full[at + "self_attn.v_proj.weight"].reshape(GROUPS, -1, HIDDEN)
        qkv = np.concatenate([q, k, v], axis=1)  # by group
        gate = _part(full[at + "mlp.gate_proj.weight"], rank, size)
        up = _part(full[at + "mlp.up_proj.weight"], rank, size)
        out |= {
            to + "self_attention.linear_qkv.weight": _part(qkv, rank, size).reshape(-1, HIDDEN),
            to + "self_attention.linear_qkv.layer_norm_weight": full[at + "input_layernorm.weight"],
            to + "self_attention.q_layernorm.weight": full[at + "self_attn.q_norm.weight"],
            to + "self_attention.k_layernorm.weight": full[at + "self_attn.k_norm.weight"],
            to + "self_attention.linear_proj.weight": _part(
                full[at + "self_attn.o_proj.weight"], rank, size, axis=1
            ),
            to + "mlp.linear_fc1.weight": np.concatenate([gate, up]),
            to + "mlp.linear_fc1.layer_norm_weight": full[at + "post_attention_layernorm.weight"],
            to + "mlp.linear_fc2.weight": _part(full[at + "mlp.down_proj.weight"], rank, size, axis=1),
        }
    return {name: np.array(tensor, order="C") for name, tensor in out.items()}


def vllm(full: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What an engine of one rank holds; its vocabulary is padded to a multiple of 64."""
    pad = np.zeros((64 - VOCAB, HIDDEN), np.float32)
    out = {
        "model.embed_tokens.weight": np.concatenate([full["model.embed_tokens.weight"], pad]),
        "model.norm.weight": full["model.norm.weight"],
        "lm_head.weight": np.concatenate([full["lm_head.weight"], pad]),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        out |= {
            at + "self_attn.qkv_proj.weight": np.concatenate(
                [full[at + f"self_attn.{part}_proj.weight"] for part in "qkv"]
            ),
            at + "mlp.gate_up_proj.weight": np.concatenate(
                [full[at + "mlp.gate_proj.weight"], full[at + "mlp.up_proj.weight"]]
            ),
        }
        for same in (
            "input_layernorm",
            "post_attention_layernorm",
            "self_attn.o_proj",
            "self_attn.q_norm",
            "self_attn.k_norm",
            "mlp.down_proj",
        ):
            out[at + same + ".weight"] = full[at + same + ".weight"]
    return {name: np.array(tensor, order="C") for name, tensor in out.items()}
