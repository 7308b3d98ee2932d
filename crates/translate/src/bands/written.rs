//! Bands as a person writes them.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use refit_planner::{Band, LayoutBuilder, LayoutError, Param};

use super::json::{RawBand, RawFill};
use super::{BandsError, LogicalTensor, Place, Tensors};

/// Adds a parameter, given without bands, with the bands and boxes of zeros of a text.
pub(super) fn place(
    layout: &mut LayoutBuilder,
    tensors: &Tensors,
    rank: u32,
    empty: &Param,
    bands: &[RawBand<'_>],
    fills: &[RawFill],
) -> Result<(), BandsError> {
    let at = |list, number, tensor| {
        Box::new(Place { rank, param: empty.name().clone(), list, number, tensor })
    };
    let mut placed = Vec::with_capacity(bands.len());
    for (number, raw) in bands.iter().enumerate() {
        let Some((name, tensor)) = tensors.get_key_value(raw.tensor.get()) else {
            let place = at("bands", number, Some(raw.tensor.get().into()));
            return Err(BandsError::UnknownTensor { place });
        };
        placed.push(band(layout, name, tensor, raw)?);
    }
    let mut param = empty.clone().bands(placed);
    for (number, raw) in fills.iter().enumerate() {
        let RawFill::Box { rows, cols } = raw else {
            return Err(BandsError::FillForm { rank, param: empty.name().clone(), number });
        };
        param = fill(param, *rows, *cols);
    }
    let Err(error) = layout.param(param) else { return Ok(()) };

    // Which of them it is, one finds by adding each alone.
    for (number, raw) in bands.iter().enumerate() {
        let Some((name, tensor)) = tensors.get_key_value(raw.tensor.get()) else { continue };
        let mut alone = LayoutBuilder::new(rank);
        let band = band(&mut alone, name, tensor, raw)?;
        if let Err(source) = alone.param(empty.clone().band(band)) {
            return Err(BandsError::Band {
                place: at("bands", number, Some(name.clone())),
                source,
            });
        }
    }
    for (number, raw) in fills.iter().enumerate() {
        if let RawFill::Box { rows, cols } = raw
            && let Err(source) = LayoutBuilder::new(rank).param(fill(empty.clone(), *rows, *cols))
        {
            return Err(BandsError::Band { place: at("fill", number, None), source });
        }
    }
    Err(error.into())
}

/// Rows and columns that are not given are all there are.
fn band(
    layout: &mut LayoutBuilder,
    name: &Arc<str>,
    tensor: &LogicalTensor,
    raw: &RawBand<'_>,
) -> Result<Band, LayoutError> {
    let view = tensor.view;
    let id = layout.tensor(name, view.rows, view.cols)?;
    let (rows, cols) = (range(raw.rows, view.rows), range(raw.cols, view.cols));
    Ok(Band::new(id, rows, cols).at(raw.at[0], raw.at[1]).row_step(raw.row_step))
}

fn fill(param: Param, rows: [u64; 2], cols: Option<[u64; 2]>) -> Param {
    let cols = range(cols, param.cols());
    param.fill(rows[0]..rows[1], cols)
}

fn range(given: Option<[u64; 2]>, all: u64) -> Range<u64> {
    let [start, end] = given.unwrap_or([0, all]);
    start..end
}
