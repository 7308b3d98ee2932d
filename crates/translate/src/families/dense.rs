//! Llama, Mistral, Qwen2 and Qwen3: grouped-query attention and a gated MLP in every layer.
//!
//! Names and layouts were compared with Megatron-Core 0.19.2 through Megatron-Bridge 0.6.2 and with vLLM 0.32.

use alloc::vec;
use alloc::vec::Vec;

use crate::ModelConfig;
use crate::roles::{GatedMlp, Qkv, Replicated, Row, Vocab};
use crate::slot::Slot;

const EMBEDDING: &[&str] = &["model.embed_tokens.weight"];

/// The embedding.
pub(super) fn first(config: &ModelConfig) -> Vec<Slot> {
    vec![Slot::new(
        vocab(config),
        EMBEDDING,
        &["embedding.word_embeddings.weight"],
        "model.embed_tokens.weight",
    )]
}

/// The final norm and the head.
///
/// A tied head is the embedding under another name. The trainer holds a copy of it on the last stage when there are
/// several; the embedding's own stage is the one that is read.
pub(super) fn last(config: &ModelConfig) -> Vec<Slot> {
    let (megatron, vllm) = (&["output_layer.weight"], "lm_head.weight");
    let head = if config.tied {
        Slot::new(vocab(config), EMBEDDING, megatron, vllm).copy()
    } else {
        Slot::new(vocab(config), &["lm_head.weight"], megatron, vllm)
    };
    let norm = Slot::new(
        norm(config.hidden_size),
        &["model.norm.weight"],
        &["decoder.final_layernorm.weight"],
        "model.norm.weight",
    );
    vec![norm, head]
}

/// One decoder layer.
pub(super) fn layer(config: &ModelConfig) -> Vec<Slot> {
    let hidden = config.hidden_size;
    let heads = config.num_heads.saturating_mul(config.head_dim);
    let mut slots = vec![
        Slot::new(
            norm(hidden),
            &["model.layers.{}.input_layernorm.weight"],
            &[
                "decoder.layers.{}.self_attention.linear_qkv.layer_norm_weight",
                "decoder.layers.{}.input_layernorm.weight",
            ],
            "model.layers.{}.input_layernorm.weight",
        ),
        Slot::new(
            qkv(config, Some(hidden)),
            &[
                "model.layers.{}.self_attn.q_proj.weight",
                "model.layers.{}.self_attn.k_proj.weight",
                "model.layers.{}.self_attn.v_proj.weight",
            ],
            &["decoder.layers.{}.self_attention.linear_qkv.weight"],
            "model.layers.{}.self_attn.qkv_proj.weight",
        ),
        Slot::new(
            Row { rows: hidden, what: "num_attention_heads * head_dim", cols: heads },
            &["model.layers.{}.self_attn.o_proj.weight"],
            &["decoder.layers.{}.self_attention.linear_proj.weight"],
            "model.layers.{}.self_attn.o_proj.weight",
        ),
        Slot::new(
            norm(hidden),
            &["model.layers.{}.post_attention_layernorm.weight"],
            &[
                "decoder.layers.{}.mlp.linear_fc1.layer_norm_weight",
                "decoder.layers.{}.pre_mlp_layernorm.weight",
            ],
            "model.layers.{}.post_attention_layernorm.weight",
        ),
        Slot::new(
            GatedMlp { intermediate: config.intermediate_size, cols: hidden },
            &["model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"],
            &["decoder.layers.{}.mlp.linear_fc1.weight"],
            "model.layers.{}.mlp.gate_up_proj.weight",
        ),
        Slot::new(
            Row { rows: hidden, what: "intermediate_size", cols: config.intermediate_size },
            &["model.layers.{}.mlp.down_proj.weight"],
            &["decoder.layers.{}.mlp.linear_fc2.weight"],
            "model.layers.{}.mlp.down_proj.weight",
        ),
    ];
    if config.qkv_bias {
        slots.push(Slot::new(
            qkv(config, None),
            &[
                "model.layers.{}.self_attn.q_proj.bias",
                "model.layers.{}.self_attn.k_proj.bias",
                "model.layers.{}.self_attn.v_proj.bias",
            ],
            &["decoder.layers.{}.self_attention.linear_qkv.bias"],
            "model.layers.{}.self_attn.qkv_proj.bias",
        ));
    }
    if config.qk_norm {
        // One norm for all heads: replicated, not sharded with them.
        slots.push(Slot::new(
            norm(config.head_dim),
            &["model.layers.{}.self_attn.q_norm.weight"],
            &["decoder.layers.{}.self_attention.q_layernorm.weight"],
            "model.layers.{}.self_attn.q_norm.weight",
        ));
        slots.push(Slot::new(
            norm(config.head_dim),
            &["model.layers.{}.self_attn.k_norm.weight"],
            &["decoder.layers.{}.self_attention.k_layernorm.weight"],
            "model.layers.{}.self_attn.k_norm.weight",
        ));
    }
    slots
}

fn vocab(config: &ModelConfig) -> Vocab {
    Vocab { tokens: config.vocab_size, cols: config.hidden_size }
}

fn norm(size: u64) -> Replicated {
    Replicated { rows: size, cols: None }
}

fn qkv(config: &ModelConfig, cols: Option<u64>) -> Qkv {
    let ModelConfig { num_heads: heads, num_kv_heads: kv_heads, head_dim, .. } = *config;
    Qkv { heads, kv_heads, head_dim, cols }
}
