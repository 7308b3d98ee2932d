//! The trainer's side: what each Megatron-Core rank holds, as bands.
//!
//! Only plain tensors are described. What makes a parameter something else than its name says (FSDP shards, quantised
//! parameter classes, interleaved GLU) its shape cannot tell: have the trainer report [`TrainerFacts`] and check them
//! before anything is published.

mod facts;
mod pipeline;
mod rank;

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use refit_planner::{Dtype, LayoutBuilder, RankLayout};

use crate::inventory::Inventory;
use crate::roles::SourceCoords;
use crate::slots::{Alternative, Layer, Place, Slots, SourceSlot};
use crate::{ModelConfig, Side, TensorSpec, TranslateError};

pub use facts::{ParamFacts, TrainerFacts};
pub use pipeline::{Pipeline, Stages, stages};
pub use rank::{SourceRank, TrainerSizes};

/// Ends of names that trainers list beside parameters and that no engine has:
///
/// - `._extra_state`: Transformer Engine's FP8 bookkeeping, an opaque byte tensor or empty.
pub const IGNORED_SUFFIXES: &[&str] = &["._extra_state"];

/// The layout of a trainer rank that holds these tensors.
///
/// Names that depend on the layer spec are resolved by what is there, per layer. A tied head's copy on the last of
/// several stages is checked and left out: the embedding's own stage is read. Rows of vocabulary padding are in no
/// band. Element types may differ from the model's where a cast joins them.
///
/// # Errors
/// Everything [`ModelConfig::validate`] refuses; [`TranslateError::Rank`], [`TranslateError::Zero`],
/// [`TranslateError::LayerRange`] and [`TranslateError::DuplicateLayer`] for impossible coordinates; the errors of
/// [`SourceRole::megatron`](crate::roles::SourceRole::megatron) for sizes that clash; [`TranslateError::NoParams`],
/// [`TranslateError::DuplicateParam`], [`TranslateError::MissingParam`], [`TranslateError::AmbiguousParam`],
/// [`TranslateError::UntiedHead`], [`TranslateError::Shape`], [`TranslateError::Dtype`], [`TranslateError::Refused`] and
/// [`TranslateError::UnknownParam`] for tensors that are not those of such a rank.
pub fn layout(
    config: &ModelConfig,
    rank: &SourceRank,
    held: &[TensorSpec],
) -> Result<RankLayout, TranslateError> {
    config.validate()?;
    let coords = rank.check(config)?;
    lay_out(config, rank, &coords, &slots(config, rank, coords)?, held)
}

/// The layout of a rank with these slots.
pub(crate) fn lay_out(
    config: &ModelConfig,
    rank: &SourceRank,
    coords: &SourceCoords,
    slots: &[SourceSlot],
    held: &[TensorSpec],
) -> Result<RankLayout, TranslateError> {
    let mut inventory = Inventory::new(Side::Megatron, rank.rank, held)?;
    held.iter().try_for_each(|spec| facts::check_name(&spec.name))?;
    let mut layout = LayoutBuilder::new(rank.rank);
    let sets = sets(&inventory, slots, rank)?;
    for slot in slots {
        let chosen = |it: Alternative| sets.get(&it.choice).copied().unwrap_or_default() == it.set;
        if !slot.alternative.is_none_or(chosen) {
            continue;
        }
        let Some(spec) = resolve(&mut inventory, slot, rank)? else { continue };
        let view = slot.role.megatron(coords, Some(&spec.shape))?;
        inventory.check(spec, &view, slot.facts.dtype.unwrap_or(config.dtype))?;
        if slot.facts.copy {
            continue;
        }
        let role = slot.role.as_ref();
        let param = view.param(&mut layout, role, &spec.name, spec.dtype, &slot.logical)?;
        layout.param(param.map(slot.facts.map))?;
    }
    inventory.finish(|name| IGNORED_SUFFIXES.iter().any(|suffix| name.ends_with(suffix)))?;
    Ok(layout.build())
}

