//! Copies that an engine's own loader made, as bands.

use alloc::boxed::Box;
use alloc::collections::BTreeSet;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use refit_planner::{Band, Dtype, ElementMap, LayoutBuilder, Param, TensorId};

use super::json::{RawCopy, RawFill, RawFrom, RawStrided};
use super::shape::View;
use super::strided::{Copy, Strided};
use super::{BandsError, CopyProblem, LogicalTensor, Place, Tensors};

/// Views that are tried beside those that the parameter's own shape suggests.
const MAX_TENSOR_VIEWS: usize = 8;

/// A parameter as the engine reports it.
pub(super) struct Held {
    pub(super) rank: u32,
    pub(super) name: Arc<str>,
    pub(super) dtype: Dtype,
    pub(super) map: ElementMap,
    pub(super) shape: Vec<u64>,
    /// The view to use; `None`: the one that takes the fewest bands.
    pub(super) view: Option<[u64; 2]>,
}

impl Held {
    fn place(&self, list: &'static str, number: usize, tensor: Option<&str>) -> Box<Place> {
        let (rank, param) = (self.rank, self.name.clone());
        Box::new(Place { rank, param, list, number, tensor: tensor.map(Into::into) })
    }
}

/// A copy into a parameter, and what it copies.
struct Record<'a> {
    copy: Copy,
    /// The tensor's name, its number in the layout and the columns of its view; zeros have none.
    tensor: Option<(&'a str, TensorId, u64)>,
    /// Its number in its list.
    number: usize,
}

impl Record<'_> {
    /// Columns of what it reads, for a parameter of `cols` columns: zeros come from the same place in the parameter.
    fn tensor_cols(&self, cols: u64) -> u64 {
        self.tensor.map_or(cols, |(_, _, cols)| cols)
    }

    fn boxes(&self, cols: u64) -> Result<u64, CopyProblem> {
        self.copy.boxes(self.tensor_cols(cols), cols)
    }

    fn refusal(&self, held: &Held, problem: CopyProblem) -> BandsError {
        let (list, tensor) = match self.tensor {
            Some((name, ..)) => ("copies", Some(name)),
            None => ("fill", None),
        };
        BandsError::Copy { place: held.place(list, self.number, tensor), problem }
    }
}

