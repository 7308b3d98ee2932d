//! Where a rank stands in the groups that share out parameters.

use alloc::vec::Vec;
use core::ops::Range;

use crate::TranslateError;
use crate::config::MAX_EXPERTS;

const EXPERTS: &str = "number of experts";

/// A rank's place in a group that shares out a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shard {
    group: &'static str,
    rank: u32,
    size: u32,
}

impl Shard {
    /// Place `rank` in a group of `size`; `group` names the size in errors.
    ///
    /// # Errors
    /// [`TranslateError::Zero`] and [`TranslateError::Rank`].
    pub fn new(group: &'static str, rank: u32, size: u32) -> Result<Self, TranslateError> {
        match size {
            0 => Err(TranslateError::Zero { what: group }),
            _ if rank >= size => Err(TranslateError::Rank { group, rank, size }),
            _ => Ok(Self { group, rank, size }),
        }
    }

    /// The only place there is: nothing is shared out.
    #[must_use]
    pub const fn whole(group: &'static str) -> Self {
        Self { group, rank: 0, size: 1 }
    }

    /// The place, from 0.
    #[must_use]
    pub fn rank(&self) -> u64 {
        self.rank.into()
    }

    /// How many places there are.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size.into()
    }

    /// What the size is called.
    #[must_use]
    pub fn group(&self) -> &'static str {
        self.group
    }

    /// This place's part of `total`: `[total / size * rank, total / size * (rank + 1))`.
    ///
    /// # Errors
    /// [`TranslateError::Indivisible`], which calls `total` by the name `what`.
    pub fn cut(&self, what: &'static str, total: u64) -> Result<Range<u64>, TranslateError> {
        let size = self.size();
        if !total.is_multiple_of(size) {
            return Err(TranslateError::Indivisible {
                what,
                size: total,
                by_what: self.group,
                by: size,
            });
        }
        let each = total / size;
        Ok(each * self.rank()..each * self.rank() + each)
    }
}

/// Which ranks share out a parameter: the other layers' tensor-parallel group, or one of the experts' own.
///
/// Column, row and gated roles are sharded by [`Group::Dense`] unless [`Over`](super::Over) says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Group {
    /// Trainer: tensor parallelism. Engine: tensor parallelism.
    Dense,
    /// Experts that every token visits. Trainer: tensor parallelism, not that of routed experts. Engine: tensor
    /// parallelism, or nothing when MoE is sequence-parallel.
    SharedExperts,
    /// Inside of one routed expert. Trainer: expert tensor parallelism. Engine: all ranks without expert parallelism,
    /// nothing with it.
    RoutedExperts,
}

/// Where a trainer rank stands in the groups that share out parameters.
///
/// Dense layers and routed experts factor the same ranks differently (`tp * cp * dp` and `etp * ep * edp`), so neither
/// place follows from the other: publish both. Copies (context-, data- and expert-data-parallel) have no coordinate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct SourceCoords {
    /// Tensor parallelism of dense parameters.
    pub tp: Shard,
    /// Expert parallelism: which experts.
    pub ep: Shard,
    /// Expert tensor parallelism: which part of each of them.
    pub etp: Shard,
    /// Rows of the padded vocabulary over all ranks, where no held tensor says it. `None`: as few as divide evenly.
    pub padded_vocab: Option<u64>,
}

impl SourceCoords {
    /// Tensor-parallel rank `tp_rank` of `tp_size`, alone in the experts' groups.
    ///
    /// # Errors
    /// [`TranslateError::Zero`] and [`TranslateError::Rank`].
    pub fn new(tp_rank: u32, tp_size: u32) -> Result<Self, TranslateError> {
        Ok(Self {
            tp: Shard::new("megatron tp_size", tp_rank, tp_size)?,
            ep: Shard::whole("megatron ep_size"),
            etp: Shard::whole("megatron etp_size"),
            padded_vocab: None,
        })
    }

    /// These coordinates at another place of the expert-parallel group.
    ///
    /// # Errors
    /// [`TranslateError::Zero`] and [`TranslateError::Rank`].
    pub fn with_ep(mut self, ep_rank: u32, ep_size: u32) -> Result<Self, TranslateError> {
        self.ep = Shard::new("megatron ep_size", ep_rank, ep_size)?;
        Ok(self)
    }

    /// These coordinates at another place of the expert-tensor-parallel group.
    ///
    /// # Errors
    /// [`TranslateError::Zero`] and [`TranslateError::Rank`].
    pub fn with_etp(mut self, etp_rank: u32, etp_size: u32) -> Result<Self, TranslateError> {
        self.etp = Shard::new("megatron etp_size", etp_rank, etp_size)?;
        Ok(self)
    }

    /// These coordinates with a known padded vocabulary.
    #[must_use]
    pub fn with_padded_vocab(mut self, rows: Option<u64>) -> Self {
        self.padded_vocab = rows;
        self
    }

    /// The global numbers of this rank's routed experts, of `total`: an even share, in order. Local expert `k` is the
    /// `k`-th of them.
    ///
    /// # Errors
    /// [`TranslateError::Indivisible`], [`TranslateError::TooLarge`] beyond 2^16.
    pub fn experts(&self, total: u64) -> Result<Range<u64>, TranslateError> {
        check_experts(total)?;
        self.ep.cut(EXPERTS, total)
    }

