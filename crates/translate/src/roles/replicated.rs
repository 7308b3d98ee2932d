use alloc::vec;
use alloc::vec::Vec;

use super::{Part, Role, SourceCoords, TargetCoords, View, width};
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
        let whole = Part { tensor: 0, rows: 0..self.rows, cols: 0..width(self.cols), at_row: 0 };
        View::new(self.rows, self.cols, "the whole tensor, on every rank", vec![whole])
    }
}

impl Role for Replicated {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        Ok(vec![(self.rows, width(self.cols))])
    }

    fn megatron(&self, _: &SourceCoords, _: Option<&[u64]>) -> Result<View, TranslateError> {
        Ok(self.view())
    }

    fn vllm(&self, _: &TargetCoords) -> Result<View, TranslateError> {
        Ok(self.view())
    }
}
