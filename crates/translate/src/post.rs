//! What an engine must do after its parameters were written.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use refit_planner::RankLayout;

/// State that an engine derives from parameters when it loads them, and that writing parameters leaves as it was.
///
/// Until every action is carried out, the rank computes with a mix of old and new weights, which looks plausible.
/// Addresses must stay: CUDA graphs have captured them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PostAction {
    /// Recompute `W_UK_T [heads / tp_size, qk_nope_head_dim, kv_lora_rank]` and `W_UV [heads / tp_size, kv_lora_rank,
    /// v_head_dim]` of these parameters' layers, as `MLAAttention.process_weights_after_loading` does. Decoding reads
    /// them, prefilling reads the parameters.
    AbsorbMla {
        /// `kv_b_proj.weight` of every layer, in the order of the model.
        params: Vec<Arc<str>>,
    },
    /// Copy attention sinks anew where the backend keeps them in f32 beside the parameter (FlashInfer, B12x).
    CopySinks {
        /// `sinks` of every layer, in the order of the model.
        params: Vec<Arc<str>>,
    },
    /// Forget what was computed under the old weights: the prefix cache, running requests' keys, values and states,
    /// and the scales of the KV cache where the engine calculates them (`calculate_kv_scales`).
    DropCaches,
}

impl PostAction {
    /// The engine's parameters that it derives something from; none where it concerns all of them.
    #[must_use]
    pub fn params(&self) -> &[Arc<str>] {
        match self {
            Self::AbsorbMla { params } | Self::CopySinks { params } => params,
            Self::DropCaches => &[],
        }
    }
}

impl fmt::Display for PostAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AbsorbMla { params } => {
                write!(f, "recompute W_UK_T and W_UV from {} x kv_b_proj", params.len())
            }
            Self::CopySinks { params } => {
                write!(
                    f,
                    "copy {} x sinks to the f32 twins of them that kernels read",
                    params.len()
                )
            }
            Self::DropCaches => f.write_str("drop the prefix cache and calculated KV-cache scales"),
        }
    }
}

/// What [`PostAction`] a parameter calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Refresh {
    AbsorbedMla,
    Sinks,
}

impl Refresh {
    /// The action of these parameters.
    pub(crate) fn action(self, params: Vec<Arc<str>>) -> PostAction {
        match self {
            Self::AbsorbedMla => PostAction::AbsorbMla { params },
            Self::Sinks => PostAction::CopySinks { params },
        }
    }
}

/// What an engine rank holds, and what it must do once all of it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TargetLayout {
    /// Its parameters as bands.
    pub layout: RankLayout,
    /// What must follow, in this order. Planning knows nothing of it.
    pub post_actions: Vec<PostAction>,
}

/// A layout made by hand, of an engine that derives nothing from its parameters.
impl From<RankLayout> for TargetLayout {
    fn from(layout: RankLayout) -> Self {
        Self { layout, post_actions: Vec::new() }
    }
}
