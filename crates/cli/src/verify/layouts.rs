//! Where the layouts of one side of a case come from: its model, or a file that it brings.

use std::collections::BTreeMap;

use refit::planner::RankLayout;
use refit::translate::bands::Side;
use refit::translate::{ModelConfig, TensorSpec, TranslateError, megatron, vllm};

use super::Failure;
use crate::case::{Case, SourceFile, TargetFile};

/// The layouts of one side.
pub(super) enum Layouts {
    /// What ranks of a supported model hold.
    Model(Box<ModelConfig>),
    /// By rank, as the case says.
    Bands(BTreeMap<u32, RankLayout>),
}

impl Layouts {
    /// What the case brings comes first: somebody took the trouble.
    pub(super) fn of(case: &Case, side: Side) -> Result<Self, Failure> {
        if let Some(bands) = case.bands(side)? {
            return Ok(Self::Bands(bands));
        }
        match ModelConfig::from_json(&case.config) {
            Ok(config) => Ok(Self::Model(Box::new(config))),
            Err(source @ TranslateError::UnsupportedModel { .. }) => {
                Err(Failure::Model { source, side })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The layout of a trainer rank that holds these tensors.
    pub(super) fn source(
        &self,
        case: &Case,
        file: &SourceFile,
        held: &[TensorSpec],
    ) -> Result<RankLayout, Failure> {
        match self {
            Self::Bands(bands) => given(bands, Side::Source, file.rank, held),
            Self::Model(config) => Ok(megatron::layout(config, &case.source.place(file), held)?),
        }
    }

    /// The layout of an engine rank that holds these tensors.
    pub(super) fn target(
        &self,
        case: &Case,
        file: &TargetFile,
        held: &[TensorSpec],
    ) -> Result<RankLayout, Failure> {
        match self {
            Self::Bands(bands) => given(bands, Side::Target, file.rank, held),
            Self::Model(config) => Ok(vllm::layout(config, &case.target.place(file), held)?.layout),
        }
    }
}

/// The layout that bands give a rank, if it is one of these tensors: no more, no fewer, of the same types and sizes.
fn given(
    bands: &BTreeMap<u32, RankLayout>,
    side: Side,
    rank: u32,
    held: &[TensorSpec],
) -> Result<RankLayout, Failure> {
    let refuse = |reason| Err(Failure::Held { side, rank, reason });
    let Some(layout) = bands.get(&rank) else {
        return refuse(format!("{side}/bands.json does not describe it"));
    };
    for spec in held {
        let TensorSpec { name, dtype, shape, .. } = spec;
        let Some(param) = layout.param(name) else {
            return refuse(format!(
                "it holds `{name}`, which {side}/bands.json does not list; give it there, with `\"bands\": []` if \
                 nothing needs it"
            ));
        };
        if param.dtype() != *dtype || Some(param.bytes()) != spec.bytes() {
            return refuse(format!(
                "`{name}` is {dtype} {shape:?} in its file and {} [{}, {}] in {side}/bands.json",
                param.dtype(),
                param.rows(),
                param.cols()
            ));
        }
    }
    let held = |name: &str| held.iter().any(|spec| *spec.name == *name);
    let missing = layout.params().iter().find(|param| !held(param.name()));
    match missing {
        Some(param) => refuse(format!(
            "{side}/bands.json lists `{}`, which its file does not hold",
            param.name()
        )),
        None => Ok(layout.clone()),
    }
}
