//! An engine rank's coordinates, and all of them.

use alloc::vec::Vec;

use crate::TranslateError;
use crate::config::MAX_RANKS;
use crate::roles::{ExpertNames, Placement, Shard, TargetCoords};

const DP: &str = "vllm dp_size";
const PCP: &str = "vllm pcp_size";

/// An engine rank and its place in the parallel groups.
///
/// Dense layers are the same in every data-parallel rank. Routed experts are not: they are spread over *all* ranks,
/// `dp * pcp * tp` of them, whether by whole experts ([`TargetRank::with_expert_parallel`]) or, without, by parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct TargetRank {
    /// Unique among engine ranks.
    pub rank: u32,
    /// Place in the tensor-parallel group.
    pub tp_rank: u32,
    /// Tensor-parallel size.
    pub tp_size: u32,
    /// Data-parallel rank.
    pub dp_rank: u32,
    /// Data-parallel size, of one engine; engines of their own are ranks of their own.
    pub dp_size: u32,
    /// Prefill-context-parallel rank.
    pub pcp_rank: u32,
    /// Prefill-context-parallel size.
    pub pcp_size: u32,
    /// Expert parallelism (`enable_expert_parallel`) and which experts a rank then gets.
    pub expert_parallel: Option<Placement>,
    /// Whether MoE layers are sequence-parallel, which leaves every rank with whole shared experts. vLLM does so with
    /// expert parallelism, `tp_size > 1` and `dp_size > 1`, depending on the all-to-all backend.
    pub sequence_parallel_moe: bool,
    /// What this release calls parameters of routed experts.
    pub expert_names: ExpertNames,
    /// Which of the engine's module trees these are the parameters of.
    pub model: EngineModel,
}

/// One of the models that an engine runs, each a module tree of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EngineModel {
    /// The model itself. It has no layers that predict tokens further ahead.
    #[default]
    Main,
    /// The draft model of speculative decoding with the model's own predicting layers (`method` mtp): those layers,
    /// and an embedding and heads that hold what the main model's do. Refit it as a target of its own.
    Draft,
}

impl TargetRank {
    /// Rank `rank`, at place `tp_rank` of `tp_size`.
    #[must_use]
    pub fn new(rank: u32, tp_rank: u32, tp_size: u32) -> Self {
        Self {
            rank,
            tp_rank,
            tp_size,
            dp_rank: 0,
            dp_size: 1,
            pcp_rank: 0,
            pcp_size: 1,
            expert_parallel: None,
            sequence_parallel_moe: false,
            expert_names: ExpertNames::default(),
            model: EngineModel::Main,
        }
    }

    /// This rank at another place of the data-parallel group.
    #[must_use]
    pub fn with_dp(mut self, dp_rank: u32, dp_size: u32) -> Self {
        (self.dp_rank, self.dp_size) = (dp_rank, dp_size);
        self
    }

    /// This rank at another place of the prefill-context-parallel group.
    #[must_use]
    pub fn with_pcp(mut self, pcp_rank: u32, pcp_size: u32) -> Self {
        (self.pcp_rank, self.pcp_size) = (pcp_rank, pcp_size);
        self
    }

    /// This rank with expert parallelism.
    #[must_use]
    pub fn with_expert_parallel(mut self, placement: Placement) -> Self {
        self.expert_parallel = Some(placement);
        self
    }

    /// This rank with sequence-parallel MoE layers.
    #[must_use]
    pub fn with_sequence_parallel_moe(mut self) -> Self {
        self.sequence_parallel_moe = true;
        self
    }

    /// This rank of a release with other names.
    #[must_use]
    pub fn with_expert_names(mut self, names: ExpertNames) -> Self {
        self.expert_names = names;
        self
    }

    /// This rank's part of another of the engine's models.
    #[must_use]
    pub fn with_model(mut self, model: EngineModel) -> Self {
        self.model = model;
        self
    }

    /// All ranks of one engine with tensor parallelism alone.
    ///
    /// # Errors
    /// Those of [`EngineSizes::ranks`].
    pub fn grid(tp_size: u32) -> Result<Vec<Self>, TranslateError> {
        EngineSizes::new(tp_size).ranks()
    }

