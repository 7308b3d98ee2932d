//! The trainer's side: what each Megatron-Core rank holds, as bands.
//!
//! Only plain tensors of one model chunk per rank are described. What makes a parameter something else than its name
//! says (FSDP shards, adapters, quantised parameter classes, interleaved GLU, several virtual-pipeline chunks under
//! one list of names) must be refused where the tensors are collected: their shapes cannot tell.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use refit_planner::{Dtype, LayoutBuilder, RankLayout};

use crate::config::{MAX_LAYERS, MAX_RANKS};
use crate::families::Model;
use crate::inventory::Inventory;
use crate::roles::{Shard, SourceCoords};
use crate::slot::{self, Slot};
use crate::{ModelConfig, Side, TensorSpec, TranslateError};

/// Ends of names that trainers list beside parameters and that no engine has:
///
/// - `._extra_state`: Transformer Engine's FP8 bookkeeping, an opaque byte tensor or empty.
pub const IGNORED_SUFFIXES: &[&str] = &["._extra_state"];

/// A trainer rank: its place in the parallel groups and the layers it has.
///
/// Ranks that differ only in data or context parallelism hold the same; give each its own `rank`, and the planner
/// shares reads out among them.
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
    /// For each local layer, its zero-based number in the whole model. Read it from the modules (`layer_number - 1`)
    /// where there are any: pipeline splits follow many rules. Empty for a stage without layers.
    pub layers: Vec<u32>,
}

impl SourceRank {
    /// A rank with these layers, alone in its groups.
    #[must_use]
    pub fn new(rank: u32, layers: Vec<u32>) -> Self {
        Self { rank, tp_rank: 0, tp_size: 1, pp_rank: 0, pp_size: 1, layers }
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

    /// All ranks of a trainer of these sizes, in Megatron's default order: tensor parallelism varies fastest, then
    /// data parallelism, then the stage. Layers are split evenly.
    ///
    /// # Errors
    /// Those of [`stages`], [`TranslateError::Zero`], and [`TranslateError::TooLarge`] beyond 2^20 ranks.
    pub fn grid(num_layers: u32, tp: u32, pp: u32, dp: u32) -> Result<Vec<Self>, TranslateError> {
        for (what, size) in [("megatron tp_size", tp), ("megatron dp_size", dp)] {
            if size == 0 {
                return Err(TranslateError::Zero { what });
            }
        }
        let stages = stages(num_layers, pp)?;
        let size = tp.checked_mul(dp).and_then(|ranks| ranks.checked_mul(pp));
        if size.is_none_or(|size| size > MAX_RANKS) {
            return Err(TranslateError::TooLarge {
                what: "megatron ranks",
                limit: MAX_RANKS.into(),
            });
        }
        let mut ranks = Vec::new();
        for (stage, layers) in (0..).zip(stages) {
            for within in 0..tp * dp {
                let rank = Self::new(stage * tp * dp + within, layers.clone());
                ranks.push(rank.with_tp(within % tp, tp).with_pp(stage, pp));
            }
        }
        Ok(ranks)
    }

    fn check(&self, config: &ModelConfig) -> Result<SourceCoords, TranslateError> {
        Shard::new("megatron pp_size", self.pp_rank, self.pp_size)?;
        let mut seen = BTreeSet::new();
        for &layer in &self.layers {
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
        SourceCoords::new(self.tp_rank, self.tp_size)
    }

    /// The slots of this rank, with the local and the global number of the layer they belong to.
    fn slots(&self, config: &ModelConfig) -> Vec<(Slot, u32, u32)> {
        let model = Model::new(config);
        let mut slots = Vec::new();
        for (local, &layer) in (0..).zip(&self.layers) {
            slots.extend(model.layer(layer).into_iter().map(|slot| (slot, local, layer)));
        }
        if self.pp_rank == 0 {
            slots.extend(model.first.into_iter().map(|slot| (slot, 0, 0)));
        }
        if self.pp_rank + 1 == self.pp_size {
            slots.extend(model.last.into_iter().map(|slot| (slot, 0, 0)));
        }
        slots
    }
}

/// An even split of the layers over pipeline stages: Megatron's default, without virtual stages.
///
/// # Errors
/// [`TranslateError::Indivisible`] when the stages do not divide the layers, [`TranslateError::Zero`],
/// [`TranslateError::TooLarge`].
pub fn stages(num_layers: u32, pp_size: u32) -> Result<Vec<Vec<u32>>, TranslateError> {
    let what = "num_hidden_layers";
    if num_layers == 0 {
        return Err(TranslateError::Zero { what });
    }
    if num_layers > MAX_LAYERS {
        return Err(TranslateError::TooLarge { what, limit: MAX_LAYERS.into() });
    }
    let group = "megatron pp_size";
    if pp_size == 0 {
        return Err(TranslateError::Zero { what: group });
    }
    if !num_layers.is_multiple_of(pp_size) {
        return Err(TranslateError::Indivisible {
            what,
            size: num_layers.into(),
            by_what: group,
            by: pp_size.into(),
        });
    }
    let each = num_layers / pp_size;
    Ok((0..pp_size).map(|stage| (stage * each..(stage + 1) * each).collect()).collect())
}

/// The layout of a trainer rank that holds these tensors.
///
/// Names that depend on the layer spec are resolved by what is there, per layer. A tied head's copy on the last of
/// several stages is checked and left out: the embedding's own stage is read. Rows of vocabulary padding are in no
/// band. Element types may differ from the model's where a cast joins them.
///
/// # Errors
/// Everything [`ModelConfig::validate`] refuses; [`TranslateError::Rank`], [`TranslateError::LayerRange`] and
/// [`TranslateError::DuplicateLayer`] for impossible coordinates; the errors of [`crate::roles::Role::megatron`] for
/// sizes that clash; [`TranslateError::NoParams`], [`TranslateError::DuplicateParam`],
/// [`TranslateError::MissingParam`], [`TranslateError::AmbiguousParam`], [`TranslateError::UntiedHead`],
/// [`TranslateError::Shape`], [`TranslateError::Dtype`] and [`TranslateError::UnknownParam`] for tensors that are not
/// those of such a rank.
pub fn layout(
    config: &ModelConfig,
    rank: &SourceRank,
    held: &[TensorSpec],
) -> Result<RankLayout, TranslateError> {
    config.validate()?;
    let coords = rank.check(config)?;
    let mut inventory = Inventory::new(Side::Megatron, rank.rank, held)?;
    let mut layout = LayoutBuilder::new(rank.rank);
    for (slot, local, global) in rank.slots(config) {
        let Some(spec) = resolve(&mut inventory, &slot, rank, local)? else { continue };
        let view = slot.role.megatron(&coords, Some(&spec.shape))?;
        inventory.check(spec, &view, config.dtype)?;
        if slot.copy {
            continue;
        }
        let logical = slot.logical_names(global);
        view.place(&mut layout, slot.role.as_ref(), &spec.name, spec.dtype, &logical)?;
    }
    inventory.finish(|name| IGNORED_SUFFIXES.iter().any(|suffix| name.ends_with(suffix)))?;
    Ok(layout.build())
}

/// The one tensor that a slot goes by on this rank; `None` for a copy that is not there.
fn resolve<'a>(
    inventory: &mut Inventory<'a>,
    slot: &Slot,
    rank: &SourceRank,
    local: u32,
) -> Result<Option<&'a TensorSpec>, TranslateError> {
    let mut found: Option<&TensorSpec> = None;
    for template in slot.megatron {
        let Some(spec) = inventory.claim(&slot::numbered(template, local)) else { continue };
        if let Some(earlier) = found {
            return Err(TranslateError::AmbiguousParam {
                rank: rank.rank,
                param: earlier.name.clone(),
                other: spec.name.clone(),
            });
        }
        found = Some(spec);
    }
    match found {
        Some(spec) if slot.copy && rank.pp_size == 1 => {
            Err(TranslateError::UntiedHead { rank: rank.rank, param: spec.name.clone() })
        }
        Some(spec) => Ok(Some(spec)),
        None if slot.copy => Ok(None),
        None => {
            let mut names = slot.megatron.iter().map(|template| slot::name(template, local));
            Err(TranslateError::MissingParam {
                side: Side::Megatron,
                rank: rank.rank,
                param: names.next().unwrap_or_default(),
                alternatives: names.collect(),
            })
        }
    }
}

