//! The trainer's side: what each Megatron-Core rank holds, as bands.
//!
//! Only plain tensors are described, and parameters in blockwise FP8 as two of them: the elements under the parameter's
//! name (Transformer Engine's `rowwise_data`, e4m3 or its bytes) and under the same name with `_scale_inv` the scales
//! (`rowwise_scale_inv`, f32, `[ceil(rows / 128), ceil(columns / 128)]`, the latter as it is or rounded up to a multiple
//! of 4). What makes a parameter something else than its name says (FSDP shards, other quantised parameter classes,
//! interleaved GLU) its shape cannot tell: have the trainer report [`TrainerFacts`] and check them before anything is
//! published.

mod facts;
mod pipeline;
mod rank;

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use refit_planner::{Dtype, LayoutBuilder, RankLayout};

use crate::blockwise::{self, Holder};
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
        let role = slot.role.as_ref();
        let view = role.megatron(coords, Some(&spec.shape))?;
        let quantized = config.is_quantized(&slot.logical);
        // Raw data of a quantised parameter may be reported as bytes.
        let dtype = if quantized && spec.dtype == Dtype::U8 { Dtype::F8E4m3 } else { spec.dtype };
        let model = slot.facts.dtype.unwrap_or_else(|| config.dtype_of(&slot.logical));
        inventory.check(spec, dtype, &view, model)?;
        if slot.facts.copy {
            continue;
        }
        let param = view.param(&mut layout, role, &spec.name, dtype, &slot.logical)?;
        layout.param(param.map(slot.facts.map))?;
        if quantized {
            let scales = inventory.scales(&spec.name)?;
            let held = Some(scales.shape.as_slice());
            let view = inventory.holder(spec, &slot.logical).scales(role, &view)?;
            let view = blockwise::padded(view, held);
            inventory.check(scales, scales.dtype, &view, Dtype::F32)?;
            let param = blockwise::param(&view, &mut layout, role, scales, &slot.logical)?;
            layout.param(param)?;
        }
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
        if let Some(mtp) = family.mtp.filter(|_| number + 1 == rank.chunks.len()) {
            for (local, &global) in (0..).zip(&rank.mtp) {
                let global = config.num_layers.saturating_add(global);
                mtp(config, Layer { local, global }, &mut slots)?;
            }
            if !rank.mtp.is_empty() && rank.pp_rank > 0 {
                // The embedding of their own stage's tokens; the first stage's is read.
                slots.scope("", "", "");
                slots.copies(|slots| (family.first)(config, slots))?;
            }
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
        Some(spec) => match slot.facts.unwanted {
            Some(why) => {
                Err(TranslateError::Unwanted { rank: rank.rank, param: spec.name.clone(), why })
            }
            None => Ok(Some(spec)),
        },
        None if slot.facts.copy || slot.facts.unwanted.is_some() => Ok(None),
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
    let mut coords = rank.check(config)?.with_padded_vocab(options.padded_vocab);
    coords.sharded_latents = options.spec == LayerSpec::Local;
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
        let absent = slot.facts.unwanted.is_some() || (slot.facts.copy && rank.pp_size == 1);
        if other_set || absent {
            continue;
        }
        let quantized = config.is_quantized(&slot.logical);
        let dtype = match slot.facts.dtype {
            Some(dtype) => dtype,
            None if quantized => Dtype::F8E4m3,
            None => options.dtype.unwrap_or(config.dtype),
        };
        let name = match (options.spec, slot.names.local) {
            (LayerSpec::Local, Some(local)) => local,
            _ => slot.names.te,
        };
        let role = slot.role.as_ref();
        let view = role.megatron(coords, None)?;
        let spec = TensorSpec::new(name.as_ref(), dtype, view.shape.clone());
        let scales = if quantized {
            let holder = Holder::new(Side::Megatron, rank.rank, &spec, &slot.logical);
            let view = blockwise::padded(holder.scales(role, &view)?, None);
            Some(TensorSpec::new(blockwise::name(&name), Dtype::F32, view.shape))
        } else {
            None
        };
        held.push(spec);
        held.extend(scales);
    }
    Ok(held)
}