    /// What roles ask of this rank.
    pub(super) fn coords(&self) -> Result<TargetCoords, TranslateError> {
        let Self { tp_rank, tp_size, dp_rank, dp_size, pcp_rank, pcp_size, .. } = *self;
        Shard::new(DP, dp_rank, dp_size)?;
        Shard::new(PCP, pcp_rank, pcp_size)?;
        let mut at = TargetCoords::new(tp_rank, tp_size)?;
        let size = EngineSizes::new(tp_size).with_dp(dp_size).with_pcp(pcp_size).world()?;
        if dp_size.max(pcp_size) > 1 {
            // No product can overflow: it is less than the size.
            at = at.with_flat((dp_rank * pcp_size + pcp_rank) * tp_size + tp_rank, size)?;
        }
        if self.sequence_parallel_moe
            && (self.expert_parallel.is_none() || tp_size == 1 || dp_size == 1)
        {
            return Err(TranslateError::Combination {
                what: "sequence-parallel MoE",
                why: "vLLM takes it with expert parallelism, tp_size > 1 and dp_size > 1 only",
            });
        }
        at.placement = self.expert_parallel;
        at.whole_shared_experts = self.sequence_parallel_moe;
        at.expert_names = self.expert_names;
        Ok(at)
    }
}

/// Parallel sizes of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineSizes {
    /// Tensor parallelism.
    pub tp: u32,
    /// Data parallelism.
    pub dp: u32,
    /// Prefill context parallelism.
    pub pcp: u32,
    /// See [`TargetRank::expert_parallel`].
    pub expert_parallel: Option<Placement>,
    /// See [`TargetRank::sequence_parallel_moe`].
    pub sequence_parallel_moe: bool,
    /// See [`TargetRank::expert_names`].
    pub expert_names: ExpertNames,
    /// See [`TargetRank::model`].
    pub model: EngineModel,
}

impl EngineSizes {
    /// Tensor parallelism alone.
    #[must_use]
    pub fn new(tp: u32) -> Self {
        Self {
            tp,
            dp: 1,
            pcp: 1,
            expert_parallel: None,
            sequence_parallel_moe: false,
            expert_names: ExpertNames::default(),
            model: EngineModel::Main,
        }
    }

    /// These sizes with data parallelism.
    #[must_use]
    pub fn with_dp(mut self, dp: u32) -> Self {
        self.dp = dp;
        self
    }

    /// These sizes with prefill context parallelism.
    #[must_use]
    pub fn with_pcp(mut self, pcp: u32) -> Self {
        self.pcp = pcp;
        self
    }

    /// These sizes with expert parallelism.
    #[must_use]
    pub fn with_expert_parallel(mut self, placement: Placement) -> Self {
        self.expert_parallel = Some(placement);
        self
    }

    /// These sizes with sequence-parallel MoE layers.
    #[must_use]
    pub fn with_sequence_parallel_moe(mut self) -> Self {
        self.sequence_parallel_moe = true;
        self
    }

    /// These sizes, for another of the engine's models.
    #[must_use]
    pub fn with_model(mut self, model: EngineModel) -> Self {
        self.model = model;
        self
    }

    /// How many ranks there are.
    ///
    /// # Errors
    /// [`TranslateError::Zero`], and [`TranslateError::TooLarge`] beyond 2^20 ranks.
    pub fn world(&self) -> Result<u32, TranslateError> {
        let Self { tp, dp, pcp, .. } = *self;
        for (what, size) in [("vllm tp_size", tp), (DP, dp), (PCP, pcp)] {
            if size == 0 {
                return Err(TranslateError::Zero { what });
            }
        }
        let size = tp.checked_mul(dp).and_then(|size| size.checked_mul(pcp));
        size.filter(|size| *size <= MAX_RANKS)
            .ok_or_else(|| TranslateError::TooLarge { what: "vllm ranks", limit: MAX_RANKS.into() })
    }

    /// All ranks, in vLLM's order: tensor parallelism varies fastest, then prefill context parallelism, then data
    /// parallelism.
    ///
    /// # Errors
    /// Those of [`EngineSizes::world`].
    pub fn ranks(&self) -> Result<Vec<TargetRank>, TranslateError> {
        let Self { tp, dp, pcp, .. } = *self;
        let rank = |number: u32| TargetRank {
            expert_parallel: self.expert_parallel,
            sequence_parallel_moe: self.sequence_parallel_moe,
            expert_names: self.expert_names,
            model: self.model,
            ..TargetRank::new(number, number % tp, tp)
                .with_pcp(number / tp % pcp, pcp)
                .with_dp(number / tp / pcp, dp)
        };
        Ok((0..self.world()?).map(rank).collect())
    }
}
