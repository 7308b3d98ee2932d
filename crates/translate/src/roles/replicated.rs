use alloc::vec;
use alloc::vec::Vec;

use super::{Part, Role, SourceCoords, SourceRole, TargetCoords, TargetRole, View, width};
use crate::TranslateError;

/// Every rank holds the whole tensor: norms, biases of row-parallel layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replicated {
    /// Rows, or elements of a vector.
    pub rows: u64,
    /// Columns; `None` for a vector.
    pub cols: Option<u64>,
}

impl Replicated {
    fn view(&self) -> View {
        let whole = Part::new(0, 0..self.rows, 0..width(self.cols));
        View::new(self.rows, self.cols, "the whole tensor, on every rank", vec![whole])
    }
}

impl Role for Replicated {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        Ok(vec![(self.rows, width(self.cols))])
    }
}

impl SourceRole for Replicated {
    fn megatron(&self, _: &SourceCoords, _: Option<&[u64]>) -> Result<View, TranslateError> {
        Ok(self.view())
    }
}

impl TargetRole for Replicated {
    fn vllm(&self, _: &TargetCoords) -> Result<View, TranslateError> {
        Ok(self.view())
    }
}
