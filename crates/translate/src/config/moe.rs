use alloc::vec::Vec;

use super::{MAX_EXPERTS, MAX_LAYERS, MAX_SIZE, check_sizes};
use crate::TranslateError;

/// Mixture of experts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Moe {
    /// Routed experts of a layer: `num_experts`, `n_routed_experts` or `num_local_experts`.
    pub experts: u64,
    /// `moe_intermediate_size`: rows of the gate projection, and of the up projection, of one routed expert.
    pub intermediate_size: u64,
    /// The same of the experts that every token visits, all of them together; `None` where there are none.
    pub shared_intermediate_size: Option<u64>,
    /// `n_group`: groups of experts of which routing picks some first; 1 where it does not. An engine places experts
    /// round robin only if there are several.
    pub groups: u64,
    /// Layers with a dense MLP in place of experts, ascending.
    pub dense_layers: Vec<u32>,
}

impl Moe {
    /// Experts in every layer, none of them shared.
    #[must_use]
    pub fn new(experts: u64, intermediate_size: u64) -> Self {
        Self {
            experts,
            intermediate_size,
            shared_intermediate_size: None,
            groups: 1,
            dense_layers: Vec::new(),
        }
    }

    /// Whether a layer, counted over the whole model, has experts.
    #[must_use]
    pub fn has_experts(&self, layer: u32) -> bool {
        self.dense_layers.binary_search(&layer).is_err()
    }

    /// Checks that the sizes are possible.
    ///
    /// # Errors
    /// [`TranslateError::Zero`], [`TranslateError::TooLarge`], [`TranslateError::Combination`] for layers that are not
    /// ascending.
    pub fn validate(&self) -> Result<(), TranslateError> {
        let shared = self.shared_intermediate_size.unwrap_or(1);
        check_sizes(&[
            ("number of experts", self.experts, MAX_EXPERTS),
            ("moe_intermediate_size", self.intermediate_size, MAX_SIZE),
            ("intermediate size of shared experts", shared, MAX_SIZE),
        ])?;
        if self.dense_layers.last().is_some_and(|&layer| layer >= MAX_LAYERS) {
            return Err(TranslateError::TooLarge {
                what: "dense_layers",
                limit: MAX_LAYERS.into(),
            });
        }
        if !self.dense_layers.is_sorted_by(|a, b| a < b) {
            let why = "they must be ascending, each once";
            return Err(TranslateError::Combination { what: "dense_layers", why });
        }
        Ok(())
    }
}

#[cfg(feature = "serde")]
mod json {
    use alloc::format;

    use serde::Deserialize;

    use super::{MAX_LAYERS, Moe, Vec};
    use crate::TranslateError;
    use crate::config::json::{Json, refusal, required};

    /// Every family's names for the same facts.
    #[derive(Deserialize)]
    struct Keys {
        /// Qwen.
        num_experts: Option<u64>,
        /// DeepSeek.
        n_routed_experts: Option<u64>,
        /// Mixtral, GPT-OSS; what transformers 5 writes for Qwen.
        num_local_experts: Option<u64>,
        moe_intermediate_size: Option<u64>,
        /// Qwen.
        shared_expert_intermediate_size: Option<u64>,
        /// DeepSeek, Nemotron-H.
        n_group: Option<u64>,
        /// DeepSeek: how many of `moe_intermediate_size`.
        n_shared_experts: Option<u64>,
        /// DeepSeek: this many layers at the beginning are dense.
        first_k_dense_replace: Option<u32>,
        /// DeepSeek: of the others, every so many has experts.
        moe_layer_freq: Option<u32>,
        /// Qwen: these layers are dense.
        mlp_only_layers: Option<Vec<u32>>,
        /// Qwen: of the others, every so many has experts.
        decoder_sparse_step: Option<u32>,
    }

