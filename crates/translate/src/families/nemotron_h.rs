//! Nemotron-H: every layer is one of a Mamba-2 state space, attention, or an ungated MLP, with a norm before it.
//!
//! Names and layouts were compared with Megatron-Core 0.19.2 through Megatron-Bridge 0.6.2 and with vLLM 0.32. The
//! trainer's layers are those of its hybrid model, so their numbers are the checkpoint's.

use alloc::format;

use refit_planner::{Dtype, ElementMap};

use super::{Description, blocks};
use crate::roles::{Column, MambaConv, MambaInProj, Row};
use crate::slots::{Layer, Slots, te};
use crate::{LayerKind, ModelConfig, TranslateError};

pub(super) const NEMOTRON_H: Description = Description {
    architecture: "NemotronHForCausalLM",
    model_type: "nemotron_h",
    fixed: |_| {},
    #[cfg(feature = "serde")]
    read: json::read,
    check,
    first,
    layer,
    last,
};

const EMBEDDING: &str = "backbone.embeddings.weight";

fn check(config: &ModelConfig) -> Result<(), TranslateError> {
    config.check_pattern(&[LayerKind::Mamba, LayerKind::Attention, LayerKind::Mlp])?;
    if config.has(LayerKind::Attention) {
        config.check_attention()?;
    }
    if config.has(LayerKind::Mlp) {
        config.check_mlp()?;
    }
    if config.has(LayerKind::Mamba) {
        config.mamba()?;
    }
    Ok(())
}

fn first(config: &ModelConfig, slots: &mut Slots) -> Result<(), TranslateError> {
    slots.pair(
        blocks::vocab(config),
        [EMBEDDING],
        "embedding.word_embeddings.weight",
        "model.embed_tokens.weight",
    );
    Ok(())
}

fn layer(config: &ModelConfig, layer: Layer, slots: &mut Slots) -> Result<(), TranslateError> {
    slots.scope(
        format!("decoder.layers.{}.", layer.local),
        format!("backbone.layers.{}.", layer.global),
        format!("model.layers.{}.", layer.global),
    );
    match config.kind(layer.global) {
        Some(LayerKind::Mamba) => mamba(config, slots)?,
        Some(LayerKind::Attention) => attention(config, slots),
        _ => mlp(config, slots),
    }
    Ok(())
}

fn last(config: &ModelConfig, slots: &mut Slots) -> Result<(), TranslateError> {
    slots.pair(
        blocks::norm(config.hidden_size),
        ["backbone.norm_f.weight"],
        "decoder.final_norm.weight",
        "model.norm_f.weight",
    );
    blocks::lm_head(config, EMBEDDING, slots);
    Ok(())
}

fn mamba(config: &ModelConfig, slots: &mut Slots) -> Result<(), TranslateError> {
    let (hidden, sizes) = (config.hidden_size, *config.mamba()?);
    norm(config, "mixer.in_proj.layer_norm_weight", "norm.weight", slots);
    slots.pair(
        MambaInProj { sizes, cols: hidden },
        ["mixer.in_proj.weight"],
        "mixer.in_proj.weight",
        "mixer.in_proj.weight",
    );
    // A module of its own up to Megatron-Core 0.16, parameters of the mixer since.
    slots.pair(
        MambaConv { sizes, kernel: Some(sizes.conv_kernel) },
        ["mixer.conv1d.weight"],
        te("mixer.conv1d_weight").also("mixer.conv1d.weight"),
        "mixer.conv1d.weight",
    );
    if sizes.conv_bias {
        slots.pair(
            MambaConv { sizes, kernel: None },
            ["mixer.conv1d.bias"],
            te("mixer.conv1d_bias").also("mixer.conv1d.bias"),
            "mixer.conv1d.bias",
        );
    }
    let heads = Column { what: "mamba_num_heads", rows: sizes.heads, cols: None };
    slots.source(heads, ["mixer.A_log"], "mixer.A_log");
    slots.target(heads, ["mixer.A_log"], "mixer.A").dtype(Dtype::F32).map(ElementMap::NegExp);
    slots.pair(heads, ["mixer.D"], "mixer.D", "mixer.D");
    slots.pair(heads, ["mixer.dt_bias"], "mixer.dt_bias", "mixer.dt_bias");
    let (what, inner) = ("mamba_num_heads * mamba_head_dim", sizes.inner());
    slots.pair(
        Column { what, rows: inner, cols: None },
        ["mixer.norm.weight"],
        "mixer.norm.weight",
        "mixer.norm.weight",
    );
    slots.pair(
        Row { rows: hidden, what, cols: inner },
        ["mixer.out_proj.weight"],
        "mixer.out_proj.weight",
        "mixer.out_proj.weight",
    );
    Ok(())
}

