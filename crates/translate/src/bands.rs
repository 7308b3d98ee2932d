//! Layouts given from outside: one side's bands as JSON, for models that no table of slots describes.
//!
//! [`read`] takes text and gives the same [`RankLayout`]s that [`megatron::layout`](crate::megatron::layout) and
//! [`vllm::layout`](crate::vllm::layout) give; [`write()`] is its inverse. Each parameter is described in one of two
//! forms, which may stand side by side:
//!
//! - `bands`, written by hand or by [`write()`]: boxes of logical tensors and where they lie;
//! - `copies`, captured from an engine's own loader run on tensors without storage: for every `copy_`, which part of
//!   which checkpoint tensor went where, as offsets, shapes and strides. They are turned into bands, or refused with
//!   the tensor's name where a band cannot say what they do.
//!
//! `docs/bands.md` in the repository shows both by example and how to capture.
//!
//! # Bounds
//!
//! Text from outside is not trusted. Longer texts, lists and names than the constants here allow are refused before
//! they are held; nesting is as deep as the format, no deeper. Reading takes at most 32 bytes of memory for every byte
//! of text, 256 bytes for every band that copies become, and 64 KiB.

mod captured;
mod error;
mod json;
mod shape;
mod strided;
mod text;
mod written;

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use refit_planner::{
    Dtype, LayoutBuilder, LayoutError, Param, PlanError, PlanOptions, RankLayout, prove_disjoint,
    prove_tiling,
};
use serde::Deserialize;

use self::json::{Document, RawParam, RawRank};
use self::shape::View;

pub use self::error::{BandsError, Claim, CopyProblem, Place, ShapeProblem};
pub use self::text::write;

/// The version of the format that [`read`] and [`write()`] know.
pub const SCHEMA: u64 = 1;
/// Bytes of one text.
pub const MAX_TEXT_BYTES: usize = 64 << 20;
/// Ranks of one text. A side may be given in several.
pub const MAX_RANKS: usize = 1 << 16;
/// Logical tensors of one text.
pub const MAX_TENSORS: usize = 1 << 20;
/// Parameters of one rank.
pub const MAX_PARAMS: usize = 1 << 20;
/// Bands, copies or boxes of zeros of one parameter.
pub const MAX_BANDS: usize = 1 << 20;
/// Bands that one captured copy may become.
pub const MAX_BANDS_PER_COPY: u64 = 1 << 16;
/// Bands that all captured copies of one text may become.
pub const MAX_CAPTURED_BANDS: u64 = 1 << 20;
/// Bytes of a name.
pub const MAX_NAME_BYTES: usize = 1 << 10;
/// Dimensions of a shape.
pub const MAX_DIMS: usize = 8;

/// Enough for the proof of any honest rank.
const LEAST_PIECES: u64 = 1 << 12;

/// Which side of a refit a text describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// What trainer ranks hold. Elements in no band are never read.
    Source,
    /// What engine ranks want. Every element lies in exactly one band or box of zeros.
    Target,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Target => "target",
        })
    }
}

/// What a text describes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Bands {
    /// The side.
    pub side: Side,
    /// Layouts of some or all of its ranks, in the order of the text.
    pub ranks: Vec<RankLayout>,
}

