use alloc::vec;
use alloc::vec::Vec;

use super::{Part, Role, Shard, SourceCoords, SourceRole, TargetCoords, TargetRole, View, width};
use crate::TranslateError;

/// Rows are shared out evenly, in order, on both sides: ungated projections and their biases.
///
/// Rank `r` of `n` holds logical rows `[r * rows / n, (r + 1) * rows / n)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// What `rows` is called in errors.
    pub what: &'static str,
    /// Rows over all ranks.
    pub rows: u64,
    /// Columns; `None` for a vector.
    pub cols: Option<u64>,
}

impl Column {
    fn view(&self, tp: &Shard) -> Result<View, TranslateError> {
        let rows = tp.cut(self.what, self.rows)?;
        let height = rows.end - rows.start;
        let part = Part::new(0, rows, 0..width(self.cols));
        Ok(View::new(height, self.cols, "rows / tp_size", vec![part]))
    }
}

impl Role for Column {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        Ok(vec![(self.rows, width(self.cols))])
    }
}

impl SourceRole for Column {
    fn megatron(&self, at: &SourceCoords, _: Option<&[u64]>) -> Result<View, TranslateError> {
        self.view(&at.tp)
    }
}

impl TargetRole for Column {
    fn vllm(&self, at: &TargetCoords) -> Result<View, TranslateError> {
        self.view(&at.tp)
    }
}
