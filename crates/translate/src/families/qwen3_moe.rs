//! Qwen3 with experts: its attention, and routed experts in place of the MLP in all layers or some.

use super::blocks::experts::{self, Experts};
use super::{Description, blocks, dense};
use crate::slots::{Layer, Slots};
use crate::{ModelConfig, TranslateError};

pub(super) const QWEN3_MOE: Description = Description {
    architecture: "Qwen3MoeForCausalLM",
    model_type: "qwen3_moe",
    #[cfg(feature = "serde")]
    read: json::read,
    check,
    layer,
    ..dense::QWEN3
};

fn check(config: &ModelConfig) -> Result<(), TranslateError> {
    config.check_attention()?;
    let moe = experts::routed_only(config)?;
    // Nobody reads the size of dense layers where there are none.
    if (0..config.num_layers).all(|layer| moe.has_experts(layer)) {
        return Ok(());
    }
    config.check_mlp()
}

fn layer(config: &ModelConfig, layer: Layer, slots: &mut Slots) -> Result<(), TranslateError> {
    blocks::attention(config, slots);
    let moe = config.moe()?;
    if moe.has_experts(layer.global) {
        experts::fewer_ranks(moe, slots)?;
        Experts::MLP.slots(config, slots)
    } else {
        blocks::mlp(config, slots);
        Ok(())
    }
}

#[cfg(feature = "serde")]
mod json {
    use serde::Deserialize;

    use crate::config::json::{Json, refusal, required};
    use crate::{ModelConfig, Moe, TranslateError};

    #[derive(Deserialize)]
    struct Keys {
        intermediate_size: Option<u64>,
        num_key_value_heads: Option<u64>,
        head_dim: Option<u64>,
        attention_bias: Option<bool>,
    }

    pub(super) fn read(json: &Json<'_>, config: &mut ModelConfig) -> Result<(), TranslateError> {
        let keys: Keys = json.keys()?;
        if keys.attention_bias == Some(true) {
            let why = "no attention projection may have a bias in this family";
            return Err(refusal("attention_bias", true, why));
        }
        config.intermediate_size = required(keys.intermediate_size, "intermediate_size")?;
        config.num_kv_heads = required(keys.num_key_value_heads, "num_key_value_heads")?;
        config.head_dim = required(keys.head_dim, "head_dim")?;
        config.moe = Some(Moe::read(json, config.num_layers)?);
        Ok(())
    }
}
