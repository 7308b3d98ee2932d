use alloc::vec;
use alloc::vec::Vec;

use super::{
    Part, Role, Shard, SourceCoords, SourceRole, TargetCoords, TargetRole, View, times, width,
};
use crate::TranslateError;

/// Gate and up projection in one parameter, or their biases: `[gate rows of this rank; up rows of this rank]` on both sides.
///
/// Joining ranks therefore gives `[g0; u0; g1; u1; ...]`, not `[gate; up]`. Logical tensors: gate, up. The layout is
/// Megatron's without GLU interleaving; an interleaved one cannot be told by its shape, so its trainer must not be
/// published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatedMlp {
    /// What `intermediate` is called in errors.
    pub what: &'static str,
    /// Rows of the gate projection, and of the up projection.
    pub intermediate: u64,
    /// Columns; `None` for biases.
    pub cols: Option<u64>,
}

const GATE: usize = 0;
const UP: usize = 1;

impl GatedMlp {
    fn view(&self, tp: &Shard) -> Result<View, TranslateError> {
        let rows = tp.cut(self.what, self.intermediate)?;
        let height = rows.end - rows.start;
        let half =
            |tensor, at_row| Part::new(tensor, rows.clone(), 0..width(self.cols)).at_row(at_row);
        let parts = vec![half(GATE, 0), half(UP, height)];
        let formula = "[2 * intermediate size / tp_size, hidden_size]";
        Ok(View::new(times(self.what, height, 2)?, self.cols, formula, parts))
    }
}

impl Role for GatedMlp {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        Ok(vec![(self.intermediate, width(self.cols)); 2])
    }
}

impl SourceRole for GatedMlp {
    fn megatron(&self, at: &SourceCoords, _: Option<&[u64]>) -> Result<View, TranslateError> {
        self.view(&at.tp)
    }
}

impl TargetRole for GatedMlp {
    fn vllm(&self, at: &TargetCoords) -> Result<View, TranslateError> {
        self.view(&at.tp)
    }
}
