use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::roles::Role;

/// One parameter of a model on both sides: how it is sharded and what it is called.
///
/// Names of layer parameters have `{}` where the layer's number goes: the trainer's number is local to its pipeline
/// stage, the others count over the whole model.
#[derive(Debug)]
pub(crate) struct Slot {
    /// How it is sharded.
    pub(crate) role: Box<dyn Role>,
    /// Hugging Face names of the role's logical tensors, in its order.
    pub(crate) logical: &'static [&'static str],
    /// Megatron-Core names, of which a rank has exactly one. Where specs differ: Transformer Engine's first, the
    /// local spec's last.
    pub(crate) megatron: &'static [&'static str],
    /// The vLLM name.
    pub(crate) vllm: &'static str,
    /// Whether this is a second name for a tensor that another slot provides, and either side may lack it: a tied
    /// head. A trainer's copy is accounted for but never read; an engine that has untied its head is served.
    pub(crate) copy: bool,
}

impl Slot {
    pub(crate) fn new(
        role: impl Role + 'static,
        logical: &'static [&'static str],
        megatron: &'static [&'static str],
        vllm: &'static str,
    ) -> Self {
        Self { role: Box::new(role), logical, megatron, vllm, copy: false }
    }

    /// This slot as a second name for a tensor that another slot provides.
    pub(crate) fn copy(mut self) -> Self {
        self.copy = true;
        self
    }

    /// The logical names for one layer.
    pub(crate) fn logical_names(&self, layer: u32) -> Vec<String> {
        self.logical.iter().map(|template| numbered(template, layer)).collect()
    }
}

/// A name for one layer.
pub(crate) fn numbered(template: &str, layer: u32) -> String {
    template.replace("{}", &layer.to_string())
}

/// The same, shared.
pub(crate) fn name(template: &str, layer: u32) -> Arc<str> {
    numbered(template, layer).into()
}