/// The slots of a rank, in the order of the model.
fn slots(
    config: &ModelConfig,
    rank: &SourceRank,
    at: SourceCoords,
) -> Result<Vec<SourceSlot>, TranslateError> {
    let family = config.family.description();
    let mut slots = Slots::new(Place::Source(at));
    for (number, chunk) in rank.chunks.iter().enumerate() {
        let several = rank.chunks.len() > 1;
        slots.begin_chunk(if several { format!("model{number}.") } else { String::new() });
        for (local, &global) in (0..).zip(chunk) {
            let layer = Layer { local, global };
            slots.layer_scope(layer);
            (family.layer)(config, layer, &mut slots)?;
        }
        if rank.pp_rank == 0 && number == 0 {
            slots.scope("", "", "");
            (family.first)(config, &mut slots)?;
        }
        if rank.pp_rank + 1 == rank.pp_size && number + 1 == rank.chunks.len() {
            slots.scope("", "", "");
            (family.last)(config, &mut slots)?;
        }
    }
    Ok(slots.into_source())
}

/// For every choice between sets of slots, the set of which the rank holds something.
fn sets(
    inventory: &Inventory<'_>,
    slots: &[SourceSlot],
    rank: &SourceRank,
) -> Result<BTreeMap<u32, u32>, TranslateError> {
    let mut sets: BTreeMap<u32, (u32, &str)> = BTreeMap::new();
    for slot in slots {
        let Some(it) = slot.alternative else { continue };
        let Some(name) = slot.names.iter().find(|name| inventory.holds(name)) else { continue };
        let (set, earlier) = *sets.entry(it.choice).or_insert((it.set, name));
        if set != it.set {
            return Err(TranslateError::AmbiguousParam {
                rank: rank.rank,
                param: earlier.into(),
                other: name.into(),
            });
        }
    }
    Ok(sets.into_iter().map(|(choice, (set, _))| (choice, set)).collect())
}

/// The one tensor that a slot goes by on this rank; `None` for a copy that is not there.
fn resolve<'a>(
    inventory: &mut Inventory<'a>,
    slot: &SourceSlot,
    rank: &SourceRank,
) -> Result<Option<&'a TensorSpec>, TranslateError> {
    let mut found: Option<&TensorSpec> = None;
    for name in slot.names.iter() {
        let Some(spec) = inventory.claim(name) else { continue };
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
        Some(spec) if slot.facts.copy && rank.pp_size == 1 => {
            Err(TranslateError::UntiedHead { rank: rank.rank, param: spec.name.clone() })
        }
        Some(spec) => Ok(Some(spec)),
        None if slot.facts.copy => Ok(None),
        None => {
            let mut names = slot.names.iter().map(Into::into);
            Err(TranslateError::MissingParam {
                side: Side::Megatron,
                rank: rank.rank,
                param: names.next().unwrap_or_default(),
                alternatives: names.collect(),
            })
        }
    }
}

/// Which modules a trainer's layers are made of; it decides what norms and experts are called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LayerSpec {
    /// Transformer Engine: norms are part of the linear layer behind them, experts of one grouped layer.
    #[default]
    Te,
    /// Megatron's local spec: norms and experts are modules of their own.
    Local,
}

/// What [`expected`] cannot know from the model and the rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TrainerOptions {
    /// What layers are made of.
    pub spec: LayerSpec,
    /// Rows of the vocabulary with the trainer's padding; `None`: as few as divide evenly.
    pub padded_vocab: Option<u64>,
    /// Element type of every parameter that has none of its own; `None`: the model's.
    pub dtype: Option<Dtype>,
}

impl TrainerOptions {
    /// These options with another layer spec.
    #[must_use]
    pub fn with_spec(mut self, spec: LayerSpec) -> Self {
        self.spec = spec;
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
    expect(config, rank, &coords, slots(config, rank, coords)?, options)
}

/// What a rank with these slots holds.
pub(crate) fn expect(
    config: &ModelConfig,
    rank: &SourceRank,
    coords: &SourceCoords,
    slots: Vec<SourceSlot>,
    options: &TrainerOptions,
) -> Result<Vec<TensorSpec>, TranslateError> {
    let mut held = Vec::new();
    for slot in slots {
        let other_set = slot.alternative.is_some_and(|it| it.set > 0);
        if other_set || (slot.facts.copy && rank.pp_size == 1) {
            continue;
        }
        let dtype = slot.facts.dtype.or(options.dtype).unwrap_or(config.dtype);
        let name = match (options.spec, slot.names.local) {
            (LayerSpec::Local, Some(local)) => local,
            _ => slot.names.te,
        };
        let view = slot.role.megatron(coords, None)?;
        held.push(TensorSpec::new(name.as_ref(), dtype, view.shape));
    }
    Ok(held)
}
