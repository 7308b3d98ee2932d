use alloc::vec;
use alloc::vec::Vec;

use super::{Part, Role, TargetCoords, TargetRole, View, times, width};
use crate::TranslateError;

/// Gate and up projection in one engine parameter, or their biases, row by row in turn: GPT-OSS.
///
/// Local row `2j` is gate row `rank * intermediate / n + j`, local row `2j + 1` the same row of up. Logical tensors:
/// gate, up, as in [`GatedMlp`](super::GatedMlp), which is how trainers hold them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterleavedMlp {
    /// What `intermediate` is called in errors.
    pub what: &'static str,
    /// Rows of the gate projection, and of the up projection.
    pub intermediate: u64,
    /// Columns; `None` for biases.
    pub cols: Option<u64>,
}

const GATE: usize = 0;
const UP: usize = 1;

impl Role for InterleavedMlp {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        Ok(vec![(self.intermediate, width(self.cols)); 2])
    }
}

impl TargetRole for InterleavedMlp {
    fn vllm(&self, at: &TargetCoords) -> Result<View, TranslateError> {
        let rows = at.tp.cut(self.what, self.intermediate)?;
        let height = times(self.what, rows.end - rows.start, 2)?;
        let every_other = |tensor| Part::new(tensor, rows.clone(), 0..width(self.cols)).row_step(2);
        let parts = vec![every_other(GATE), every_other(UP).at_row(1)];
        let formula = "[2 * intermediate size / tp_size, hidden_size], gate and up in turn";
        Ok(View::new(height, self.cols, formula, parts))
    }
}