fn attention(config: &ModelConfig, slots: &mut Slots) {
    let (hidden, heads) = (config.hidden_size, config.num_heads.saturating_mul(config.head_dim));
    norm(config, "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", slots);
    slots.pair(
        blocks::qkv(config, Some(hidden)),
        ["mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight"],
        "self_attention.linear_qkv.weight",
        "mixer.qkv_proj.weight",
    );
    slots.pair(
        Row { rows: hidden, what: "num_attention_heads * head_dim", cols: heads },
        ["mixer.o_proj.weight"],
        "self_attention.linear_proj.weight",
        "mixer.o_proj.weight",
    );
}

/// Its activation is a squared ReLU: one projection up, no gate.
fn mlp(config: &ModelConfig, slots: &mut Slots) {
    let (hidden, what, size) = (config.hidden_size, "intermediate_size", config.intermediate_size);
    norm(config, "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight", slots);
    slots.pair(
        Column { what, rows: size, cols: Some(hidden) },
        ["mixer.up_proj.weight"],
        "mlp.linear_fc1.weight",
        "mixer.up_proj.weight",
    );
    slots.pair(
        Row { rows: hidden, what, cols: size },
        ["mixer.down_proj.weight"],
        "mlp.linear_fc2.weight",
        "mixer.down_proj.weight",
    );
}

/// The norm before a layer, which is called the same whatever the layer is, but for the trainer's names.
fn norm(config: &ModelConfig, fused: &'static str, local: &'static str, slots: &mut Slots) {
    let role = blocks::norm(config.hidden_size);
    slots.pair(role, ["norm.weight"], te(fused).local(local), "norm.weight");
}

#[cfg(feature = "serde")]
mod json {
    use alloc::string::String;
    use alloc::vec::Vec;

    use serde::Deserialize;

    use crate::config::json::{Json, derived_head_dim, refusal, required};
    use crate::config::pattern::symbols;
    use crate::{LayerKind, Mamba, ModelConfig, TranslateError};

    #[derive(Deserialize)]
    struct Keys {
        /// One symbol per layer: `M` Mamba, `*` attention, `-` MLP, `E` experts.
        hybrid_override_pattern: Option<String>,
        /// What transformers 5 writes in its place.
        layers_block_type: Option<Vec<String>>,
        intermediate_size: Option<u64>,
        num_key_value_heads: Option<u64>,
        head_dim: Option<u64>,
        attention_bias: Option<bool>,
        mlp_bias: Option<bool>,
        /// The activation of MLPs, by either of its names.
        mlp_hidden_act: Option<String>,
    }

    pub(super) fn read(json: &Json<'_>, config: &mut ModelConfig) -> Result<(), TranslateError> {
        let keys: Keys = json.keys()?;
        for (key, value) in [("attention_bias", keys.attention_bias), ("mlp_bias", keys.mlp_bias)] {
            if value == Some(true) {
                return Err(refusal(
                    key,
                    true,
                    "projections of this family are known without biases",
                ));
            }
        }
        if let Some(other) = keys.mlp_hidden_act.filter(|name| name != "relu2") {
            let why =
                "MLPs of this family are known with a squared ReLU (relu2), which has no gate";
            return Err(refusal("mlp_hidden_act", other, why));
        }
        if let Some(pattern) = &keys.hybrid_override_pattern {
            config.read_pattern("hybrid_override_pattern", &symbols(pattern), kind_of)?;
        }
        if let Some(names) = &keys.layers_block_type {
            let said = core::mem::take(&mut config.pattern);
            config.read_pattern("layers_block_type", names, kind_of)?;
            if !said.is_empty() && said != config.pattern {
                let why = "hybrid_override_pattern names other layers";
                return Err(refusal("layers_block_type", names.join(", "), why));
            }
        }
        if config.pattern.is_empty() {
            return Err(TranslateError::MissingKey { key: "hybrid_override_pattern" });
        }
        if config.has(LayerKind::Mamba) {
            config.mamba = Some(Mamba::read(json)?);
        }
        if config.has(LayerKind::Mlp) {
            config.intermediate_size = required(keys.intermediate_size, "intermediate_size")?;
        }
        if config.has(LayerKind::Attention) {
            config.num_kv_heads = required(keys.num_key_value_heads, "num_key_value_heads")?;
            config.head_dim = match keys.head_dim {
                None => derived_head_dim(config)?,
                Some(head_dim) => head_dim,
            };
        }
        Ok(())
    }

    fn kind_of(name: &str) -> Option<LayerKind> {
        match name {
            "M" | "mamba" | "linear_attention" => Some(LayerKind::Mamba),
            "*" | "attention" | "full_attention" => Some(LayerKind::Attention),
            "-" | "mlp" => Some(LayerKind::Mlp),
            _ => None,
        }
    }
}