/// Which modules a trainer's layers are made of; it decides what norms are called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum NormSpec {
    /// Transformer Engine: norms are part of the linear layer behind them.
    #[default]
    Te,
    /// Megatron's local spec: norms are modules of their own.
    Local,
}

/// What [`expected`] cannot know from the model and the rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TrainerOptions {
    /// What norms are called.
    pub norms: NormSpec,
    /// Rows of the vocabulary with the trainer's padding; `None`: as few as divide evenly.
    pub padded_vocab: Option<u64>,
    /// Element type of every parameter; `None`: the model's.
    pub dtype: Option<Dtype>,
}

impl TrainerOptions {
    /// These options with other norms.
    #[must_use]
    pub fn with_norms(mut self, norms: NormSpec) -> Self {
        self.norms = norms;
        self
    }

    /// These options with a vocabulary padded to this many rows.
    #[must_use]
    pub fn with_padded_vocab(mut self, rows: u64) -> Self {
        self.padded_vocab = Some(rows);
        self
    }

    /// These options with another element type.
    #[must_use]
    pub fn with_dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = Some(dtype);
        self
    }
}

/// What such a rank holds, in the order of the model: for planning without a trainer.
///
/// # Errors
/// As [`layout`], as far as sizes and coordinates go.
pub fn expected(
    config: &ModelConfig,
    rank: &SourceRank,
    options: &TrainerOptions,
) -> Result<Vec<TensorSpec>, TranslateError> {
    config.validate()?;
    let coords = rank.check(config)?.with_padded_vocab(options.padded_vocab);
    let dtype = options.dtype.unwrap_or(config.dtype);
    let mut held = Vec::new();
    for (slot, local, _) in rank.slots(config) {
        if slot.copy && rank.pp_size == 1 {
            continue;
        }
        let template = match options.norms {
            NormSpec::Te => slot.megatron.first(),
            NormSpec::Local => slot.megatron.last(),
        };
        let Some(template) = template else { continue };
        let view = slot.role.megatron(&coords, None)?;
        held.push(TensorSpec::new(slot::name(template, local), dtype, view.shape));
    }
    Ok(held)
}
