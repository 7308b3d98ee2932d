//! A trainer rank's coordinates, and all of them.

use alloc::collections::BTreeSet;
use alloc::vec;
use alloc::vec::Vec;

use super::pipeline::{Pipeline, Stages};
use crate::config::{MAX_LAYERS, MAX_RANKS};
use crate::roles::{Shard, SourceCoords};
use crate::{ModelConfig, Side, TranslateError};

/// A trainer rank: its place in the parallel groups and the layers it has.
///
/// Ranks that differ only in data, expert-data or context parallelism hold the same; give each its own `rank`, and the
/// planner shares reads out among them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct SourceRank {
    /// Unique among trainer ranks.
    pub rank: u32,
    /// Place in the tensor-parallel group.
    pub tp_rank: u32,
    /// Tensor-parallel size.
    pub tp_size: u32,
    /// Pipeline stage.
    pub pp_rank: u32,
    /// Pipeline stages.
    pub pp_size: u32,
    /// Place in the expert-parallel group.
    pub ep_rank: u32,
    /// Expert-parallel size.
    pub ep_size: u32,
    /// Place in the expert-tensor-parallel group. It does not follow from `tp_rank`: experts factor the ranks anew.
    pub etp_rank: u32,
    /// Expert-tensor-parallel size.
    pub etp_size: u32,
    /// For each local layer of each model chunk, its zero-based number in the whole model. Read it from the modules
    /// (`layer_number - 1`) where there are any: pipeline splits follow many rules. An empty chunk has no layers.
    ///
    /// With one chunk, tensors go by their plain names. With several (virtual pipeline stages), whose names repeat,
    /// those of chunk `v` begin with `model{v}.`, as in Megatron's own state dictionaries.
    pub chunks: Vec<Vec<u32>>,
    /// For each local layer that predicts a token further ahead (MTP, `mtp.layers.{local}`), its number among those of
    /// the model, from 0. They are in the rank's last chunk. Empty where the trainer has none, whatever the model has.
    pub mtp: Vec<u32>,
}

impl SourceRank {
    /// A rank with these layers in one chunk, alone in its groups.
    #[must_use]
    pub fn new(rank: u32, layers: Vec<u32>) -> Self {
        Self {
            rank,
            tp_rank: 0,
            tp_size: 1,
            pp_rank: 0,
            pp_size: 1,
            ep_rank: 0,
            ep_size: 1,
            etp_rank: 0,
            etp_size: 1,
            chunks: vec![layers],
            mtp: vec![],
        }
    }

    /// This rank at another place of the tensor-parallel group.
    #[must_use]
    pub fn with_tp(mut self, tp_rank: u32, tp_size: u32) -> Self {
        (self.tp_rank, self.tp_size) = (tp_rank, tp_size);
        self
    }

    /// This rank on another pipeline stage.
    #[must_use]
    pub fn with_pp(mut self, pp_rank: u32, pp_size: u32) -> Self {
        (self.pp_rank, self.pp_size) = (pp_rank, pp_size);
        self
    }

    /// This rank at another place of the expert-parallel group.
    #[must_use]
    pub fn with_ep(mut self, ep_rank: u32, ep_size: u32) -> Self {
        (self.ep_rank, self.ep_size) = (ep_rank, ep_size);
        self
    }

    /// This rank at another place of the expert-tensor-parallel group.
    #[must_use]
    pub fn with_etp(mut self, etp_rank: u32, etp_size: u32) -> Self {
        (self.etp_rank, self.etp_size) = (etp_rank, etp_size);
        self
    }

    /// This rank with these model chunks in place of its layers.
    #[must_use]
    pub fn with_chunks(mut self, chunks: Vec<Vec<u32>>) -> Self {
        self.chunks = chunks;
        self
    }

    /// This rank with these predicting layers.
    #[must_use]
    pub fn with_mtp(mut self, layers: Vec<u32>) -> Self {
        self.mtp = layers;
        self
    }

    /// All ranks of a trainer of these sizes, layers split evenly, without expert parallelism.
    ///
    /// # Errors
    /// Those of [`Pipeline::stages`] and [`TrainerSizes::ranks`].
    pub fn grid(num_layers: u32, tp: u32, pp: u32, dp: u32) -> Result<Vec<Self>, TranslateError> {
        TrainerSizes::new(tp).with_dp(dp).ranks(&Pipeline::new(pp).stages(num_layers)?)
    }

