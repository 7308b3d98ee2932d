//! DeepSeek-V2, DeepSeek-V3 and Kimi-K2: latent attention, a dense MLP in the first layers, then routed and shared
//! experts, and layers that predict tokens further ahead.

use alloc::format;

use super::blocks::experts::{Experts, Shared};
use super::{Description, blocks, dense};
use crate::roles::{Column, Replicated, Vocab};
use crate::slots::{Layer, Slots};
use crate::{ModelConfig, TranslateError};

pub(super) const V3: Description = Description {
    architecture: "DeepseekV3ForCausalLM",
    model_type: "deepseek_v3",
    fixed: |_| {},
    #[cfg(feature = "serde")]
    read: json::read,
    check,
    layer,
    mtp: Some(mtp),
    block_fp8: Some(is_quantized),
    ..dense::LLAMA
};

pub(super) const V2: Description =
    Description { architecture: "DeepseekV2ForCausalLM", model_type: "deepseek_v2", ..V3 };

pub(super) const KIMI_K2: Description =
    Description { architecture: "KimiK2ForCausalLM", model_type: "kimi_k2", ..V3 };

fn check(config: &ModelConfig) -> Result<(), TranslateError> {
    config.mla()?.widths(config.num_heads)?;
    let moe = config.moe()?;
    if (0..config.num_layers).all(|layer| moe.has_experts(layer)) {
        return Ok(());
    }
    config.check_mlp()
}

fn layer(config: &ModelConfig, layer: Layer, slots: &mut Slots) -> Result<(), TranslateError> {
    blocks::mla::attention(config, slots)?;
    let moe = config.moe()?;
    if !moe.has_experts(layer.global) {
        blocks::mlp(config, slots);
        return Ok(());
    }
    let shared =
        moe.shared_intermediate_size.map(|_| Shared { module: "shared_experts", gate: None });
    Experts { score_bias: moe.score_bias, shared, ..Experts::MLP }.slots(config, slots)
}

/// A layer that predicts a token further ahead: a decoder layer behind a projection of the last hidden state beside the
/// next token's embedding. The engine has it in a draft model with an embedding and a head of its own; they hold what
/// the main model's do.
fn mtp(config: &ModelConfig, at: Layer, slots: &mut Slots) -> Result<(), TranslateError> {
    let hidden = config.hidden_size;
    let trainer = format!("mtp.layers.{}.", at.local);
    let model = format!("model.layers.{}.", at.global);
    slots.scope(&trainer, model.clone(), model.clone());
    for name in ["enorm.weight", "hnorm.weight"] {
        slots.pair(blocks::norm(hidden), [name], name, name);
    }
    // `[embedding, hidden state]` on both sides; only the trainer shards it.
    let (both, name) = (hidden.saturating_mul(2), "eh_proj.weight");
    slots.source(Column { what: "hidden_size", rows: hidden, cols: Some(both) }, [name], name);
    slots.target(Replicated { rows: hidden, cols: Some(both) }, [name], name);
    let name = "shared_head.norm.weight";
    slots.pair(blocks::norm(hidden), [name], "final_layernorm.weight", name);

    slots.scope("", "", model.clone());
    let logical = if config.tied { blocks::EMBEDDING } else { blocks::HEAD };
    let head = Vocab { tokens: config.vocab_size, cols: hidden };
    slots.target(head, [logical], "shared_head.head.weight");

    slots.scope(trainer + "mtp_model_layer.", model.clone(), model + "mtp_block.");
    layer(config, at, slots)
}

/// The projections: norms, the router, the embedding, the head and `eh_proj` stay as they are.
fn is_quantized(logical: &str) -> bool {
    logical.ends_with("_proj.weight") && !logical.ends_with(".eh_proj.weight")
        || logical.ends_with(".kv_a_proj_with_mqa.weight")
}

#[cfg(feature = "serde")]
mod json {
    use alloc::string::String;

    use serde::Deserialize;

    use crate::config::json::{Json, refusal, required};
    use crate::{Mla, ModelConfig, Moe, TranslateError};

    #[derive(Deserialize)]
    struct Keys {
        intermediate_size: Option<u64>,
        attention_bias: Option<bool>,
        topk_method: Option<String>,
        num_nextn_predict_layers: Option<u32>,
        moe_layer_freq: Option<u32>,
    }

    pub(super) fn read(json: &Json<'_>, config: &mut ModelConfig) -> Result<(), TranslateError> {
        let keys: Keys = json.keys()?;
        if keys.attention_bias == Some(true) {
            let why = "no attention projection may have a bias in this family";
            return Err(refusal("attention_bias", true, why));
        }
        let mtp = keys.num_nextn_predict_layers.unwrap_or(0);
        if mtp > 0 && keys.moe_layer_freq.unwrap_or(1) != 1 {
            let why = "the sides do not agree which of the predicting layers have experts then";
            return Err(refusal("moe_layer_freq", keys.moe_layer_freq.unwrap_or(1), why));
        }
        config.intermediate_size = required(keys.intermediate_size, "intermediate_size")?;
        config.mla = Some(Mla::read(json)?);
        let mut moe = Moe::read(json, config.num_layers)?;
        // vLLM makes the parameter for this method alone, and drops a checkpoint's bias without it.
        moe.score_bias = keys.topk_method.as_deref() == Some("noaux_tc");
        config.moe = Some(moe);
        config.mtp_layers = mtp;
        Ok(())
    }
}
