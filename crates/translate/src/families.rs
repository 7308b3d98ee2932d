//! The slots of each family: tables, and nothing else.

mod dense;

use alloc::vec::Vec;

use crate::slot::Slot;
use crate::{Family, ModelConfig};

/// The slots of one model, by where the trainer's pipeline puts them.
#[derive(Debug)]
pub(crate) struct Model<'a> {
    config: &'a ModelConfig,
    /// Before the first layer: on the first stage.
    pub(crate) first: Vec<Slot>,
    /// Behind the last layer: on the last stage.
    pub(crate) last: Vec<Slot>,
}

impl<'a> Model<'a> {
    pub(crate) fn new(config: &'a ModelConfig) -> Self {
        let (first, last) = match config.family {
            Family::Llama | Family::Mistral | Family::Qwen2 | Family::Qwen3 => {
                (dense::first(config), dense::last(config))
            }
        };
        Self { config, first, last }
    }

    /// The slots of a layer, which hybrid models vary; numbers are global and zero-based.
    pub(crate) fn layer(&self, _layer: u32) -> Vec<Slot> {
        match self.config.family {
            Family::Llama | Family::Mistral | Family::Qwen2 | Family::Qwen3 => {
                dense::layer(self.config)
            }
        }
    }
}
