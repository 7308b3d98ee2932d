//! Multi-head latent attention.

use super::norm;
use crate::post::Refresh;
use crate::roles::{Column, Latent, Row};
use crate::slots::{Slots, te};
use crate::{ModelConfig, TranslateError};

const Q_A: &str = "self_attn.q_a_proj.weight";
const KV_A: &str = "self_attn.kv_a_proj_with_mqa.weight";

/// Latent attention with the norm before it.
///
/// Down projections come in one of two forms. The trainer has a layer each, whole on every rank or sharded, or one
/// fused layer, whose norm is then part of it; the engine has one fused parameter, or that of the keys and values alone
/// where queries are projected in one step.
pub(crate) fn attention(config: &ModelConfig, slots: &mut Slots) -> Result<(), TranslateError> {
    let mla = *config.mla()?;
    let hidden = config.hidden_size;
    let (queries, keys_values, values) = mla.widths(config.num_heads)?;
    let kv_a = Latent { rows: [mla.kv_a_rows()], cols: hidden };
    slots.pair(
        norm(hidden),
        ["input_layernorm.weight"],
        te("input_layernorm.weight").also("self_attention.linear_qkv_down_proj.layer_norm_weight"),
        "input_layernorm.weight",
    );
    let what = "num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)";
    if let Some(rank) = mla.q_lora_rank {
        let q_a = Latent { rows: [rank], cols: hidden };
        let both = Latent { rows: [rank, mla.kv_a_rows()], cols: hidden };
        slots.either(&[
            &|slots| {
                slots.source(q_a, [Q_A], "self_attention.linear_q_down_proj.weight");
                slots.source(kv_a, [KV_A], "self_attention.linear_kv_down_proj.weight");
            },
            &|slots| {
                slots.source(both, [Q_A, KV_A], "self_attention.linear_qkv_down_proj.weight");
            },
        ]);
        slots.target(both, [Q_A, KV_A], "self_attn.fused_qkv_a_proj.weight");
        slots.pair(
            norm(rank),
            ["self_attn.q_a_layernorm.weight"],
            te("self_attention.linear_q_up_proj.layer_norm_weight")
                .local("self_attention.q_layernorm.weight"),
            "self_attn.q_a_layernorm.weight",
        );
        slots.pair(
            Column { what, rows: queries, cols: Some(rank) },
            ["self_attn.q_b_proj.weight"],
            "self_attention.linear_q_up_proj.weight",
            "self_attn.q_b_proj.weight",
        );
    } else {
        slots.pair(kv_a, [KV_A], "self_attention.linear_kv_down_proj.weight", KV_A);
        slots.pair(
            Column { what, rows: queries, cols: Some(hidden) },
            ["self_attn.q_proj.weight"],
            "self_attention.linear_q_proj.weight",
            "self_attn.q_proj.weight",
        );
    }
    slots.pair(
        norm(mla.kv_lora_rank),
        ["self_attn.kv_a_layernorm.weight"],
        te("self_attention.linear_kv_up_proj.layer_norm_weight")
            .local("self_attention.kv_layernorm.weight"),
        "self_attn.kv_a_layernorm.weight",
    );
    // Rows of a head, keys then values, are the same on both sides.
    slots
        .pair(
            Column {
                what: "num_attention_heads * (qk_nope_head_dim + v_head_dim)",
                rows: keys_values,
                cols: Some(mla.kv_lora_rank),
            },
            ["self_attn.kv_b_proj.weight"],
            "self_attention.linear_kv_up_proj.weight",
            "self_attn.kv_b_proj.weight",
        )
        .refresh(Refresh::AbsorbedMla);
    slots.pair(
        Row { rows: hidden, what: "num_attention_heads * v_head_dim", cols: values },
        ["self_attn.o_proj.weight"],
        "self_attention.linear_proj.weight",
        "self_attn.o_proj.weight",
    );
    Ok(())
}
