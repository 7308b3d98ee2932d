//! Models whose layers are not all alike.

use crate::{ModelConfig, TranslateError};

/// What a decoder layer of a hybrid model mixes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LayerKind {
    /// Attention over all tokens.
    Attention,
    /// A Mamba-2 state space, see [`Mamba`](crate::Mamba).
    Mamba,
    /// A gated delta net, see [`Gdn`](crate::Gdn).
    DeltaNet,
    /// An MLP alone, in models where it is a layer of its own.
    Mlp,
}

impl ModelConfig {
    /// Checks that every layer's kind is said and is one of these: for hybrid families.
    pub(crate) fn check_pattern(&self, kinds: &[LayerKind]) -> Result<(), TranslateError> {
        let layers = usize::try_from(self.num_layers).unwrap_or(usize::MAX);
        let Some(pattern) = self.pattern.get(..layers) else {
            let why = "it must say the kind of every layer of the model";
            return Err(TranslateError::Combination { what: "pattern", why });
        };
        if !pattern.iter().all(|kind| kinds.contains(kind)) {
            let why = "it names a kind of layer that the family does not have";
            return Err(TranslateError::Combination { what: "pattern", why });
        }
        Ok(())
    }

    /// The kind of a layer, counted over the whole model.
    pub(crate) fn kind(&self, layer: u32) -> Option<LayerKind> {
        self.pattern.get(usize::try_from(layer).ok()?).copied()
    }

    /// Whether a checked model has layers of this kind.
    pub(crate) fn has(&self, kind: LayerKind) -> bool {
        (0..self.num_layers).any(|layer| self.kind(layer) == Some(kind))
    }
}

#[cfg(feature = "serde")]
mod json {
    use alloc::format;
    use alloc::string::String;
    use alloc::vec::Vec;

    use super::LayerKind;
    use crate::config::MAX_LAYERS;
    use crate::config::json::{refusal, required};
    use crate::{ModelConfig, TranslateError};

    impl ModelConfig {
        /// Sets the kinds of layers from a list of their names, of which `kind_of` knows some. `num_hidden_layers` may
        /// be absent, but not another number.
        pub(crate) fn read_pattern<N: AsRef<str>>(
            &mut self,
            key: &'static str,
            names: &[N],
            kind_of: impl Fn(&str) -> Option<LayerKind>,
        ) -> Result<(), TranslateError> {
            let count = u32::try_from(names.len()).unwrap_or(u32::MAX);
            if count > MAX_LAYERS {
                return Err(TranslateError::TooLarge { what: key, limit: MAX_LAYERS.into() });
            }
            if self.num_layers == 0 {
                self.num_layers = count;
            }
            if self.num_layers != count {
                let value =
                    format!("a list of {count} layers, num_hidden_layers = {}", self.num_layers);
                return Err(refusal(key, value, "the two must agree"));
            }
            let kind = |name: &N| {
                let why = "layers of this kind are not described for this family";
                kind_of(name.as_ref()).ok_or_else(|| refusal(key, name.as_ref(), why))
            };
            self.pattern = names.iter().map(kind).collect::<Result<Vec<_>, _>>()?;
            Ok(())
        }

        /// The same for a model that need not list its layers when every `interval`-th has full attention.
        pub(crate) fn read_interval(
            &mut self,
            interval: Option<u32>,
            others: LayerKind,
        ) -> Result<(), TranslateError> {
            let interval = required(interval, "layer_types")?;
            if interval == 0 {
                return Err(TranslateError::Zero { what: "full_attention_interval" });
            }
            let kind = |layer: u32| {
                if (layer + 1).is_multiple_of(interval) { LayerKind::Attention } else { others }
            };
            self.pattern = (0..self.num_layers.min(MAX_LAYERS)).map(kind).collect();
            Ok(())
        }
    }

    /// The symbols of a pattern written as one text.
    pub(crate) fn symbols(pattern: &str) -> Vec<String> {
        pattern.chars().map(Into::into).collect()
    }
}

#[cfg(feature = "serde")]
pub(crate) use json::symbols;
