//! What decoders of several families have in common. Names are relative to the scope that the caller is in.
//!
//! Names and layouts were compared with Megatron-Core 0.19.2 through Megatron-Bridge 0.6.2 and with vLLM 0.32.

pub(super) mod experts;

use crate::ModelConfig;
use crate::roles::{GatedMlp, GatedQkv, Qkv, Replicated, Row, Vocab};
use crate::slots::{Slots, te};

/// The embedding's logical name.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";

/// The embedding.
pub(super) fn embedding(config: &ModelConfig, slots: &mut Slots) {
    slots.pair(
        vocab(config),
        [EMBEDDING],
        "embedding.word_embeddings.weight",
        "model.embed_tokens.weight",
    );
}

/// The final norm and the head.
pub(super) fn head(config: &ModelConfig, slots: &mut Slots) {
    slots.pair(
        norm(config.hidden_size),
        ["model.norm.weight"],
        "decoder.final_layernorm.weight",
        "model.norm.weight",
    );
    lm_head(config, EMBEDDING, slots);
}

/// The head, of a model whose embedding is called `embedding`.
///
/// A tied head is the embedding under another name. The trainer holds a copy of it on the last stage when there are
/// several; the embedding's own stage is the one that is read.
pub(super) fn lm_head(config: &ModelConfig, embedding: &'static str, slots: &mut Slots) {
    let (megatron, vllm) = ("output_layer.weight", "lm_head.weight");
    if config.tied {
        slots.pair(vocab(config), [embedding], megatron, vllm).copy();
    } else {
        slots.pair(vocab(config), ["lm_head.weight"], megatron, vllm);
    }
}

/// Grouped-query attention with the norm before it.
pub(super) fn attention(config: &ModelConfig, slots: &mut Slots) {
    let hidden = config.hidden_size;
    let heads = config.num_heads.saturating_mul(config.head_dim);
    slots.pair(
        norm(hidden),
        ["input_layernorm.weight"],
        te("self_attention.linear_qkv.layer_norm_weight").local("input_layernorm.weight"),
        "input_layernorm.weight",
    );
    let logical = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"];
    let (megatron, vllm) = ("self_attention.linear_qkv.weight", "self_attn.qkv_proj.weight");
    let role = qkv(config, Some(hidden));
    if config.output_gate {
        let Qkv { heads, kv_heads, head_dim, cols } = role;
        slots.pair(GatedQkv { heads, kv_heads, head_dim, cols }, logical, megatron, vllm);
    } else {
        slots.pair(role, logical, megatron, vllm);
    }
    slots.pair(
        Row { rows: hidden, what: "num_attention_heads * head_dim", cols: heads },
        ["self_attn.o_proj.weight"],
        "self_attention.linear_proj.weight",
        "self_attn.o_proj.weight",
    );
    if config.qkv_bias {
        slots.pair(
            qkv(config, None),
            ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
            "self_attention.linear_qkv.bias",
            "self_attn.qkv_proj.bias",
        );
    }
    if config.qk_norm {
        // One norm for all heads: replicated, not sharded with them.
        slots.pair(
            norm(config.head_dim),
            ["self_attn.q_norm.weight"],
            "self_attention.q_layernorm.weight",
            "self_attn.q_norm.weight",
        );
        slots.pair(
            norm(config.head_dim),
            ["self_attn.k_norm.weight"],
            "self_attention.k_layernorm.weight",
            "self_attn.k_norm.weight",
        );
    }
}

/// A dense gated MLP with the norm before it.
pub(super) fn mlp(config: &ModelConfig, slots: &mut Slots) {
    let hidden = config.hidden_size;
    slots.pair(
        norm(hidden),
        ["post_attention_layernorm.weight"],
        te("mlp.linear_fc1.layer_norm_weight").local("pre_mlp_layernorm.weight"),
        "post_attention_layernorm.weight",
    );
    slots.pair(
        GatedMlp {
            what: "intermediate_size",
            intermediate: config.intermediate_size,
            cols: Some(hidden),
        },
        ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        "mlp.linear_fc1.weight",
        "mlp.gate_up_proj.weight",
    );
    slots.pair(
        Row { rows: hidden, what: "intermediate_size", cols: config.intermediate_size },
        ["mlp.down_proj.weight"],
        "mlp.linear_fc2.weight",
        "mlp.down_proj.weight",
    );
}

/// Rows are tokens.
pub(super) fn vocab(config: &ModelConfig) -> Vocab {
    Vocab { tokens: config.vocab_size, cols: config.hidden_size }
}

/// The weight of a norm.
pub(super) fn norm(size: u64) -> Replicated {
    Replicated { rows: size, cols: None }
}

/// Q, K and V; `None` for their biases.
pub(super) fn qkv(config: &ModelConfig, cols: Option<u64>) -> Qkv {
    let ModelConfig { num_heads: heads, num_kv_heads: kv_heads, head_dim, .. } = *config;
    Qkv { heads, kv_heads, head_dim, cols }
}
