//! Shapes of any number of dimensions, seen as rows and columns.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use super::{MAX_DIMS, ShapeProblem};

/// The two-dimensional view of a contiguous, row-major tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub(super) rows: u64,
    pub(super) cols: u64,
}

impl View {
    /// Rows are the first dimension and columns all others, unless the text says otherwise. A vector has one column, a
    /// scalar one element.
    pub(super) fn new(shape: &[u64], given: Option<[u64; 2]>) -> Result<Self, ShapeProblem> {
        let elements = elements(shape)?;
        match given {
            None => {
                let (rows, rest) =
                    shape.split_first().map_or((1, shape), |(rows, rest)| (*rows, rest));
                // Fits: no extent of an empty shape is larger than a limit that all others keep.
                Ok(Self { rows, cols: rest.iter().product() })
            }
            Some([rows, cols]) if rows.checked_mul(cols) == Some(elements) => {
                Ok(Self { rows, cols })
            }
            Some([rows, cols]) => Err(ShapeProblem::View { rows, cols, elements }),
        }
    }
}

/// How many elements a shape has.
pub(super) fn elements(shape: &[u64]) -> Result<u64, ShapeProblem> {
    if shape.len() > MAX_DIMS {
        return Err(ShapeProblem::Dims { dims: shape.len() });
    }
    // Zeros last, so that what the others come to is checked too.
    let mut extents = shape.iter().filter(|extent| **extent > 0);
    let product = extents.try_fold(1_u64, |product, &extent| product.checked_mul(extent));
    let product = product.filter(|product| i64::try_from(*product).is_ok());
    let product = product.ok_or(ShapeProblem::TooLarge)?;
    Ok(if shape.contains(&0) { 0 } else { product })
}
