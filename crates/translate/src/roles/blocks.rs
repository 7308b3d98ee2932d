//! Parameters made of several blocks of rows, each shared out by heads on its own.

use alloc::vec::Vec;
use core::ops::Range;

use super::{Part, Shard, View, plus, times, width};
use crate::TranslateError;
use crate::config::MAX_HEADS;

/// Rows of a logical tensor that belong to the same kind of heads: `each` rows per head, a head every `period` rows
/// from `start` on. What lies between them belongs to other blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    tensor: usize,
    what: &'static str,
    heads: u64,
    each: u64,
    start: u64,
    period: u64,
    whole: bool,
}

impl Block {
    /// `heads` heads of `each` rows without gaps, from row `start` of logical tensor `tensor` on. `what` names their
    /// number in errors.
    pub(super) fn new(
        tensor: usize,
        what: &'static str,
        (heads, each): (u64, u64),
        start: u64,
    ) -> Self {
        Self { tensor, what, heads, each, start, period: each, whole: false }
    }

    /// This block with a head every `period` rows.
    pub(super) fn every(mut self, period: u64) -> Self {
        self.period = period;
        self
    }

    /// This block on every rank whole, if `whole`.
    pub(super) fn whole_if(mut self, whole: bool) -> Self {
        self.whole = whole;
        self
    }

    /// The heads of a rank.
    fn heads(&self, tp: &Shard) -> Result<Range<u64>, TranslateError> {
        if self.heads > MAX_HEADS.into() {
            return Err(TranslateError::TooLarge { what: self.what, limit: MAX_HEADS.into() });
        }
        if self.whole { Ok(0..self.heads) } else { tp.cut(self.what, self.heads) }
    }
}

/// What a rank holds of a parameter in which these blocks follow each other, each with this rank's heads alone.
pub(super) fn view(
    blocks: &[Block],
    cols: Option<u64>,
    tp: &Shard,
    formula: &'static str,
) -> Result<View, TranslateError> {
    let mut parts = Vec::new();
    let mut height = 0;
    for block in blocks {
        let Block { tensor, what, each, start, period, .. } = *block;
        let heads = block.heads(tp)?;
        let count = heads.end - heads.start;
        // One band per head, or one for all where there is nothing between them.
        let (bands, heads_of_band) = if period == each { (1, count) } else { (count, 1) };
        let tall = times(what, heads_of_band, each)?;
        for band in 0..bands {
            let row = plus(what, start, times(what, heads.start + band, period)?)?;
            let at_row = plus(what, height, times(what, band, each)?)?;
            let part = Part::new(tensor, row..plus(what, row, tall)?, 0..width(cols));
            parts.push(part.at_row(at_row));
        }
        height = plus(what, height, times(what, count, each)?)?;
    }
    Ok(View::new(height, cols, formula, parts))
}

/// Where each of several blocks of these heights begins when they follow each other, and where they end.
pub(super) fn starts<const N: usize>(
    what: &'static str,
    heights: [u64; N],
) -> Result<([u64; N], u64), TranslateError> {
    let mut starts = [0; N];
    let mut end = 0;
    for (start, height) in starts.iter_mut().zip(heights) {
        *start = end;
        end = plus(what, end, height)?;
    }
    Ok((starts, end))
}
