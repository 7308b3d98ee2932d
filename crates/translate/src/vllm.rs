//! The engine's side: what each vLLM rank holds, as bands.
//!
//! The layout is the one after vLLM has loaded a checkpoint and before any kernel has repacked it; for unquantised
//! dense models on CUDA that is the live one. One pipeline stage.

mod facts;
mod rank;

use alloc::vec;
use alloc::vec::Vec;

use refit_planner::{LayoutBuilder, RankLayout};

use crate::inventory::Inventory;
use crate::roles::TargetCoords;
use crate::slots::{Layer, Place, Slots, TargetSlot};
use crate::{ModelConfig, Side, TensorSpec, TranslateError};

pub use facts::{Device, EngineFacts, LayerFacts};
pub use rank::{EngineSizes, TargetRank};

/// The layout of an engine rank that holds these tensors.
///
/// Rows of vocabulary padding are zero. A head that the engine has untied although the model ties it gets the
/// embedding's rows. Element types may differ from the model's where a cast joins them.
///
/// # Errors
/// Everything [`ModelConfig::validate`] refuses; [`TranslateError::Rank`],
/// [`TranslateError::TooLarge`] and [`TranslateError::Combination`] for impossible coordinates; the errors of
/// [`crate::roles::TargetRole::vllm`] for sizes that clash; [`TranslateError::NoParams`],
/// [`TranslateError::DuplicateParam`], [`TranslateError::MissingParam`], [`TranslateError::Shape`],
/// [`TranslateError::Dtype`] and [`TranslateError::UnknownParam`] for tensors that are not those of such a rank.
pub fn layout(
    config: &ModelConfig,
    rank: &TargetRank,
    held: &[TensorSpec],
) -> Result<RankLayout, TranslateError> {
    config.validate()?;
    let coords = rank.coords()?;
    lay_out(config, rank, &coords, slots(config, coords)?, held)
}

/// The layout of a rank with these slots.
pub(crate) fn lay_out(
    config: &ModelConfig,
    rank: &TargetRank,
    coords: &TargetCoords,
    slots: Vec<TargetSlot>,
    held: &[TensorSpec],
) -> Result<RankLayout, TranslateError> {
    let mut inventory = Inventory::new(Side::Vllm, rank.rank, held)?;
    let mut layout = LayoutBuilder::new(rank.rank);
    for slot in slots {
        let Some(spec) = inventory.claim(&slot.name) else {
            if slot.facts.copy {
                continue;
            }
            return Err(TranslateError::MissingParam {
                side: Side::Vllm,
                rank: rank.rank,
                param: slot.name.into(),
                alternatives: vec![],
            });
        };
        let view = slot.role.vllm(coords)?;
        inventory.check(spec, &view, slot.facts.dtype.unwrap_or(config.dtype))?;
        let role = slot.role.as_ref();
        let param = view.param(&mut layout, role, &spec.name, spec.dtype, &slot.logical)?;
        layout.param(param.map(slot.facts.map))?;
    }
    inventory.finish(|_| false)?;
    Ok(layout.build())
}

/// What such a rank holds, in the order of the model: for planning without an engine.
///
/// # Errors
/// As [`layout`], as far as sizes and coordinates go.
pub fn expected(
    config: &ModelConfig,
    rank: &TargetRank,
) -> Result<Vec<TensorSpec>, TranslateError> {
    config.validate()?;
    let coords = rank.coords()?;
    expect(config, &coords, slots(config, coords)?)
}

/// What a rank with these slots holds.
pub(crate) fn expect(
    config: &ModelConfig,
    coords: &TargetCoords,
    slots: Vec<TargetSlot>,
) -> Result<Vec<TensorSpec>, TranslateError> {
    let mut held = Vec::new();
    for slot in slots.into_iter().filter(|slot| !slot.facts.copy) {
        let view = slot.role.vllm(coords)?;
        held.push(TensorSpec::new(slot.name, slot.facts.dtype.unwrap_or(config.dtype), view.shape));
    }
    Ok(held)
}

/// The slots of a rank, in the order of the model.
fn slots(config: &ModelConfig, at: TargetCoords) -> Result<Vec<TargetSlot>, TranslateError> {
    let family = config.family.description();
    let mut slots = Slots::new(Place::Target(at));
    for global in 0..config.num_layers {
        let layer = Layer { local: global, global };
        slots.layer_scope(layer);
        (family.layer)(config, layer, &mut slots)?;
    }
    slots.scope("", "", "");
    (family.first)(config, &mut slots)?;
    (family.last)(config, &mut slots)?;
    Ok(slots.into_target())
}