    /// The place in the group that shares out this kind of parameter.
    #[must_use]
    pub fn shard(&self, group: Group) -> Shard {
        match group {
            Group::Dense | Group::SharedExperts => self.tp,
            Group::RoutedExperts => self.etp,
        }
    }

    /// These coordinates as a role sees them whose parameter `group` shares out instead of tensor parallelism.
    pub(super) fn over(mut self, group: Group) -> Self {
        self.tp = self.shard(group);
        self
    }
}

/// Which experts an engine rank gets under expert parallelism, `E` experts over `n` ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Placement {
    /// In order; the first `E mod n` ranks get one more.
    #[default]
    Linear,
    /// Rank `r` gets `r`, `r + n`, `r + 2n` and so on. vLLM takes it for models whose routing has groups, without
    /// redundant experts, and with the all-to-all backends DeepEP low latency and NIXL EP or none; elsewhere it logs
    /// that it falls back to [`Placement::Linear`], which is then what to say here.
    RoundRobin,
}

/// What vLLM calls the parameters of routed experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ExpertNames {
    /// `experts.w13_weight`: before 0.25.
    Flat,
    /// `experts.routed_experts.w13_weight`: from 0.25.1 on.
    #[default]
    Routed,
}

impl ExpertNames {
    /// What stands before `w13_weight`.
    #[must_use]
    pub const fn prefix(self) -> &'static str {
        match self {
            Self::Flat => "experts.",
            Self::Routed => "experts.routed_experts.",
        }
    }
}

/// Where an engine rank stands in the groups that share out parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct TargetCoords {
    /// Tensor parallelism of dense parameters.
    pub tp: Shard,
    /// The ranks that routed experts are spread over, `dp * pcp * tp` of them, tensor-parallel rank fastest.
    pub flat: Shard,
    /// How `flat` shares routed experts: whole experts, or (`None`) an even part of every expert.
    pub placement: Option<Placement>,
    /// Whether every rank holds shared experts whole.
    pub whole_shared_experts: bool,
    /// What parameters of routed experts are called.
    pub expert_names: ExpertNames,
}

impl TargetCoords {
    /// Tensor-parallel rank `tp_rank` of `tp_size`, no data parallelism, no expert parallelism.
    ///
    /// # Errors
    /// [`TranslateError::Zero`] and [`TranslateError::Rank`].
    pub fn new(tp_rank: u32, tp_size: u32) -> Result<Self, TranslateError> {
        let tp = Shard::new("vllm tp_size", tp_rank, tp_size)?;
        Ok(Self {
            tp,
            flat: tp,
            placement: None,
            whole_shared_experts: false,
            expert_names: ExpertNames::default(),
        })
    }

    /// These coordinates with routed experts spread over `size` ranks, of which this is `rank`.
    ///
    /// # Errors
    /// [`TranslateError::Zero`] and [`TranslateError::Rank`].
    pub fn with_flat(mut self, rank: u32, size: u32) -> Result<Self, TranslateError> {
        self.flat = Shard::new("vllm dp_size * pcp_size * tp_size", rank, size)?;
        Ok(self)
    }

    /// These coordinates with expert parallelism.
    #[must_use]
    pub fn with_expert_parallel(mut self, placement: Placement) -> Self {
        self.placement = Some(placement);
        self
    }

    /// The global numbers of this rank's routed experts, of `total`, by local slot.
    ///
    /// # Errors
    /// [`TranslateError::TooFewExperts`] when ranks would be left without one, [`TranslateError::TooLarge`] beyond 2^16.
    pub fn experts(&self, total: u64) -> Result<Vec<u64>, TranslateError> {
        check_experts(total)?;
        let (rank, size) = (self.flat.rank(), self.flat.size());
        let Some(placement) = self.placement else { return Ok((0..total).collect()) };
        if total < size {
            return Err(TranslateError::TooFewExperts { experts: total, ranks: size });
        }
        Ok(match placement {
            Placement::Linear => {
                let (each, more) = (total / size, total % size);
                let start = rank * each + rank.min(more);
                (start..start + each + u64::from(rank < more)).collect()
            }
            Placement::RoundRobin => {
                (0..).map(|turn| rank + turn * size).take_while(|&expert| expert < total).collect()
            }
        })
    }

    /// The place in the group that shares out this kind of parameter.
    #[must_use]
    pub fn shard(&self, group: Group) -> Shard {
        match group {
            Group::Dense => self.tp,
            Group::SharedExperts if self.whole_shared_experts => Shard::whole(self.tp.group()),
            Group::SharedExperts => self.tp,
            Group::RoutedExperts if self.placement.is_some() => Shard::whole(self.flat.group()),
            Group::RoutedExperts => self.flat,
        }
    }

    /// These coordinates as a role sees them whose parameter `group` shares out instead of tensor parallelism.
    pub(super) fn over(mut self, group: Group) -> Self {
        self.tp = self.shard(group);
        self
    }
}

fn check_experts(total: u64) -> Result<(), TranslateError> {
    if total > MAX_EXPERTS {
        return Err(TranslateError::TooLarge { what: EXPERTS, limit: MAX_EXPERTS });
    }
    Ok(())
}