/// Adds a parameter with the bands and boxes of zeros that a text's copies and zeros come to. `left` is how many more
/// the text may become.
pub(super) fn place(
    layout: &mut LayoutBuilder,
    tensors: &Tensors,
    held: &Held,
    copies: &[RawCopy<'_>],
    fills: &[RawFill],
    left: &mut u64,
) -> Result<(), BandsError> {
    let (rank, param) = (held.rank, held.name.clone());
    let view = View::new(&held.shape, held.view).map_err(|problem| BandsError::ParamShape {
        rank,
        param,
        problem,
    })?;
    let elements = view.rows * view.cols;

    let mut records = Vec::with_capacity(copies.len() + fills.len());
    for (number, raw) in copies.iter().enumerate() {
        let place = || held.place("copies", number, Some(raw.tensor.get()));
        let Some((name, tensor)) = tensors.get_key_value(raw.tensor.get()) else {
            return Err(BandsError::UnknownTensor { place: place() });
        };
        let copy = copy(tensor, raw, elements)
            .map_err(|problem| BandsError::Copy { place: place(), problem })?;
        let id = layout.tensor(name, tensor.view.rows, tensor.view.cols)?;
        let tensor = Some((name.as_ref(), id, tensor.view.cols));
        records.extend(copy.map(|copy| Record { copy, tensor, number }));
    }
    for (number, raw) in fills.iter().enumerate() {
        let RawFill::Strided(RawStrided { offset, shape, stride }) = raw else {
            return Err(BandsError::FillForm { rank, param: held.name.clone(), number });
        };
        let copy = zeros(*offset, &shape.0, &stride.0, elements).map_err(|problem| {
            BandsError::Copy { place: held.place("fill", number, None), problem }
        })?;
        records.extend(copy.map(|copy| Record { copy, tensor: None, number }));
    }

    let cols = best_cols(held, view, elements, &records)?;
    let (mut bands, mut zeros) = (Vec::new(), Vec::new());
    for record in &records {
        let boxes = record.boxes(cols).map_err(|problem| record.refusal(held, problem))?;
        *left = left
            .checked_sub(boxes)
            .ok_or_else(|| record.refusal(held, CopyProblem::TooMany { bands: boxes }))?;
        record.copy.visit(record.tensor_cols(cols), cols, &mut |it| {
            let (rows, cols) = (it.row..it.row + it.rows, it.col..it.col + it.cols);
            match record.tensor {
                Some((_, id, _)) => bands
                    .push(Band::new(id, rows, cols).at(it.at_row, it.at_col).row_step(it.row_step)),
                None => zeros.push((rows, cols)),
            }
        });
    }
    let rows = elements.checked_div(cols).unwrap_or(view.rows);
    let mut param =
        Param::new(held.name.clone(), held.dtype, rows, cols).map(held.map).bands(bands);
    for (rows, cols) in zeros {
        param = param.fill(rows, cols);
    }
    layout.param(param)?;
    Ok(())
}

/// A copy of a text, if it copies anything.
fn copy(
    tensor: &LogicalTensor,
    raw: &RawCopy<'_>,
    elements: u64,
) -> Result<Option<Copy>, CopyProblem> {
    let from = match &raw.from {
        None => Strided::slice(&tensor.shape, &[])?,
        Some(RawFrom { slice: Some(slice), offset: None, shape: None, stride: None }) => {
            Strided::slice(&tensor.shape, &slice.0)?
        }
        Some(RawFrom {
            slice: None,
            offset: Some(offset),
            shape: Some(shape),
            stride: Some(stride),
        }) => Strided::new(*offset, &shape.0, &stride.0)?,
        Some(_) => return Err(CopyProblem::From),
    };
    let to = Strided::new(raw.to.offset, &raw.to.shape.0, &raw.to.stride.0)?;
    if from.elements() != to.elements() {
        let count = |side: &Strided| side.elements().unwrap_or(u64::MAX);
        return Err(CopyProblem::Elements { from: count(&from), to: count(&to) });
    }
    if from.elements() == Some(0) {
        return Ok(None);
    }
    let held = tensor.view.rows * tensor.view.cols;
    if !from.inside(held) {
        return Err(CopyProblem::OutsideTensor { elements: held });
    }
    if !to.inside(elements) {
        return Err(CopyProblem::OutsideParam { elements });
    }
    Copy::new(&from, &to).map(Some)
}

/// Zeros, as a copy of the parameter to itself.
fn zeros(
    offset: u64,
    shape: &[u64],
    stride: &[u64],
    elements: u64,
) -> Result<Option<Copy>, CopyProblem> {
    let to = Strided::new(offset, shape, stride)?;
    if to.elements() == Some(0) {
        return Ok(None);
    }
    if to.elements().is_none() || !to.inside(elements) {
        return Err(CopyProblem::OutsideParam { elements });
    }
    Copy::new(&to, &to).map(Some)
}

/// The columns of the view in which all records can be said, with the fewest boxes; the first of equals.
fn best_cols(
    held: &Held,
    view: View,
    elements: u64,
    records: &[Record<'_>],
) -> Result<u64, BandsError> {
    let mut candidates = vec![view.cols];
    if held.view.is_none() {
        // Every split of the shape into rows and columns, then the tensors' own.
        let mut trailing = 1;
        for &extent in held.shape.iter().skip(1).rev() {
            trailing *= extent;
            candidates.push(trailing);
        }
        let tensors: BTreeSet<u64> =
            records.iter().filter_map(|record| record.tensor.map(|(_, _, cols)| cols)).collect();
        candidates.extend(tensors.into_iter().take(MAX_TENSOR_VIEWS));
    }
    let mut best: Option<(u64, u64)> = None;
    let mut refusal = None;
    for cols in candidates {
        if cols == 0 || !elements.is_multiple_of(cols) {
            continue;
        }
        let total = records.iter().try_fold(0_u64, |total, record| {
            let boxes = record.boxes(cols).map_err(|problem| record.refusal(held, problem))?;
            Ok(total.saturating_add(boxes))
        });
        match total {
            Ok(total) if best.is_none_or(|(fewest, _)| total < fewest) => {
                best = Some((total, cols))
            }
            Ok(_) => {}
            Err(error) => drop(refusal.get_or_insert(error)),
        }
    }
    match (best, refusal) {
        (Some((_, cols)), _) => Ok(cols),
        (None, Some(error)) => Err(error),
        // No elements, so no records.
        (None, None) => Ok(view.cols),
    }
}
