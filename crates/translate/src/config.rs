//! The facts of a model that decide its layout.

#[cfg(feature = "serde")]
mod json;

use alloc::format;
use alloc::string::String;

use refit_planner::Dtype;

use crate::TranslateError;

/// No model has a size beyond this; it keeps products of two sizes, and small multiples of them, in 64 bits.
const MAX_SIZE: u64 = 1 << 30;
/// No model has more layers.
pub(crate) const MAX_LAYERS: u32 = 1 << 12;
/// No model has more heads, nor elements in one.
pub(crate) const MAX_HEADS: u32 = 1 << 16;
/// No model has more key-value heads in all its layers: a trainer's rank may hold a band for each of Q, K and V of each.
const MAX_KV_GROUPS: u64 = 1 << 20;
/// No side has more ranks.
pub(crate) const MAX_RANKS: u32 = 1 << 20;

/// A family of models: those that share a table of slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Family {
    /// `LlamaForCausalLM`: grouped-query attention, gated MLP.
    Llama,
    /// `MistralForCausalLM`: Llama's layout.
    Mistral,
    /// `Qwen2ForCausalLM`, which is Qwen2.5 too: Llama's layout with a bias on Q, K and V.
    Qwen2,
    /// `Qwen3ForCausalLM`: Llama's layout with norms on Q and K.
    Qwen3,
}

impl Family {
    /// Every family.
    pub const ALL: &[Self] = &[Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// The Hugging Face architecture.
    #[must_use]
    pub const fn architecture(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// The Hugging Face model type.
    #[must_use]
    pub const fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// The family with this architecture or model type.
    ///
    /// # Errors
    /// [`TranslateError::UnsupportedModel`], which lists the supported ones.
    pub fn from_name(name: &str) -> Result<Self, TranslateError> {
        let known = |family: &&Self| family.architecture() == name || family.model_type() == name;
        Self::ALL.iter().find(known).copied().ok_or_else(|| TranslateError::UnsupportedModel {
            found: name.into(),
            supported: supported(),
        })
    }
}

fn supported() -> String {
    let mut list = String::new();
    for family in Family::ALL {
        let separator = if list.is_empty() { "" } else { ", " };
        list += &format!("{separator}{} ({})", family.architecture(), family.model_type());
    }
    list
}

/// A model: what both sides' layouts follow from, besides parallel sizes.
///
/// The field names are Hugging Face's where it has one. [`ModelConfig::new`] sets what a family fixes and leaves the
/// sizes at 0; [`ModelConfig::validate`] refuses what is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// The table of slots.
    pub family: Family,
    /// Element type of the engine's parameters, and of the trainer's where nothing else is said.
    pub dtype: Dtype,
    /// Width of the residual stream.
    pub hidden_size: u64,
    /// Rows of the gate projection, and of the up projection.
    pub intermediate_size: u64,
    /// `num_hidden_layers`: decoder layers.
    pub num_layers: u32,
    /// `num_attention_heads`: query heads.
    pub num_heads: u64,
    /// `num_key_value_heads`: KV groups.
    pub num_kv_heads: u64,
    /// Elements of one head.
    pub head_dim: u64,
    /// Tokens, without any padding.
    pub vocab_size: u64,
    /// `tie_word_embeddings`: the head is the embedding.
    pub tied: bool,
    /// Whether Q, K and V have a bias.
    pub qkv_bias: bool,
    /// Whether Q and K are normalised per head.
    pub qk_norm: bool,
}

impl ModelConfig {
    /// A model of this family: bf16, untied, all sizes 0.
    #[must_use]
    pub fn new(family: Family) -> Self {
        Self {
            family,
            dtype: Dtype::Bf16,
            hidden_size: 0,
            intermediate_size: 0,
            num_layers: 0,
            num_heads: 0,
            num_kv_heads: 0,
            head_dim: 0,
            vocab_size: 0,
            tied: false,
            qkv_bias: family == Family::Qwen2,
            qk_norm: family == Family::Qwen3,
        }
    }

    /// Reads a Hugging Face `config.json`.
    ///
    /// # Errors
    /// [`TranslateError::Json`] for text that is not such a file, [`TranslateError::UnsupportedModel`] and
    /// [`TranslateError::UnsupportedConfig`] for models whose layout is not described here,
    /// [`TranslateError::MissingKey`], and everything [`ModelConfig::validate`] refuses.
    #[cfg(feature = "serde")]
    #[cfg_attr(docsrs, doc(cfg(feature = "serde")))]
    pub fn from_json(text: &str) -> Result<Self, TranslateError> {
        json::read(text)
    }

    /// Checks that the sizes describe a model. Every layout function does so first.
    ///
    /// # Errors
    /// [`TranslateError::Zero`], [`TranslateError::TooLarge`], [`TranslateError::Indivisible`] when the KV heads do
    /// not divide the heads, [`TranslateError::UnsupportedConfig`] for an element type that is not a float.
    pub fn validate(&self) -> Result<(), TranslateError> {
        let sizes = [
            ("hidden_size", self.hidden_size, MAX_SIZE),
            ("intermediate_size", self.intermediate_size, MAX_SIZE),
            ("num_hidden_layers", self.num_layers.into(), MAX_LAYERS.into()),
            ("num_attention_heads", self.num_heads, MAX_HEADS.into()),
            ("num_key_value_heads", self.num_kv_heads, MAX_HEADS.into()),
            ("head_dim", self.head_dim, MAX_HEADS.into()),
            ("vocab_size", self.vocab_size, MAX_SIZE),
        ];
        for (what, size, limit) in sizes {
            if size == 0 {
                return Err(TranslateError::Zero { what });
            }
            if size > limit {
                return Err(TranslateError::TooLarge { what, limit });
            }
        }
        if self.num_heads * self.head_dim > MAX_SIZE {
            return Err(TranslateError::TooLarge {
                what: "num_attention_heads * head_dim",
                limit: MAX_SIZE,
            });
        }
        if u64::from(self.num_layers) * self.num_kv_heads > MAX_KV_GROUPS {
            return Err(TranslateError::TooLarge {
                what: "num_hidden_layers * num_key_value_heads",
                limit: MAX_KV_GROUPS,
            });
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return Err(TranslateError::Indivisible {
                what: "num_attention_heads",
                size: self.num_heads,
                by_what: "num_key_value_heads",
                by: self.num_kv_heads,
            });
        }
        if !matches!(self.dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32) {
            return Err(TranslateError::UnsupportedConfig {
                key: "dtype",
                value: self.dtype.name().into(),
                why: "parameters are expected in bf16, f16 or f32",
            });
        }
        Ok(())
    }
}
