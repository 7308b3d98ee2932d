//! Qwen3-Next and Qwen3.5: gated delta nets, every few layers attention with a gated output, and experts or an MLP.
//!
//! Names and layouts of Qwen3-Next were compared with Megatron-Core 0.19.2 through Megatron-Bridge 0.6.2 and with vLLM
//! 0.32; those of Qwen3.5 role by role, its names as Megatron-Bridge and vLLM 0.32 spell them.
//!
//! Norms are stored around zero by the trainer, the checkpoint and the engine alike, but for that of a delta net's
//! output, which the trainer alone stores so.

use refit_planner::{Dtype, ElementMap};

use super::blocks::experts::{self, Experts, Shared};
use super::{Description, blocks};
use crate::roles::{Column, GdnBa, GdnConv, GdnInProj, GdnLayout, GdnQkvz, Row};
use crate::slots::{Layer, Slots, te};
use crate::{LayerKind, ModelConfig, Moe, TranslateError};

pub(super) const QWEN3_NEXT: Description = Description {
    architecture: "Qwen3NextForCausalLM",
    model_type: "qwen3_next",
    fixed,
    #[cfg(feature = "serde")]
    read: json::read_next,
    check: |config| {
        let moe = config.moe()?;
        if (0..config.num_layers).any(|layer| !moe.has_experts(layer)) {
            config.check_mlp()?;
        }
        check(config)
    },
    first,
    layer,
    last,
    mtp: None,
    block_fp8: None,
};

/// The text model of Qwen3.5 without experts; the published checkpoints have a vision tower around it.
pub(super) const QWEN3_5: Description = Description {
    architecture: "Qwen3_5ForCausalLM",
    model_type: "qwen3_5_text",
    #[cfg(feature = "serde")]
    read: json::read_3_5,
    check: |config| {
        config.check_mlp()?;
        check(config)
    },
    layer: |config, layer, slots| {
        mixer(config, GdnLayout::Flat, layer, slots)?;
        blocks::mlp(config, slots);
        Ok(())
    },
    ..QWEN3_NEXT
};

fn fixed(config: &mut ModelConfig) {
    (config.qk_norm, config.output_gate) = (true, true);
}

fn check(config: &ModelConfig) -> Result<(), TranslateError> {
    config.check_pattern(&[LayerKind::DeltaNet, LayerKind::Attention])?;
    if config.has(LayerKind::Attention) {
        config.check_attention()?;
    }
    if config.has(LayerKind::DeltaNet) {
        config.gdn()?;
    }
    Ok(())
}

fn first(config: &ModelConfig, slots: &mut Slots) -> Result<(), TranslateError> {
    blocks::embedding(config, slots);
    Ok(())
}

fn layer(config: &ModelConfig, layer: Layer, slots: &mut Slots) -> Result<(), TranslateError> {
    mixer(config, GdnLayout::Interleaved, layer, slots)?;
    let moe = config.moe()?;
    if moe.has_experts(layer.global) {
        experts::fewer_ranks(moe, slots)?;
        shared(moe).slots(config, slots)
    } else {
        blocks::mlp(config, slots);
        Ok(())
    }
}

/// What comes before the experts or the MLP.
fn mixer(
    config: &ModelConfig,
    layout: GdnLayout,
    layer: Layer,
    slots: &mut Slots,
) -> Result<(), TranslateError> {
    if config.kind(layer.global) == Some(LayerKind::DeltaNet) {
        return delta_net(config, layout, slots);
    }
    blocks::attention(config, slots);
    Ok(())
}

/// Those of a layer; the expert that every token visits, if there is one, is weighed.
fn shared(moe: &Moe) -> Experts {
    let shared = Shared { module: "shared_expert", gate: Some("shared_expert_gate") };
    Experts { shared: moe.shared_intermediate_size.map(|_| shared), ..Experts::MLP }
}

fn last(config: &ModelConfig, slots: &mut Slots) -> Result<(), TranslateError> {
    blocks::head(config, slots);
    Ok(())
}

