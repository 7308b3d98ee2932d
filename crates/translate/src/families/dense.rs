//! Llama, Mistral, Qwen2 and Qwen3: grouped-query attention and a gated MLP in every layer.

use super::{Description, blocks};
use crate::slots::{Layer, Slots};
use crate::{ModelConfig, TranslateError};

pub(super) const LLAMA: Description = Description {
    architecture: "LlamaForCausalLM",
    model_type: "llama",
    fixed: |_| {},
    #[cfg(feature = "serde")]
    read: json::read,
    check,
    first,
    layer,
    last,
    mtp: None,
    block_fp8: None,
};

pub(super) const MISTRAL: Description =
    Description { architecture: "MistralForCausalLM", model_type: "mistral", ..LLAMA };

pub(super) const QWEN2: Description = Description {
    architecture: "Qwen2ForCausalLM",
    model_type: "qwen2",
    fixed: |config| config.qkv_bias = true,
    ..LLAMA
};

pub(super) const QWEN3: Description = Description {
    architecture: "Qwen3ForCausalLM",
    model_type: "qwen3",
    fixed: |config| config.qk_norm = true,
    ..LLAMA
};

fn check(config: &ModelConfig) -> Result<(), TranslateError> {
    config.check_attention()?;
    config.check_mlp()
}

fn first(config: &ModelConfig, slots: &mut Slots) -> Result<(), TranslateError> {
    blocks::embedding(config, slots);
    Ok(())
}

fn layer(config: &ModelConfig, _: Layer, slots: &mut Slots) -> Result<(), TranslateError> {
    blocks::attention(config, slots);
    blocks::mlp(config, slots);
    Ok(())
}

fn last(config: &ModelConfig, slots: &mut Slots) -> Result<(), TranslateError> {
    blocks::head(config, slots);
    Ok(())
}

#[cfg(feature = "serde")]
mod json {
    use serde::Deserialize;

    use crate::config::json::{Json, derived_head_dim, refusal, required};
    use crate::{Family, ModelConfig, TranslateError};

    #[derive(Deserialize)]
    struct Keys {
        intermediate_size: Option<u64>,
        num_key_value_heads: Option<u64>,
        head_dim: Option<u64>,
        /// Llama, Mistral, Qwen3: a bias on Q, K, V and O.
        attention_bias: Option<bool>,
        /// Llama: a bias on gate, up and down.
        mlp_bias: Option<bool>,
        /// Qwen2 derivatives: whether Q, K and V have a bias; vLLM reads it too, its default is true.
        qkv_bias: Option<bool>,
        /// Qwen2 derivatives with norms on Q and K.
        qk_norm: Option<bool>,
    }

    pub(super) fn read(json: &Json<'_>, config: &mut ModelConfig) -> Result<(), TranslateError> {
        let keys: Keys = json.keys()?;
        let projections = "only Q, K and V may have a bias in this family";
        if keys.attention_bias == Some(true) {
            return Err(refusal("attention_bias", true, projections));
        }
        if keys.mlp_bias == Some(true) {
            return Err(refusal("mlp_bias", true, projections));
        }
        if keys.qk_norm == Some(true) && config.family != Family::Qwen3 {
            return Err(refusal("qk_norm", true, "norms on Q and K are known for Qwen3 only"));
        }
        config.intermediate_size = required(keys.intermediate_size, "intermediate_size")?;
        // Absent in files older than grouped-query attention, which only Llama has; other defaults moved between
        // releases.
        config.num_kv_heads = match keys.num_key_value_heads {
            None if config.family == Family::Llama => config.num_heads,
            kv_heads => required(kv_heads, "num_key_value_heads")?,
        };
        // Absent or null means a share of the hidden size, but for Qwen3, whose class default is a constant.
        config.head_dim = match keys.head_dim {
            None if config.family != Family::Qwen3 => derived_head_dim(config)?,
            head_dim => required(head_dim, "head_dim")?,
        };
        if let (Family::Qwen2, Some(bias)) = (config.family, keys.qkv_bias) {
            config.qkv_bias = bias;
        }
        Ok(())
    }
}
