//! The engine's side: what each vLLM rank holds, as bands.
//!
//! The layout is the one after vLLM has loaded a checkpoint and before any kernel has repacked it; for unquantised
//! dense models on CUDA that is the live one. One pipeline stage.

use alloc::vec;
use alloc::vec::Vec;

use refit_planner::{LayoutBuilder, RankLayout};

use crate::config::MAX_RANKS;
use crate::families::Model;
use crate::inventory::Inventory;
use crate::roles::TargetCoords;
use crate::slot::{self, Slot};
use crate::{ModelConfig, Side, TensorSpec, TranslateError};

/// An engine rank and its place in the parallel groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct TargetRank {
    /// Unique among engine ranks.
    pub rank: u32,
    /// Place in the tensor-parallel group.
    pub tp_rank: u32,
    /// Tensor-parallel size.
    pub tp_size: u32,
}

impl TargetRank {
    /// Rank `rank`, at place `tp_rank` of `tp_size`.
    #[must_use]
    pub fn new(rank: u32, tp_rank: u32, tp_size: u32) -> Self {
        Self { rank, tp_rank, tp_size }
    }

    /// All ranks of one engine.
    ///
    /// # Errors
    /// [`TranslateError::Zero`], and [`TranslateError::TooLarge`] beyond 2^20 ranks.
    pub fn grid(tp_size: u32) -> Result<Vec<Self>, TranslateError> {
        let what = "vllm tp_size";
        match tp_size {
            0 => Err(TranslateError::Zero { what }),
            _ if tp_size > MAX_RANKS => {
                Err(TranslateError::TooLarge { what, limit: MAX_RANKS.into() })
            }
            _ => Ok((0..tp_size).map(|rank| Self::new(rank, rank, tp_size)).collect()),
        }
    }
}

/// The layout of an engine rank that holds these tensors.
///
/// Rows of vocabulary padding are zero. A head that the engine has untied although the model ties it gets the
/// embedding's rows. Element types may differ from the model's where a cast joins them.
///
/// # Errors
/// Everything [`ModelConfig::validate`] refuses; [`TranslateError::Rank`] for impossible coordinates; the errors of
/// [`crate::roles::Role::vllm`] for sizes that clash; [`TranslateError::NoParams`],
/// [`TranslateError::DuplicateParam`], [`TranslateError::MissingParam`], [`TranslateError::Shape`],
/// [`TranslateError::Dtype`] and [`TranslateError::UnknownParam`] for tensors that are not those of such a rank.
pub fn layout(
    config: &ModelConfig,
    rank: &TargetRank,
    held: &[TensorSpec],
) -> Result<RankLayout, TranslateError> {
    config.validate()?;
    let coords = TargetCoords::new(rank.tp_rank, rank.tp_size)?;
    let mut inventory = Inventory::new(Side::Vllm, rank.rank, held)?;
    let mut layout = LayoutBuilder::new(rank.rank);
    for (slot, layer) in slots(config) {
        let name = slot::name(slot.vllm, layer);
        let Some(spec) = inventory.claim(&name) else {
            if slot.copy {
                continue;
            }
            return Err(TranslateError::MissingParam {
                side: Side::Vllm,
                rank: rank.rank,
                param: name,
                alternatives: vec![],
            });
        };
        let view = slot.role.vllm(&coords)?;
        inventory.check(spec, &view, config.dtype)?;
        let logical = slot.logical_names(layer);
        view.place(&mut layout, slot.role.as_ref(), &spec.name, spec.dtype, &logical)?;
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
    let coords = TargetCoords::new(rank.tp_rank, rank.tp_size)?;
    let mut held = Vec::new();
    for (slot, layer) in slots(config).into_iter().filter(|(slot, _)| !slot.copy) {
        let view = slot.role.vllm(&coords)?;
        held.push(TensorSpec::new(slot::name(slot.vllm, layer), config.dtype, view.shape));
    }
    Ok(held)
}

/// Every slot of the model, with the number of the layer it belongs to.
fn slots(config: &ModelConfig) -> Vec<(Slot, u32)> {
    let model = Model::new(config);
    let mut slots: Vec<(Slot, u32)> = Vec::new();
    for layer in 0..config.num_layers {
        slots.extend(model.layer(layer).into_iter().map(|slot| (slot, layer)));
    }
    let Model { first, last, .. } = model;
    slots.extend(first.into_iter().chain(last).map(|slot| (slot, 0)));
    slots
}
