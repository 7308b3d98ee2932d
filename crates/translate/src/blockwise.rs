//! Weights in 8-bit floats with a scale for every 128 x 128 block (`quant_method` fp8 with `weight_block_size`).
//!
//! Such a weight is two parameters: the elements, and `.._scale_inv` in f32 with one element per block. Scales are laid
//! out as the elements are, at 1/128 of all coordinates, which holds where no shard cuts a block; the last block of a
//! tensor may be smaller. Whatever cuts one is refused: the two sides would need a scale each.

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use refit_planner::{LayoutBuilder, Param};

use crate::roles::{Part, Role, View};
use crate::{Side, TensorSpec, TranslateError};

/// Rows and columns of a block.
const BLOCK: u64 = 128;

/// A trainer pads rows of scales to a multiple of this: Transformer Engine's `Float8BlockQuantizer`.
const PADDING: u64 = 4;

/// What is appended to a weight's name, the logical one and both sides'.
const SUFFIX: &str = "_scale_inv";

/// The name of a weight's scales.
pub(crate) fn name(weight: &str) -> String {
    format!("{weight}{SUFFIX}")
}

/// The scales of a weight, as a role of their own.
#[derive(Debug)]
struct Scales<'a>(&'a dyn Role);

impl Role for Scales<'_> {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        let blocks = |(rows, cols): (u64, u64)| (rows.div_ceil(BLOCK), cols.div_ceil(BLOCK));
        Ok(self.0.logical()?.into_iter().map(blocks).collect())
    }
}

/// Whose scales are laid out, for errors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Holder<'a> {
    pub(crate) side: Side,
    pub(crate) rank: u32,
    /// The weight.
    pub(crate) param: &'a Arc<str>,
    /// Names of its logical tensors.
    pub(crate) logical: &'a [String],
}

impl<'a> Holder<'a> {
    pub(crate) fn new(
        side: Side,
        rank: u32,
        weight: &'a TensorSpec,
        logical: &'a [String],
    ) -> Self {
        Self { side, rank, param: &weight.name, logical }
    }

    /// The scales of a weight that is laid out like this.
    pub(crate) fn scales(&self, role: &dyn Role, weight: &View) -> Result<View, TranslateError> {
        let extents = role.logical()?;
        let part = |part: &Part| {
            let (rows, cols) = extents.get(part.tensor).copied().unwrap_or_default();
            let cut = |axis, range: &Range<u64>, at, total| {
                self.blocks(part.tensor, axis, range, at, total)
            };
            let (rows, at_row) = cut("rows", &part.rows, part.at_row, rows)?;
            let (cols, at_col) = cut("columns", &part.cols, part.at_col, cols)?;
            if part.row_step != 1 {
                let why = "they are interleaved with others";
                return Err(self.refusal(part.tensor, "rows", &part.rows, why));
            }
            Ok(Part::new(part.tensor, rows, cols).at_row(at_row).at_col(at_col))
        };
        let parts = weight.parts.iter().map(part).collect::<Result<Vec<_>, _>>()?;
        let mut shape = weight.shape.clone();
        for extent in shape.iter_mut().rev().take(2) {
            *extent = extent.div_ceil(BLOCK);
        }
        let formula = "one scale for each block of 128 x 128 elements";
        let (rows, cols) = (weight.rows.div_ceil(BLOCK), weight.cols.div_ceil(BLOCK));
        Ok(View::new(rows, Some(cols), formula, parts).shaped(shape))
    }

    /// A range of rows or columns and its place, in blocks.
    fn blocks(
        &self,
        tensor: usize,
        axis: &'static str,
        range: &Range<u64>,
        at: u64,
        total: u64,
    ) -> Result<(Range<u64>, u64), TranslateError> {
        let whole = |end: &u64| end.is_multiple_of(BLOCK) || *end == total;
        if !range.start.is_multiple_of(BLOCK) || !whole(&range.end) {
            let why = "the shard begins or ends inside of one";
            return Err(self.refusal(tensor, axis, range, why));
        }
        if !at.is_multiple_of(BLOCK) {
            let why = "what stands before them in the parameter ends inside of one";
            return Err(self.refusal(tensor, axis, range, why));
        }
        Ok((range.start / BLOCK..range.end.div_ceil(BLOCK), at / BLOCK))
    }

    fn refusal(
        &self,
        tensor: usize,
        axis: &'static str,
        range: &Range<u64>,
        why: &'static str,
    ) -> TranslateError {
        TranslateError::Block {
            side: self.side,
            rank: self.rank,
            param: self.param.clone(),
            tensor: self.logical.get(tensor).cloned().unwrap_or_default(),
            axis,
            start: range.start,
            end: range.end,
            why,
        }
    }
}

/// The scales of a weight with this role and these logical tensors, as a parameter.
pub(crate) fn param(
    view: &View,
    layout: &mut LayoutBuilder,
    role: &dyn Role,
    held: &TensorSpec,
    logical: &[String],
) -> Result<Param, TranslateError> {
    let logical: Vec<String> = logical.iter().map(|weight| name(weight)).collect();
    view.param(layout, &Scales(role), &held.name, held.dtype, &logical)
}

/// A trainer's scales, whose rows may be padded: as they are held, or as they are expected.
pub(crate) fn padded(mut scales: View, held: Option<&[u64]>) -> View {
    let padded = scales.cols.next_multiple_of(PADDING);
    if held.is_none_or(|shape| shape.last() == Some(&padded)) {
        scales.cols = padded;
        if let Some(last) = scales.shape.last_mut() {
            *last = padded;
        }
    }
    scales
}
