//! The families of models: what each is called, which facts it has, and its table of slots.
//!
//! One file per family. Several may share what they have in common through [`blocks`].

mod blocks;
mod dense;
mod gpt_oss;
mod mixtral;
mod nemotron_h;
mod qwen3_moe;
mod qwen3_next;

use alloc::format;
use alloc::string::String;

#[cfg(feature = "serde")]
use crate::config::json::Json;
use crate::slots::{Layer, Slots};
use crate::{ModelConfig, TranslateError};

/// What a family's file says about it.
#[derive(Debug)]
pub(crate) struct Description {
    /// The Hugging Face architecture.
    pub(crate) architecture: &'static str,
    /// The Hugging Face model type.
    pub(crate) model_type: &'static str,
    /// Sets the facts that are the same in every model of the family.
    pub(crate) fixed: fn(&mut ModelConfig),
    /// Reads the facts that `config.json` has beside the common ones (see `config::json`), and refuses what changes
    /// the layout in a way the table does not say.
    #[cfg(feature = "serde")]
    pub(crate) read: fn(&Json<'_>, &mut ModelConfig) -> Result<(), TranslateError>,
    /// Checks what the table needs beside the common sizes; groups of facts have checked themselves by then.
    pub(crate) check: fn(&ModelConfig) -> Result<(), TranslateError>,
    /// Slots before the first layer: on the trainer's first stage.
    pub(crate) first: fn(&ModelConfig, &mut Slots) -> Result<(), TranslateError>,
    /// Slots of a decoder layer, which hybrid models vary.
    pub(crate) layer: fn(&ModelConfig, Layer, &mut Slots) -> Result<(), TranslateError>,
    /// Slots behind the last layer: on the trainer's last stage.
    pub(crate) last: fn(&ModelConfig, &mut Slots) -> Result<(), TranslateError>,
}

/// Lists the families once, so that a new one cannot be forgotten somewhere.
macro_rules! families {
    ($($(#[$doc:meta])* $family:ident = $description:path,)*) => {
        /// A family of models: those that share a table of slots.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Family {
            $($(#[$doc])* $family,)*
        }

        impl Family {
            /// Every family.
            pub const ALL: &[Self] = &[$(Self::$family,)*];

            pub(crate) const fn description(self) -> &'static Description {
                match self {
                    $(Self::$family => &$description,)*
                }
            }
        }
    };
}

families! {
    /// `LlamaForCausalLM`: grouped-query attention, gated MLP.
    Llama = dense::LLAMA,
    /// `MistralForCausalLM`: Llama's layout.
    Mistral = dense::MISTRAL,
    /// `Qwen2ForCausalLM`, which is Qwen2.5 too: Llama's layout with a bias on Q, K and V.
    Qwen2 = dense::QWEN2,
    /// `Qwen3ForCausalLM`: Llama's layout with norms on Q and K.
    Qwen3 = dense::QWEN3,
    /// `Qwen3MoeForCausalLM`: Qwen3 with routed experts in all layers or some.
    Qwen3Moe = qwen3_moe::QWEN3_MOE,
    /// `MixtralForCausalLM`: Mistral's layout with routed experts in every layer.
    Mixtral = mixtral::MIXTRAL,
    /// `GptOssForCausalLM`: biases and attention sinks, routed experts in every layer. In bf16; its checkpoints in MXFP4
    /// are refused.
    GptOss = gpt_oss::GPT_OSS,
    /// `NemotronHForCausalLM`: Mamba-2, attention and ungated MLPs, each a layer of its own.
    NemotronH = nemotron_h::NEMOTRON_H,
    /// `Qwen3NextForCausalLM`: gated delta nets and gated attention, experts.
    Qwen3Next = qwen3_next::QWEN3_NEXT,
    /// `Qwen3_5ForCausalLM`: the same with dense MLPs and other tensors in its checkpoint.
    Qwen3_5 = qwen3_next::QWEN3_5,
}

impl Family {
    /// The Hugging Face architecture.
    #[must_use]
    pub const fn architecture(self) -> &'static str {
        self.description().architecture
    }

    /// The Hugging Face model type.
    #[must_use]
    pub const fn model_type(self) -> &'static str {
        self.description().model_type
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