fn delta_net(
    config: &ModelConfig,
    layout: GdnLayout,
    slots: &mut Slots,
) -> Result<(), TranslateError> {
    let (hidden, sizes) = (config.hidden_size, *config.gdn()?);
    slots.pair(
        blocks::norm(hidden),
        ["input_layernorm.weight"],
        te("self_attention.in_proj.layer_norm_weight").local("input_layernorm.weight"),
        "input_layernorm.weight",
    );
    let role = GdnInProj { sizes, layout, cols: hidden };
    let (qkvz, ba): (&[&str], &[&str]) = match layout {
        GdnLayout::Interleaved => {
            (&["linear_attn.in_proj_qkvz.weight"], &["linear_attn.in_proj_ba.weight"])
        }
        GdnLayout::Flat => (
            &["linear_attn.in_proj_qkv.weight", "linear_attn.in_proj_z.weight"],
            &["linear_attn.in_proj_b.weight", "linear_attn.in_proj_a.weight"],
        ),
    };
    slots.source(role, qkvz.iter().chain(ba).copied(), "self_attention.in_proj.weight");
    slots.target(GdnQkvz(role), qkvz.iter().copied(), "linear_attn.in_proj_qkvz.weight");
    slots.target(GdnBa(role), ba.iter().copied(), "linear_attn.in_proj_ba.weight");
    slots.pair(
        GdnConv { sizes },
        ["linear_attn.conv1d.weight"],
        "self_attention.conv1d.weight",
        "linear_attn.conv1d.weight",
    );
    let heads = Column { what: "linear_num_value_heads", rows: sizes.value_heads, cols: None };
    let logical = ["linear_attn.A_log"];
    slots.source(heads, logical, "self_attention.A_log");
    slots.target(heads, logical, "linear_attn.A_log").dtype(Dtype::F32);
    slots.pair(heads, ["linear_attn.dt_bias"], "self_attention.dt_bias", "linear_attn.dt_bias");
    let (norm, logical) = (blocks::norm(sizes.value_head_dim), ["linear_attn.norm.weight"]);
    slots.source(norm, logical, "self_attention.out_norm.weight").map(ElementMap::AddOne);
    slots.target(norm, logical, "linear_attn.norm.weight");
    let what = "linear_num_value_heads * linear_value_head_dim";
    slots.pair(
        Row { rows: hidden, what, cols: sizes.values() },
        ["linear_attn.out_proj.weight"],
        "self_attention.out_proj.weight",
        "linear_attn.out_proj.weight",
    );
    Ok(())
}

#[cfg(feature = "serde")]
mod json {
    use alloc::string::String;
    use alloc::vec::Vec;

    use serde::Deserialize;

    use crate::config::json::{Json, refusal, required};
    use crate::{Gdn, LayerKind, ModelConfig, Moe, TranslateError};

    #[derive(Deserialize)]
    struct Keys {
        layer_types: Option<Vec<String>>,
        /// What older files say instead: every so many layers one with full attention.
        full_attention_interval: Option<u32>,
        /// Of layers without experts.
        intermediate_size: Option<u64>,
        num_key_value_heads: Option<u64>,
        head_dim: Option<u64>,
        attention_bias: Option<bool>,
        /// vLLM reads it.
        qkv_bias: Option<bool>,
        attn_output_gate: Option<bool>,
        /// vLLM has parameters of its own for it.
        layer_scale: Option<bool>,
    }

    pub(super) fn read_next(
        json: &Json<'_>,
        config: &mut ModelConfig,
    ) -> Result<(), TranslateError> {
        let keys = read(json, config)?;
        let moe = Moe::read(json, config.num_layers)?;
        if !moe.dense_layers.is_empty() {
            config.intermediate_size = required(keys.intermediate_size, "intermediate_size")?;
        }
        config.moe = Some(moe);
        Ok(())
    }

    pub(super) fn read_3_5(
        json: &Json<'_>,
        config: &mut ModelConfig,
    ) -> Result<(), TranslateError> {
        let keys = read(json, config)?;
        config.intermediate_size = required(keys.intermediate_size, "intermediate_size")?;
        Ok(())
    }

    /// What both have.
    fn read(json: &Json<'_>, config: &mut ModelConfig) -> Result<Keys, TranslateError> {
        let keys: Keys = json.keys()?;
        let projections = "projections of this family are known without biases";
        for (key, value, refused, why) in [
            ("attention_bias", keys.attention_bias, true, projections),
            ("qkv_bias", keys.qkv_bias, true, projections),
            (
                "attn_output_gate",
                keys.attn_output_gate,
                false,
                "attention of this family is known gated",
            ),
            ("layer_scale", keys.layer_scale, true, "scales of layers are not described"),
        ] {
            if value == Some(refused) {
                return Err(refusal(key, refused, why));
            }
        }
        match &keys.layer_types {
            Some(names) => config.read_pattern("layer_types", names, kind_of)?,
            None => config.read_interval(keys.full_attention_interval, LayerKind::DeltaNet)?,
        }
        if config.has(LayerKind::DeltaNet) {
            config.gdn = Some(Gdn::read(json)?);
        }
        config.num_kv_heads = required(keys.num_key_value_heads, "num_key_value_heads")?;
        config.head_dim = required(keys.head_dim, "head_dim")?;
        Ok(keys)
    }

    fn kind_of(name: &str) -> Option<LayerKind> {
        match name {
            "linear_attention" => Some(LayerKind::DeltaNet),
            "full_attention" => Some(LayerKind::Attention),
            _ => None,
        }
    }
}
