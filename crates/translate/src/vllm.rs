//! The engine's side: what each vLLM rank holds, as bands.
//!
//! The layout is the one after vLLM has loaded a checkpoint and before any kernel has repacked it; for unquantised
//! dense models on CUDA that is the live one. One pipeline stage.

mod facts;
mod rank;

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use refit_planner::{Dtype, LayoutBuilder};

use crate::blockwise::{self, Holder};
use crate::inventory::Inventory;
use crate::post::Refresh;
use crate::roles::TargetCoords;
use crate::slots::{Layer, Place, Slots, TargetSlot};
use crate::{ModelConfig, PostAction, Side, TargetLayout, TensorSpec, TranslateError};

pub use facts::{Device, EngineFacts, LayerFacts, Written};
pub use rank::{EngineModel, EngineSizes, TargetRank};

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
) -> Result<TargetLayout, TranslateError> {
    config.validate()?;
    let coords = rank.coords()?;
    lay_out(config, rank, &coords, slots(config, rank, coords)?, held)
}

/// The layout of a rank with these slots.
pub(crate) fn lay_out(
    config: &ModelConfig,
    rank: &TargetRank,
    coords: &TargetCoords,
    slots: Vec<TargetSlot>,
    held: &[TensorSpec],
) -> Result<TargetLayout, TranslateError> {
    let mut inventory = Inventory::new(Side::Vllm, rank.rank, held)?;
    let mut layout = LayoutBuilder::new(rank.rank);
    let mut derived = BTreeMap::<Refresh, Vec<Arc<str>>>::new();
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
        let role = slot.role.as_ref();
        let view = role.vllm(coords)?;
        let model = slot.facts.dtype.unwrap_or_else(|| config.dtype_of(&slot.logical));
        inventory.check(spec, spec.dtype, &view, model)?;
        let param = view.param(&mut layout, role, &spec.name, spec.dtype, &slot.logical)?;
        layout.param(param.map(slot.facts.map))?;
        if config.is_quantized(&slot.logical) {
            let scales = inventory.scales(&spec.name)?;
            let view = inventory.holder(spec, &slot.logical).scales(role, &view)?;
            inventory.check(scales, scales.dtype, &view, Dtype::F32)?;
            let param = blockwise::param(&view, &mut layout, role, scales, &slot.logical)?;
            layout.param(param)?;
        }
        if let Some(refresh) = slot.facts.refresh {
            derived.entry(refresh).or_default().push(spec.name.clone());
        }
    }
    inventory.finish(|_| false)?;
    let actions = derived.into_iter().map(|(refresh, params)| refresh.action(params));
    let post_actions = actions.chain([PostAction::DropCaches]).collect();
    Ok(TargetLayout { layout: layout.build(), post_actions })
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
    expect(config, rank, &coords, slots(config, rank, coords)?)
}

/// What a rank with these slots holds.
pub(crate) fn expect(
    config: &ModelConfig,
    rank: &TargetRank,
    coords: &TargetCoords,
    slots: Vec<TargetSlot>,
) -> Result<Vec<TensorSpec>, TranslateError> {
    let mut held = Vec::new();
    for slot in slots.into_iter().filter(|slot| !slot.facts.copy) {
        let role = slot.role.as_ref();
        let view = role.vllm(coords)?;
        let dtype = slot.facts.dtype.unwrap_or_else(|| config.dtype_of(&slot.logical));
        let spec = TensorSpec::new(slot.name.as_str(), dtype, view.shape.clone());
        let scales = if config.is_quantized(&slot.logical) {
            let holder = Holder::new(Side::Vllm, rank.rank, &spec, &slot.logical);
            let view = holder.scales(role, &view)?;
            Some(TensorSpec::new(blockwise::name(&slot.name), Dtype::F32, view.shape))
        } else {
            None
        };
        held.push(spec);
        held.extend(scales);
    }
    Ok(held)
}

/// The slots of a rank, in the order of the model.
fn slots(
    config: &ModelConfig,
    rank: &TargetRank,
    at: TargetCoords,
) -> Result<Vec<TargetSlot>, TranslateError> {
    let family = config.family.description();
    let mut slots = Slots::new(Place::Target(at));
    if rank.model == EngineModel::Draft {
        let known = config.mtp_layers;
        let (side, rank, described) = (Side::Vllm, rank.rank, family.mtp.is_some());
        let Some(mtp) = family.mtp.filter(|_| known > 0) else {
            return Err(TranslateError::Mtp { side, rank, got: 1, known, described });
        };
        slots.scope("", "", "");
        (family.first)(config, &mut slots)?;
        for local in 0..known {
            let global = config.num_layers.saturating_add(local);
            mtp(config, Layer { local, global }, &mut slots)?;
        }
        return Ok(slots.into_target());
    }
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
