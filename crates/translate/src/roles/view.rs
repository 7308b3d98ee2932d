//! What one rank holds of one parameter.

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use refit_planner::{Band, Dtype, LayoutBuilder, Param, TensorId};

use super::{Role, width};
use crate::TranslateError;

/// A box of one of a role's logical tensors and its place in the local view; the role's form of [`Band`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which of [`Role::logical`].
    pub tensor: usize,
    /// Logical rows.
    pub rows: Range<u64>,
    /// Logical columns.
    pub cols: Range<u64>,
    /// Local row of the first element.
    pub at_row: u64,
    /// Local column of the first element.
    pub at_col: u64,
    /// Local rows from one logical row to the next; 1 where they follow without a gap.
    pub row_step: u64,
}

impl Part {
    /// A box at the local origin, its rows without gaps.
    #[must_use]
    pub fn new(tensor: usize, rows: Range<u64>, cols: Range<u64>) -> Self {
        Self { tensor, rows, cols, at_row: 0, at_col: 0, row_step: 1 }
    }

    /// This box with its first element in another row.
    #[must_use]
    pub fn at_row(mut self, row: u64) -> Self {
        self.at_row = row;
        self
    }

    /// This box with its first element in another column.
    #[must_use]
    pub fn at_col(mut self, col: u64) -> Self {
        self.at_col = col;
        self
    }

    /// This box with its rows `step` local rows apart.
    #[must_use]
    pub fn row_step(mut self, step: u64) -> Self {
        self.row_step = step;
        self
    }
}

/// What one rank holds of one parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The shape the framework reports.
    pub shape: Vec<u64>,
    /// Where `shape` comes from, for people.
    pub formula: &'static str,
    /// Rows of the two-dimensional view that parts refer to.
    pub rows: u64,
    /// Columns of it; 1 for vectors.
    pub cols: u64,
    /// The logical boxes in it. Rows of a trainer's padding are in none.
    pub parts: Vec<Part>,
    /// Whole local rows that must be zero, besides those in parts.
    pub zero_rows: Vec<Range<u64>>,
}

impl View {
    /// A matrix, or a vector where `cols` is `None`.
    #[must_use]
    pub fn new(rows: u64, cols: Option<u64>, formula: &'static str, parts: Vec<Part>) -> Self {
        let shape = cols.map_or_else(|| vec![rows], |cols| vec![rows, cols]);
        Self { shape, formula, rows, cols: width(cols), parts, zero_rows: Vec::new() }
    }

    /// This view of a parameter that the framework reports in another shape of as many elements: `[E, R, H]` is
    /// viewed as `E * R` rows of `H`, `[C, 1, K]` as `C` rows of `K`, a stack of vectors `[E, R]` as `E * R` rows of 1.
    #[must_use]
    pub fn shaped(mut self, shape: Vec<u64>) -> Self {
        self.shape = shape;
        self
    }

    /// This view of channels in the shape of a depthwise convolution of this width, `[rows, 1, kernel]`; unchanged for
    /// the bias, which has none.
    #[must_use]
    pub fn depthwise(self, kernel: Option<u64>) -> Self {
        let rows = self.rows;
        match kernel {
            Some(kernel) => self.shaped(vec![rows, 1, kernel]),
            None => self,
        }
    }

    /// This view with one more range of rows that must be zero; an empty one changes nothing.
    #[must_use]
    pub fn zero(mut self, rows: Range<u64>) -> Self {
        if !rows.is_empty() {
            self.zero_rows.push(rows);
        }
        self
    }

    /// This view as parameter `name` of a layout, the logical tensors of `role` going by the names `logical`, which
    /// are declared in the layout.
    ///
    /// # Errors
    /// [`TranslateError::LogicalNames`] and [`TranslateError::Layout`].
    pub fn param(
        &self,
        layout: &mut LayoutBuilder,
        role: &dyn Role,
        name: &Arc<str>,
        dtype: Dtype,
        logical: &[impl AsRef<str>],
    ) -> Result<Param, TranslateError> {
        let extents = role.logical()?;
        let wrong_names = |got| TranslateError::LogicalNames {
            param: name.clone(),
            expected: extents.len(),
            got,
        };
        if logical.len() != extents.len() {
            return Err(wrong_names(logical.len()));
        }
        let mut ids: Vec<TensorId> = Vec::with_capacity(extents.len());
        for (tensor, &(rows, cols)) in logical.iter().zip(&extents) {
            ids.push(layout.tensor(tensor.as_ref(), rows, cols)?);
        }
        let mut param = Param::new(name.clone(), dtype, self.rows, self.cols);
        for part in &self.parts {
            let id = *ids.get(part.tensor).ok_or_else(|| wrong_names(ids.len()))?;
            let band = Band::new(id, part.rows.clone(), part.cols.clone());
            param = param.band(band.at(part.at_row, part.at_col).row_step(part.row_step));
        }
        for rows in &self.zero_rows {
            param = param.fill(rows.clone(), 0..self.cols);
        }
        Ok(param)
    }
}