/// Reads one side's layouts. A target's parameters are proven to be tiled; no element of a captured one may be written
/// twice, on either side.
///
/// # Errors
/// [`BandsError`]. What concerns a parameter says which rank's, and what concerns a band or copy also its number and
/// its tensor.
pub fn read(text: &str) -> Result<Bands, BandsError> {
    let document = Document::read(text)?;
    let side = document.side;
    let mut tensors = Tensors::new();
    for (name, raw) in document.tensors.0 {
        let shape = |problem| BandsError::TensorShape { tensor: name.get().into(), problem };
        let view = View::new(&raw.shape.0, raw.view).map_err(shape)?;
        let tensor = LogicalTensor { shape: raw.shape.0, view };
        if tensors.insert(name.get().into(), tensor).is_some() {
            return Err(BandsError::DuplicateTensor { tensor: name.get().into() });
        }
    }
    // What proofs may take is shared out, so that many ranks take no more time than one.
    let options = PlanOptions::default();
    let share = options.max_pieces / (document.ranks.0.len() as u64).max(1);
    let options = options.with_max_pieces(share.max(LEAST_PIECES));
    let mut left = MAX_CAPTURED_BANDS;
    let ranks = document.ranks.0.into_iter();
    let ranks = ranks.map(|raw| rank(side, &tensors, raw, &options, &mut left));
    let ranks = ranks.collect::<Result<Vec<RankLayout>, _>>()?;
    let mut numbers: Vec<u32> = ranks.iter().map(RankLayout::rank).collect();
    numbers.sort_unstable();
    if let Some(pair) = numbers.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(LayoutError::DuplicateRank { rank: pair[0] }.into());
    }
    Ok(Bands { side, ranks })
}

/// The logical tensors of a text, by name.
type Tensors = BTreeMap<Arc<str>, LogicalTensor>;

/// A logical tensor as the text declares it.
struct LogicalTensor {
    shape: Vec<u64>,
    view: View,
}

fn rank(
    side: Side,
    tensors: &Tensors,
    raw: RawRank<'_>,
    options: &PlanOptions,
    left: &mut u64,
) -> Result<RankLayout, BandsError> {
    let mut layout = LayoutBuilder::new(raw.rank);
    let mut captured = BTreeSet::<Arc<str>>::new();
    for (name, raw_param) in raw.params.0 {
        if raw_param.copies.is_some() {
            captured.insert(name.get().into());
        }
        param(&mut layout, tensors, raw.rank, name.get(), raw_param, left)?;
    }
    let layout = layout.build();
    let proof = match side {
        Side::Target => prove_tiling(layout.params(), options),
        // What was overwritten is not what the tensor holds. A person may say that two tensors share elements.
        Side::Source => {
            let captured =
                layout.params().iter().filter(|param| captured.contains(param.name().as_ref()));
            prove_disjoint(captured, options)
        }
    };
    proof.map_err(|error| untiled(&layout, error))?;
    Ok(layout)
}

fn param(
    layout: &mut LayoutBuilder,
    tensors: &Tensors,
    rank: u32,
    name: &str,
    raw: RawParam<'_>,
    left: &mut u64,
) -> Result<(), BandsError> {
    let name: Arc<str> = name.into();
    let dtype = Dtype::from_name(raw.dtype.get()).ok_or_else(|| BandsError::Dtype {
        rank,
        param: name.clone(),
        found: raw.dtype.get().to_string(),
    })?;
    match (raw.bands, raw.copies) {
        (Some(bands), None) => {
            let misshapen = |problem| BandsError::ParamShape { rank, param: name.clone(), problem };
            let view = View::new(&raw.shape.0, raw.view).map_err(misshapen)?;
            let empty = Param::new(name.clone(), dtype, view.rows, view.cols).map(raw.map);
            written::place(layout, tensors, rank, &empty, &bands.0, &raw.fill.0)
        }
        (None, Some(copies)) => {
            let held = captured::Held {
                rank,
                name,
                dtype,
                map: raw.map,
                shape: raw.shape.0,
                view: raw.view,
            };
            captured::place(layout, tensors, &held, &copies.0, &raw.fill.0, left)
        }
        _ => Err(BandsError::Form { rank, param: name }),
    }
}

/// Names the rank and the tensors of bands that do not tile a target.
fn untiled(layout: &RankLayout, error: PlanError) -> BandsError {
    let rank = layout.rank();
    match error {
        PlanError::Overlap { param, row, col } => {
            let claims = error::claims(layout, &param, row, col);
            BandsError::Overlap { rank, param, row, col, claims }
        }
        PlanError::Gap { param, claimed, elements } => {
            BandsError::Gap { rank, param, claimed, elements }
        }
        other => BandsError::Plan { rank, source: other },
    }
}
