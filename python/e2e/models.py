"""The tiny models of this test: what Hugging Face calls them, and the same sizes for Megatron-Core."""

from __future__ import annotations

from typing import Any

#: Real architectures, small enough that seven pairs of trainer and engine run on two cores. `initializer_range` is large
#: so that the best next token is seldom a matter of rounding.
_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "initializer_range": 0.08,
    "dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": None,
}

MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {
        **_COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "tie_word_embeddings": False,
        "attention_bias": False,
    },
    "qwen2.5": {
        **{key: value for key, value in _COMMON.items() if key != "head_dim"},
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        # Megatron-LM pads this, and so does vLLM.
        "vocab_size": 250,
        "hidden_size": 128,
        "intermediate_size": 192,
        "tie_word_embeddings": True,
    },
    "qwen3-moe": {
        **_COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.0,
    },
    # For Megatron-Bridge only: `megatron` and the reference do not know it.
    "deepseek-v3": {
        **{key: value for key, value in _COMMON.items() if key not in ("head_dim", "rope_theta")},
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "qk_head_dim": 24,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
    },
}


def vocabulary(config: dict[str, Any], tp: int) -> int:
    """Rows of the embedding, as Megatron-LM pads it. Its loss knows no better than that they are all tokens."""
    return -(-config["vocab_size"] // (128 * tp)) * 128 * tp


def experts(config: dict[str, Any]) -> int | None:
    return config.get("num_experts") or config.get("n_routed_experts")


def head_dim(config: dict[str, Any]) -> int:
    return config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])


def megatron(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of `TransformerConfig` that this model decides."""
    experts = config.get("num_experts")
    routed = {
        "num_moe_experts": experts,
        "moe_router_topk": config.get("num_experts_per_tok"),
        "moe_ffn_hidden_size": config.get("moe_intermediate_size"),
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": False,
        "moe_token_dispatcher_type": "allgather",
    }
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": head_dim(config),
        "layernorm_epsilon": config["rms_norm_eps"],
        "init_method_std": config["initializer_range"],
        "qk_layernorm": config["model_type"].startswith("qwen3"),
        "add_qkv_bias": config["model_type"] == "qwen2",
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        **(routed if experts else {}),
    }
