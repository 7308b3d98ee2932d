//! Cutting target bands along source shards.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use super::search::Search;
use super::{Fill, Segment};
use crate::layout::{Band, FillBox, Param};
use crate::source::{ClassParam, Held, Owner, Shard, SourceLayout};
use crate::{Dim, Dims, ElementMap, PlanError, Tensor, Transform};

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

/// Where a band lies in a parameter of `cols` columns of `size` bytes.
struct Place {
    row: u64,
    col: u64,
    row_step: u64,
    cols: u64,
    size: u64,
}

impl Place {
    /// Byte offset of the element `down` and `right` of the band's first, and bytes from one of its rows to the next.
    fn of(&self, down: u64, right: u64) -> (u64, u64) {
        let (row, col) = (self.row + down * self.row_step, self.col + right);
        // A stride that saturates belongs to an area of one row, which has no use for it.
        let stride = self.row_step.saturating_mul(self.cols).saturating_mul(self.size);
        ((row * self.cols + col) * self.size, stride)
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

/// A part of a target band, and the shard that covers it.
pub(super) struct Cut<'a> {
    area: Area,
    param: &'a Param,
    band: &'a Band,
    shard: &'a Shard,
    /// The classes of ranks that hold the shard.
    pub(super) owners: &'a [Owner],
}

impl<'a> Cut<'a> {
    /// Elements of the part.
    pub(super) fn elements(&self) -> u64 {
        self.area.elements()
    }

    /// The parameter that the part belongs to.
    pub(super) fn target(&self) -> &'a Param {
        self.param
    }

    /// How many ranks hold the shard.
    pub(super) fn copies(&self) -> usize {
        self.shard.copies
    }

    /// The part as a segment that reads one of the owners on rank `rank`, number `source` of the plan.
    pub(super) fn segment(
        &self,
        layout: &SourceLayout,
        owner: &Owner,
        rank: u32,
        source: u32,
        target: u32,
    ) -> Result<Segment, PlanError> {
        let (from, into) = (layout.param_of(owner), self.param);
        let transform =
            transform(owner, into).ok_or_else(|| no_transform(owner, from, rank, into))?;
        let (rows, cols) = (&self.area.rows, &self.area.cols);
        let from_size = owner.dtype.size();
        let place = Place {
            row: owner.at_row,
            col: owner.at_col,
            row_step: owner.row_step,
            cols: from.cols,
            size: from_size,
        };
        let (source_offset, source_stride) =
            place.of(rows.start - self.shard.rows.start, cols.start - self.shard.cols.start);
        let (target_offset, target_stride) = place_of(into, self.band, &self.area);
        let count = rows.end - rows.start;
        let width = cols.end - cols.start;
        let run = width * from_size;
        let contiguous = source_stride == run && target_stride == width * into.dtype.size();
        let (run, dims) = match count {
            1 => (run, Dims::none()),
            _ if contiguous => (run * count, Dims::none()),
            _ => (run, Dims::one(Dim { count, source_stride, target_stride })),
        };
        Ok(Segment { source, target, source_offset, target_offset, run, dims, transform })
    }
}

/// Byte offset of an area of a target's band, and bytes from one of its rows to the next.
fn place_of(param: &Param, band: &Band, area: &Area) -> (u64, u64) {
    let place = Place {
        row: band.at_row,
        col: band.at_col,
        row_step: band.row_step,
        cols: param.cols,
        size: param.dtype.size(),
    };
    place.of(area.rows.start - band.rows.start, area.cols.start - band.cols.start)
}

/// What joins a source parameter to a target parameter, if anything does.
pub(super) fn transform(from: &Owner, into: &Param) -> Option<Transform> {
    let ((map, ElementMap::Identity) | (ElementMap::Identity, map)) = (from.map, into.map) else {
        return None;
    };
    Transform::mapping(map, from.dtype, into.dtype)
}

/// Why nothing joins them.
fn no_transform(owner: &Owner, source: &ClassParam, rank: u32, target: &Param) -> PlanError {
    let (param, source_param) = (target.name.clone(), source.name.clone());
    let (from, to) = (owner.dtype, target.dtype);
    match (owner.map, target.map) {
        (ElementMap::Identity, ElementMap::Identity) => {
            PlanError::Dtype { param, source_param, rank, from, to }
        }
        (map, ElementMap::Identity) | (ElementMap::Identity, map) => {
            PlanError::MapDtype { param, source_param, rank, map, from, to }
        }
        (source_map, target_map) => {
            PlanError::MapsMeet { param, source_param, rank, source_map, target_map }
        }
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

/// Covers `band` completely with shards of its `tensor`, of which the source side holds `held`, or says which part of
/// it no source holds.
pub(super) fn cut<'a>(
    source: &'a SourceLayout,
    held: Option<&'a Held>,
    tensor: &Tensor,
    param: &'a Param,
    band: &'a Band,
    search: &mut Search,
    cuts: &mut Vec<Cut<'a>>,
) -> Result<(), PlanError> {
    let shards = held.map_or(&[][..], |held| source.shards_of(held));
    let mut pending = Vec::new();
    let mut next = Some(Area { rows: band.rows.clone(), cols: band.cols.clone() });
    while let Some(area) = next {
        let largest = search.largest_overlap(param, band.tensor, shards, &area)?;
        let Some((shard, overlap)) = largest else {
            return Err(uncovered(param, band, &tensor.name, &area));
        };
        let owners = source.owners_of(shard);
        search.budget.piece(param, owners.len())?;
        area.without(&overlap, &mut pending);
        cuts.push(Cut { area: overlap, param, band, shard, owners });
        next = pending.pop();
    }
    Ok(())
}

fn uncovered(param: &Param, band: &Band, tensor: &Arc<str>, area: &Area) -> PlanError {
    PlanError::Uncovered {
        param: param.name.clone(),
        tensor: tensor.clone(),
        rows_start: area.rows.start,
        rows_end: area.rows.end,
        cols_start: area.cols.start,
        cols_end: area.cols.end,
        byte: place_of(param, band, area).0,
    }
}