    /// This rank's coordinates, and that it has only layers of the model, each once.
    pub(super) fn check(&self, config: &ModelConfig) -> Result<SourceCoords, TranslateError> {
        Shard::new("megatron pp_size", self.pp_rank, self.pp_size)?;
        if self.chunks.is_empty() {
            return Err(TranslateError::Zero { what: "model chunks of a megatron rank" });
        }
        let mut seen = BTreeSet::new();
        for &layer in self.chunks.iter().flatten() {
            if layer >= config.num_layers {
                return Err(TranslateError::LayerRange {
                    rank: self.rank,
                    layer,
                    layers: config.num_layers,
                });
            }
            if !seen.insert(layer) {
                return Err(TranslateError::DuplicateLayer { rank: self.rank, layer });
            }
        }
        let known = config.mtp_layers;
        let described = config.family.description().mtp.is_some();
        let mut seen = BTreeSet::new();
        let numbered = self.mtp.iter().all(|&layer| layer < known && seen.insert(layer));
        if !numbered || !(described || self.mtp.is_empty()) {
            let (side, rank, got) = (Side::Megatron, self.rank, self.mtp.len());
            return Err(TranslateError::Mtp { side, rank, got, known, described });
        }
        SourceCoords::new(self.tp_rank, self.tp_size)?
            .with_ep(self.ep_rank, self.ep_size)?
            .with_etp(self.etp_rank, self.etp_size)
    }
}

/// Parallel sizes of a trainer within one pipeline stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TrainerSizes {
    /// Tensor parallelism of dense layers.
    pub tp: u32,
    /// Copies of a dense layer: data and context parallelism.
    pub dp: u32,
    /// Expert parallelism.
    pub ep: u32,
    /// Tensor parallelism of routed experts. Megatron-Core's default is `tp`; here it is what is said, or 1.
    pub etp: u32,
    /// Layers that predict tokens further ahead, all of them on the last stage. See [`SourceRank::mtp`].
    pub mtp: u32,
}

impl TrainerSizes {
    /// Tensor parallelism alone.
    #[must_use]
    pub fn new(tp: u32) -> Self {
        Self { tp, dp: 1, ep: 1, etp: 1, mtp: 0 }
    }

    /// These sizes with this many copies of dense layers.
    #[must_use]
    pub fn with_dp(mut self, dp: u32) -> Self {
        self.dp = dp;
        self
    }

    /// These sizes with expert parallelism.
    #[must_use]
    pub fn with_ep(mut self, ep: u32) -> Self {
        self.ep = ep;
        self
    }

    /// These sizes with tensor parallelism of routed experts.
    #[must_use]
    pub fn with_etp(mut self, etp: u32) -> Self {
        self.etp = etp;
        self
    }

    /// These sizes with this many predicting layers.
    #[must_use]
    pub fn with_mtp(mut self, layers: u32) -> Self {
        self.mtp = layers;
        self
    }

    /// All ranks, given the layers of every stage's chunks: [`Pipeline::stages`], or the trainer's own table.
    ///
    /// The order is Megatron's default. Within a stage, tensor parallelism varies fastest, then data parallelism; of
    /// the experts' groups, expert tensor parallelism, then expert parallelism, then their copies.
    ///
    /// # Errors
    /// [`TranslateError::Zero`], [`TranslateError::TooLarge`] beyond 2^20 ranks, [`TranslateError::Indivisible`] when
    /// the experts' groups do not divide the ranks of a stage.
    pub fn ranks(&self, stages: &Stages) -> Result<Vec<SourceRank>, TranslateError> {
        let Self { tp, dp, ep, etp, mtp } = *self;
        let sizes = [
            ("megatron tp_size", tp),
            ("megatron dp_size", dp),
            ("megatron ep_size", ep),
            ("megatron etp_size", etp),
        ];
        if let Some((what, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(TranslateError::Zero { what });
        }
        let limit = MAX_RANKS.into();
        let too_large = || TranslateError::TooLarge { what: "megatron ranks", limit };
        if mtp > MAX_LAYERS {
            let limit = MAX_LAYERS.into();
            return Err(TranslateError::TooLarge { what: "num_nextn_predict_layers", limit });
        }
        let pp = u32::try_from(stages.len()).map_err(|_| too_large())?;
        let stage_size = tp.checked_mul(dp).ok_or_else(too_large)?;
        if stage_size.checked_mul(pp).is_none_or(|size| size > MAX_RANKS) {
            return Err(too_large());
        }
        let experts = ep.checked_mul(etp).ok_or_else(too_large)?;
        if !stage_size.is_multiple_of(experts) {
            return Err(TranslateError::Indivisible {
                what: "megatron tp_size * dp_size",
                size: stage_size.into(),
                by_what: "ep_size * etp_size",
                by: experts.into(),
            });
        }
        let mut ranks = Vec::new();
        for (stage, chunks) in (0..).zip(stages) {
            let mtp: Vec<u32> = (0..mtp).filter(|_| stage + 1 == pp).collect();
            for within in 0..stage_size {
                ranks.push(
                    SourceRank::new(stage * stage_size + within, Vec::new())
                        .with_chunks(chunks.clone())
                        .with_mtp(mtp.clone())
                        .with_tp(within % tp, tp)
                        .with_pp(stage, pp)
                        .with_ep(within / etp % ep, ep)
                        .with_etp(within % etp, etp),
                );
            }
        }
        Ok(ranks)
    }
}
