//! The facts of a model that decide its layout.

mod gdn;
#[cfg(feature = "serde")]
pub(crate) mod json;
mod mamba;
mod mla;
mod moe;
mod pattern;

use alloc::vec::Vec;

use refit_planner::Dtype;

use crate::{Family, TranslateError};

pub use gdn::Gdn;
pub use mamba::Mamba;
pub use mla::Mla;
pub use moe::Moe;
pub use pattern::LayerKind;

/// No model has a size beyond this; it keeps products of two sizes, and small multiples of them, in 64 bits.
pub(crate) const MAX_SIZE: u64 = 1 << 30;
/// No model has more layers.
pub(crate) const MAX_LAYERS: u32 = 1 << 12;
/// No model has more heads, nor elements in one.
pub(crate) const MAX_HEADS: u32 = 1 << 16;
/// No model has more experts in a layer.
pub(crate) const MAX_EXPERTS: u64 = 1 << 16;
/// No model has more key-value heads in all its layers: a trainer's rank may hold a band for each of Q, K and V of each.
const MAX_KV_GROUPS: u64 = 1 << 20;
/// No side has more ranks.
pub(crate) const MAX_RANKS: u32 = 1 << 20;

/// A model: what both sides' layouts follow from, besides parallel sizes.
///
/// The field names are Hugging Face's where it has one. [`ModelConfig::new`] sets what a family fixes and leaves the
/// sizes at 0; [`ModelConfig::validate`] refuses what is missing. Facts that only some families have are in groups; a
/// family refuses a model that lacks a group it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// The table of slots.
    pub family: Family,
    /// Element type of the engine's parameters, and of the trainer's where nothing else is said.
    pub dtype: Dtype,
    /// Width of the residual stream.
    pub hidden_size: u64,
    /// Rows of the gate projection, and of the up projection, of dense layers.
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
    /// Mixture of experts.
    pub moe: Option<Moe>,
    /// Multi-head latent attention.
    pub mla: Option<Mla>,
    /// `num_nextn_predict_layers`: layers that predict tokens further ahead, behind the decoder layers (MTP).
    pub mtp_layers: u32,
    /// Whether both sides hold projections in e4m3 with an f32 scale for every 128 x 128 block.
    pub block_fp8: bool,
    /// Whether queries come with a gate on the output of attention.
    pub output_gate: bool,
    /// Mamba-2 layers.
    pub mamba: Option<Mamba>,
    /// Gated delta net layers.
    pub gdn: Option<Gdn>,
    /// The kind of every layer, in hybrid models; it may go on behind the last layer of a model that was cut.
    pub pattern: Vec<LayerKind>,
}

impl ModelConfig {
    /// A model of this family: bf16, untied, all sizes 0, no groups.
    #[must_use]
    pub fn new(family: Family) -> Self {
        let mut config = Self {
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
            qkv_bias: false,
            qk_norm: false,
            moe: None,
            mla: None,
            mtp_layers: 0,
            block_fp8: false,
            output_gate: false,
            mamba: None,
            gdn: None,
            pattern: Vec::new(),
        };
        (family.description().fixed)(&mut config);
        config
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
    /// not divide the heads, [`TranslateError::UnsupportedConfig`] for an element type that is not a float,
    /// [`TranslateError::MissingGroup`] for facts that the family needs.
    pub fn validate(&self) -> Result<(), TranslateError> {
        check_sizes(&[
            ("hidden_size", self.hidden_size, MAX_SIZE),
            ("num_hidden_layers", self.num_layers.into(), MAX_LAYERS.into()),
            ("vocab_size", self.vocab_size, MAX_SIZE),
        ])?;
        if !matches!(self.dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32) {
            return Err(TranslateError::UnsupportedConfig {
                key: "dtype",
                value: self.dtype.name().into(),
                why: "parameters are expected in bf16, f16 or f32",
            });
        }
        let description = self.family.description();
        if self.mtp_layers > MAX_LAYERS {
            let limit = MAX_LAYERS.into();
            return Err(TranslateError::TooLarge { what: "num_nextn_predict_layers", limit });
        }
        if self.block_fp8 && description.block_fp8.is_none() {
            return Err(TranslateError::UnsupportedConfig {
                key: "quantization_config",
                value: "fp8".into(),
                why: "blockwise FP8 is not described for this family",
            });
        }
        if let Some(moe) = &self.moe {
            moe.validate()?;
        }
        if let Some(mla) = &self.mla {
            mla.validate()?;
        }
        if let Some(mamba) = &self.mamba {
            mamba.validate()?;
        }
        if let Some(gdn) = &self.gdn {
            gdn.validate()?;
        }
        (description.check)(self)
    }

    /// Checks the sizes of grouped-query attention: for families that have such layers.
    pub(crate) fn check_attention(&self) -> Result<(), TranslateError> {
        check_sizes(&[
            ("num_attention_heads", self.num_heads, MAX_HEADS.into()),
            ("num_key_value_heads", self.num_kv_heads, MAX_HEADS.into()),
            ("head_dim", self.head_dim, MAX_HEADS.into()),
        ])?;
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
        Ok(())
    }

    /// Checks the size of dense gated MLPs: for families that have such layers.
    pub(crate) fn check_mlp(&self) -> Result<(), TranslateError> {
        check_sizes(&[("intermediate_size", self.intermediate_size, MAX_SIZE)])
    }

    /// The facts of experts: for families that have some.
    pub(crate) fn moe(&self) -> Result<&Moe, TranslateError> {
        self.moe.as_ref().ok_or_else(|| self.missing("moe"))
    }

    /// The facts of latent attention: for families that have it.
    pub(crate) fn mla(&self) -> Result<&Mla, TranslateError> {
        self.mla.as_ref().ok_or_else(|| self.missing("mla"))
    }

    /// Whether the parameter of these logical tensors is in blockwise FP8, with scales beside it.
    pub(crate) fn is_quantized(&self, logical: &[impl AsRef<str>]) -> bool {
        let rule = self.family.description().block_fp8.filter(|_| self.block_fp8);
        rule.zip(logical.first()).is_some_and(|(rule, name)| rule(name.as_ref()))
    }

    /// The element type of a parameter of these logical tensors that has none of its own.
    pub(crate) fn dtype_of(&self, logical: &[impl AsRef<str>]) -> Dtype {
        if self.is_quantized(logical) { Dtype::F8E4m3 } else { self.dtype }
    }

    /// The facts of Mamba layers: for families that have some.
    pub(crate) fn mamba(&self) -> Result<&Mamba, TranslateError> {
        self.mamba.as_ref().ok_or_else(|| self.missing("mamba"))
    }

    /// The facts of gated delta net layers: for families that have some.
    pub(crate) fn gdn(&self) -> Result<&Gdn, TranslateError> {
        self.gdn.as_ref().ok_or_else(|| self.missing("gdn"))
    }

    fn missing(&self, group: &'static str) -> TranslateError {
        TranslateError::MissingGroup { family: self.family.architecture(), group }
    }
}

/// Refuses sizes that are 0 or beyond their limit; each comes with its name.
pub(crate) fn check_sizes(sizes: &[(&'static str, u64, u64)]) -> Result<(), TranslateError> {
    for &(what, size, limit) in sizes {
        if size == 0 {
            return Err(TranslateError::Zero { what });
        }
        if size > limit {
            return Err(TranslateError::TooLarge { what, limit });
        }
    }
    Ok(())
}
