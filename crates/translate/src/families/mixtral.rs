//! Mixtral: Mistral's attention, routed experts in every layer.
//!
//! Both sides were read, not compared with bytes: the engine's names in vLLM 0.32's class; the trainer's, and which of `w1`,
//! `w3` and `w2` is what, in Megatron-LM's loader of Mixtral checkpoints.

use super::blocks::experts::{self, Experts};
use super::{Description, blocks, dense};
use crate::slots::{Layer, Slots};
use crate::{ModelConfig, TranslateError};

pub(super) const MIXTRAL: Description = Description {
    architecture: "MixtralForCausalLM",
    model_type: "mixtral",
    #[cfg(feature = "serde")]
    read: json::read,
    check,
    layer,
    ..dense::MISTRAL
};

/// `w1`, `w3` and `w2` are gate, up and down.
const EXPERTS: Experts =
    Experts { module: "block_sparse_moe.", projections: ["w1", "w3", "w2"], ..Experts::MLP };

fn check(config: &ModelConfig) -> Result<(), TranslateError> {
    config.check_attention()?;
    experts::routed_in_every_layer(config).map(|_| ())
}

fn layer(config: &ModelConfig, _: Layer, slots: &mut Slots) -> Result<(), TranslateError> {
    blocks::attention(config, slots);
    EXPERTS.slots(config, slots)
}

#[cfg(feature = "serde")]
mod json {
    use serde::Deserialize;

    use crate::config::json::{Json, derived_head_dim, refusal, required};
    use crate::{ModelConfig, Moe, TranslateError};

    #[derive(Deserialize)]
    struct Keys {
        /// Of one expert.
        intermediate_size: Option<u64>,
        num_local_experts: Option<u64>,
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
        config.num_kv_heads = required(keys.num_key_value_heads, "num_key_value_heads")?;
        config.head_dim = match keys.head_dim {
            None => derived_head_dim(config)?,
            Some(head_dim) => head_dim,
        };
        config.moe = Some(Moe::new(
            required(keys.num_local_experts, "num_local_experts")?,
            required(keys.intermediate_size, "intermediate_size")?,
        ));
        Ok(())
    }
}
