//! Cutting target bands along source shards.

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use super::search::Search;
use super::{Fill, Segment, Transform};
use crate::layout::{Band, FillBox, Param, RankLayout};
use crate::source::{Replica, Shard, SourceLayout};
use crate::{Dim, Dims, PlanError};

/// A box of a logical tensor.
#[derive(Clone)]
pub(super) struct Area {
    pub(super) rows: Range<u64>,
    pub(super) cols: Range<u64>,
}

impl Area {
    pub(super) fn elements(&self) -> u64 {
        self.rows.end.saturating_sub(self.rows.start)
            * self.cols.end.saturating_sub(self.cols.start)
    }

    pub(super) fn intersect(&self, shard: &Shard) -> Self {
        Self { rows: overlap(&self.rows, &shard.rows), cols: overlap(&self.cols, &shard.cols) }
    }

    pub(super) fn common(&self, other: &Self) -> Self {
        Self { rows: overlap(&self.rows, &other.rows), cols: overlap(&self.cols, &other.cols) }
    }

    /// What is left of `self` without `hole`, which lies inside it: at most four boxes.
    fn without(&self, hole: &Self, rest: &mut Vec<Self>) {
        let parts = [
            Self { rows: self.rows.start..hole.rows.start, cols: self.cols.clone() },
            Self { rows: hole.rows.end..self.rows.end, cols: self.cols.clone() },
            Self { rows: hole.rows.clone(), cols: self.cols.start..hole.cols.start },
            Self { rows: hole.rows.clone(), cols: hole.cols.end..self.cols.end },
        ];
        rest.extend(parts.into_iter().filter(|part| part.elements() > 0));
    }
}

impl Area {
    /// Byte offset of the area's first element in a parameter, and bytes from one of its rows to the next.
    fn place(&self, (param, band): (&Param, &Band)) -> (u64, u64) {
        let row = band.at_row + (self.rows.start - band.rows.start) * band.row_step;
        let col = band.at_col + (self.cols.start - band.cols.start);
        let size = param.dtype.size();
        // A stride that saturates belongs to an area of one row, which has no use for it.
        let stride = band.row_step.saturating_mul(param.cols).saturating_mul(size);
        ((row * param.cols + col) * size, stride)
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

/// A part of a target band, and the shard that covers it.
pub(super) struct Cut<'a> {
    area: Area,
    into: (&'a Param, &'a Band),
    /// The copies there are of the shard.
    pub(super) replicas: &'a [Replica],
}

impl<'a> Cut<'a> {
    /// Elements of the part.
    pub(super) fn elements(&self) -> u64 {
        self.area.elements()
    }

    /// The parameter that the part belongs to.
    pub(super) fn target(&self) -> &'a Param {
        self.into.0
    }

    /// The part as a segment that reads one of the copies, number `source` of the plan.
    pub(super) fn segment(
        &self,
        layout: &SourceLayout,
        replica: Replica,
        source: u32,
        target: u32,
    ) -> Result<Segment, PlanError> {
        let from = (layout.param_of(replica), layout.band_of(replica));
        let Some(transform) = Transform::between(from.0.dtype, self.into.0.dtype) else {
            return Err(PlanError::Dtype {
                param: self.into.0.name.clone(),
                source_param: from.0.name.clone(),
                rank: layout.ranks()[replica.rank as usize].rank(),
                from: from.0.dtype,
                to: self.into.0.dtype,
            });
        };
        let (source_offset, source_stride) = self.area.place(from);
        let (target_offset, target_stride) = self.area.place(self.into);
        let count = self.area.rows.end - self.area.rows.start;
        let width = self.area.cols.end - self.area.cols.start;
        let run = width * from.0.dtype.size();
        let target_run = width * self.into.0.dtype.size();
        let contiguous = source_stride == run && target_stride == target_run;
        let (run, dims) = match count {
            1 => (run, Dims::none()),
            _ if contiguous => (run * count, Dims::none()),
            _ => (run, Dims::one(Dim { count, source_stride, target_stride })),
        };
        Ok(Segment { source, target, source_offset, target_offset, run, dims, transform })
    }
}

/// The bytes of a declared box of zeros.
pub(super) fn fill(param: &Param, fill: &FillBox, target: u32) -> Fill {
    let size = param.dtype.size();
    let (rows, width) = (fill.rows.end - fill.rows.start, fill.cols.end - fill.cols.start);
    let offset = (fill.rows.start * param.cols + fill.cols.start) * size;
    if width == param.cols || rows == 1 {
        return Fill { target, offset, run: rows * width * size, dims: Dims::none() };
    }
    let dims = Dims::one(Dim { count: rows, source_stride: 0, target_stride: param.cols * size });
    Fill { target, offset, run: width * size, dims }
}

/// Covers `band` of `target` completely with shards, or says which part of it no source holds.
pub(super) fn cut<'a>(
    source: &'a SourceLayout,
    target: &'a RankLayout,
    param: &'a Param,
    band: &'a Band,
    search: &mut Search,
    cuts: &mut Vec<Cut<'a>>,
) -> Result<(), PlanError> {
    let tensor = &target.tensors()[band.tensor.0 as usize];
    let held = source.shards_of(&tensor.name);
    let (shape, shards) = held.unwrap_or(((tensor.rows, tensor.cols), &[]));
    if shape != (tensor.rows, tensor.cols) {
        return Err(PlanError::TensorShape {
            tensor: tensor.name.clone(),
            target_rows: tensor.rows,
            target_cols: tensor.cols,
            source_rows: shape.0,
            source_cols: shape.1,
        });
    }
    let mut pending = vec![Area { rows: band.rows.clone(), cols: band.cols.clone() }];
    while let Some(area) = pending.pop() {
        let largest = search.largest_overlap(param, band.tensor, shards, &area)?;
        let Some((shard, overlap)) = largest else {
            return Err(uncovered(param, band, &tensor.name, &area));
        };
        let replicas = source.replicas_of(shard);
        search.budget.piece(param, replicas.len())?;
        area.without(&overlap, &mut pending);
        cuts.push(Cut { area: overlap, into: (param, band), replicas });
    }
    Ok(())
}

fn uncovered(param: &Param, band: &Band, tensor: &Arc<str>, area: &Area) -> PlanError {
    let row = band.at_row + (area.rows.start - band.rows.start) * band.row_step;
    let col = band.at_col + (area.cols.start - band.cols.start);
    PlanError::Uncovered {
        param: param.name.clone(),
        tensor: tensor.clone(),
        rows_start: area.rows.start,
        rows_end: area.rows.end,
        cols_start: area.cols.start,
        cols_end: area.cols.end,
        byte: (row * param.cols + col) * param.dtype.size(),
    }
}
