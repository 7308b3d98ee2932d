//! Cutting target bands along source shards, and choosing among replicas.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use super::{Fill, Replicas, Segment, Transform};
use crate::layout::{Band, FillBox, Param, RankLayout};
use crate::source::{Replica, Shard, SourceLayout};
use crate::{Dim, Dims, PlanError};

/// A box of a logical tensor.
#[derive(Clone)]
struct Area {
    rows: Range<u64>,
    cols: Range<u64>,
}

impl Area {
    fn elements(&self) -> u64 {
        self.rows.end.saturating_sub(self.rows.start)
            * self.cols.end.saturating_sub(self.cols.start)
    }

    fn intersect(&self, shard: &Shard) -> Self {
        Self { rows: overlap(&self.rows, &shard.rows), cols: overlap(&self.cols, &shard.cols) }
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

fn overlap(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

/// A part of a target band that one source parameter provides.
pub(super) struct Piece<'a> {
    pub(super) replica: Replica,
    area: Area,
    from: (&'a Param, &'a Band),
    into: (&'a Param, &'a Band),
    transform: Transform,
}

impl Piece<'_> {
    pub(super) fn segment(&self, source: u32, target: u32) -> Segment {
        let (source_offset, source_stride) = self.place(self.from);
        let (target_offset, target_stride) = self.place(self.into);
        let count = self.area.rows.end - self.area.rows.start;
        let width = self.area.cols.end - self.area.cols.start;
        let run = width * self.from.0.dtype.size();
        let target_run = width * self.into.0.dtype.size();
        let contiguous = source_stride == run && target_stride == target_run;
        let (run, dims) = match count {
            1 => (run, Dims::none()),
            _ if contiguous => (run * count, Dims::none()),
            _ => (run, Dims::one(Dim { count, source_stride, target_stride })),
        };
        Segment {
            source,
            target,
            source_offset,
            target_offset,
            run,
            dims,
            transform: self.transform,
        }
    }

    /// Byte offset of the area's first element in a parameter, and bytes from one of its rows to the next.
    fn place(&self, (param, band): (&Param, &Band)) -> (u64, u64) {
        let row = band.at_row + (self.area.rows.start - band.rows.start) * band.row_step;
        let col = band.at_col + (self.area.cols.start - band.cols.start);
        let size = param.dtype.size();
        // In range: a row past the last may be counted here, but only for a parameter that has one row.
        let stride = band.row_step.saturating_mul(param.cols).saturating_mul(size);
        ((row * param.cols + col) * size, stride)
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

/// Cuts target bands into pieces and keeps count of what each source rank was asked for.
pub(super) struct Cutter<'a> {
    source: &'a SourceLayout,
    target: &'a RankLayout,
    rule: Replicas,
    load: BTreeMap<u32, u64>,
    pending: Vec<Area>,
}

impl<'a> Cutter<'a> {
    pub(super) fn new(source: &'a SourceLayout, target: &'a RankLayout, rule: Replicas) -> Self {
        Self { source, target, rule, load: BTreeMap::new(), pending: Vec::new() }
    }

    /// Covers `band` completely, or says which part of it no source holds.
    pub(super) fn cut(
        &mut self,
        param: &'a Param,
        band: &'a Band,
        mut emit: impl FnMut(Piece<'a>) -> Result<(), PlanError>,
    ) -> Result<(), PlanError> {
        let tensor = &self.target.tensors()[band.tensor.0 as usize];
        let (shape, shards) =
            self.source.shards_of(&tensor.name).unwrap_or(((tensor.rows, tensor.cols), &[]));
        if shape != (tensor.rows, tensor.cols) {
            return Err(PlanError::TensorShape {
                tensor: tensor.name.clone(),
                target_rows: tensor.rows,
                target_cols: tensor.cols,
                source_rows: shape.0,
                source_cols: shape.1,
            });
        }
        self.pending.clear();
        self.pending.push(Area { rows: band.rows.clone(), cols: band.cols.clone() });
        while let Some(area) = self.pending.pop() {
            let Some((shard, overlap)) = largest_overlap(shards, &area) else {
                return Err(uncovered(param, band, &tensor.name, &area));
            };
            let replica = self.choose(shard, param, overlap.elements())?;
            let from = (self.source.param_of(replica), self.source.band_of(replica));
            let Some(transform) = Transform::between(from.0.dtype, param.dtype) else {
                return Err(PlanError::Dtype {
                    param: param.name.clone(),
                    source_param: from.0.name.clone(),
                    rank: self.source.ranks()[replica.rank as usize].rank(),
                    from: from.0.dtype,
                    to: param.dtype,
                });
            };
            area.without(&overlap, &mut self.pending);
            emit(Piece { replica, area: overlap, from, into: (param, band), transform })?;
        }
        Ok(())
    }

    /// Picks the copy to read: same element type first, then by the rule.
    fn choose(
        &mut self,
        shard: &Shard,
        param: &Param,
        elements: u64,
    ) -> Result<Replica, PlanError> {
        let replicas = self.source.replicas_of(shard);
        let turn = self.target.rank() as usize;
        let best = replicas.iter().enumerate().min_by_key(|(place, replica)| {
            let cast = self.source.param_of(**replica).dtype != param.dtype;
            let (load, place) = match self.rule {
                Replicas::Lowest => (0, *place),
                Replicas::Spread => {
                    let rotated =
                        (*place + replicas.len() - turn % replicas.len()) % replicas.len();
                    (self.load.get(&replica.rank).copied().unwrap_or(0), rotated)
                }
            };
            (cast, load, place)
        });
        let Some((_, &replica)) = best else { return Err(PlanError::TooMany) };
        if self.rule == Replicas::Spread {
            let bytes = elements * self.source.param_of(replica).dtype.size();
            let load = self.load.entry(replica.rank).or_default();
            *load = load.saturating_add(bytes);
        }
        Ok(replica)
    }
}

/// The shard that covers most of `area`, the first of equals.
fn largest_overlap<'s>(shards: &'s [Shard], area: &Area) -> Option<(&'s Shard, Area)> {
    let mut best: Option<(&Shard, Area)> = None;
    // Shards are sorted by first row: the rest start below the area.
    for shard in shards.iter().take_while(|shard| shard.rows.start < area.rows.end) {
        let overlap = area.intersect(shard);
        let elements = overlap.elements();
        if elements > best.as_ref().map_or(0, |(_, best)| best.elements()) {
            let complete = elements == area.elements();
            best = Some((shard, overlap));
            if complete {
                break;
            }
        }
    }
    best
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
