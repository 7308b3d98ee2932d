use alloc::vec;
use alloc::vec::Vec;

use super::{Part, Role, Shard, SourceCoords, SourceRole, TargetCoords, TargetRole, View};
use crate::TranslateError;

/// Columns are shared out evenly, in order, on both sides: output and down projections.
///
/// Rank `r` of `n` holds logical columns `[r * cols / n, (r + 1) * cols / n)` of every row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Rows, on every rank.
    pub rows: u64,
    /// What `cols` is called in errors.
    pub what: &'static str,
    /// Columns over all ranks.
    pub cols: u64,
}

impl Row {
    fn view(&self, tp: &Shard) -> Result<View, TranslateError> {
        let cols = tp.cut(self.what, self.cols)?;
        let width = cols.end - cols.start;
        let part = Part::new(0, 0..self.rows, cols);
        Ok(View::new(self.rows, Some(width), "columns / tp_size", vec![part]))
    }
}

impl Role for Row {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        Ok(vec![(self.rows, self.cols)])
    }
}

impl SourceRole for Row {
    fn megatron(&self, at: &SourceCoords, _: Option<&[u64]>) -> Result<View, TranslateError> {
        self.view(&at.tp)
    }
}

impl TargetRole for Row {
    fn vllm(&self, at: &TargetCoords) -> Result<View, TranslateError> {
        self.view(&at.tp)
    }
}