    impl Moe {
        /// Reads what `config.json` says of experts, of a model with this many layers.
        pub(crate) fn read(json: &Json<'_>, num_layers: u32) -> Result<Self, TranslateError> {
            let keys: Keys = json.keys()?;
            let counts = [keys.num_experts, keys.n_routed_experts, keys.num_local_experts];
            let mut counts = counts.into_iter().flatten();
            let experts = required(counts.next(), "num_experts")?;
            if let Some(other) = counts.find(|&other| other != experts) {
                let value = format!("{other} beside {experts}");
                return Err(refusal(
                    "num_local_experts",
                    value,
                    "the keys for the number of experts differ",
                ));
            }
            let mut moe =
                Self::new(experts, required(keys.moe_intermediate_size, "moe_intermediate_size")?);
            moe.groups = keys.n_group.unwrap_or(1);
            let positive = |size: &u64| *size > 0;
            let counted =
                keys.n_shared_experts.map(|count| count.saturating_mul(moe.intermediate_size));
            let sized = keys.shared_expert_intermediate_size.filter(positive);
            moe.shared_intermediate_size = sized.or_else(|| counted.filter(positive));
            let listed = keys.mlp_only_layers.unwrap_or_default();
            let step = keys.decoder_sparse_step.unwrap_or(1);
            let first = keys.first_k_dense_replace.unwrap_or(0);
            let frequency = keys.moe_layer_freq.unwrap_or(1);
            for (what, size) in [("decoder_sparse_step", step), ("moe_layer_freq", frequency)] {
                if size == 0 {
                    return Err(TranslateError::Zero { what });
                }
            }
            let dense = |layer: &u32| {
                *layer < first
                    || !layer.is_multiple_of(frequency)
                    || !(layer + 1).is_multiple_of(step)
                    || listed.contains(layer)
            };
            moe.dense_layers = (0..num_layers.min(MAX_LAYERS)).filter(dense).collect();
            moe.validate()?;
            Ok(moe)
        }
    }
}

#[cfg(all(test, feature = "serde"))]
mod tests {
    use alloc::vec;

    use super::Moe;
    use crate::TranslateError;
    use crate::config::json::Json;

    fn read(text: &str) -> Result<Moe, TranslateError> {
        Moe::read(&Json::new(text), 6)
    }

    #[test]
    fn every_familys_keys_are_read() {
        let qwen = r#"{"num_experts": 8, "num_local_experts": 8, "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 16, "mlp_only_layers": [3], "decoder_sparse_step": 2}"#;
        let moe = read(qwen).unwrap();
        assert_eq!(
            (moe.experts, moe.intermediate_size, moe.shared_intermediate_size),
            (8, 48, Some(16))
        );
        // Every second layer has experts, the second being the first of them, but for the fourth.
        assert_eq!(moe.dense_layers, [0, 2, 3, 4]);
        assert!(moe.has_experts(1) && !moe.has_experts(3));
        let deepseek = r#"{"n_routed_experts": 256, "moe_intermediate_size": 2048, "n_shared_experts": 2,
            "first_k_dense_replace": 3, "moe_layer_freq": 1, "n_group": 8}"#;
        let moe = read(deepseek).unwrap();
        assert_eq!(moe.groups, 8);
        assert_eq!((moe.experts, moe.shared_intermediate_size), (256, Some(4096)));
        assert_eq!(moe.dense_layers, [0, 1, 2]);
        let plain =
            r#"{"num_local_experts": 4, "moe_intermediate_size": 8, "n_shared_experts": null}"#;
        assert_eq!(read(plain).unwrap(), Moe::new(4, 8));
    }

    #[test]
    fn impossible_experts_are_refused() {
        use TranslateError as E;
        let refused = |text| read(text).unwrap_err();
        assert_eq!(refused("{}"), E::MissingKey { key: "num_experts" });
        assert_eq!(
            refused(r#"{"num_experts": 8}"#),
            E::MissingKey { key: "moe_intermediate_size" }
        );
        let differ = r#"{"num_experts": 8, "num_local_experts": 4, "moe_intermediate_size": 8}"#;
        assert!(matches!(refused(differ), E::UnsupportedConfig { key: "num_local_experts", .. }));
        let step = r#"{"num_experts": 8, "moe_intermediate_size": 8, "decoder_sparse_step": 0}"#;
        assert_eq!(refused(step), E::Zero { what: "decoder_sparse_step" });
        let huge = r#"{"num_experts": 100000, "moe_intermediate_size": 8}"#;
        assert!(matches!(refused(huge), E::TooLarge { what: "number of experts", .. }));
        let shared = r#"{"num_experts": 8, "moe_intermediate_size": 8, "n_shared_experts": 18446744073709551615}"#;
        assert!(matches!(refused(shared), E::TooLarge { .. }));
        let mut moe = Moe::new(8, 8);
        moe.dense_layers = vec![2, 2];
        assert!(matches!(moe.validate(), Err(E::Combination { what: "dense_layers", .. })));
    }
}
