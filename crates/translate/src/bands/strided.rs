//! A copy between strided patterns as boxes of rows and columns.

use alloc::vec::Vec;

use super::{CopyProblem, MAX_BANDS_PER_COPY};

/// Elements of a contiguous tensor, in the order in which a copy takes them: outermost dimension first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Strided {
    pub(super) offset: u64,
    /// Extents with their strides, in elements.
    pub(super) dims: Vec<(u64, u64)>,
}

impl Strided {
    pub(super) fn new(offset: u64, shape: &[u64], stride: &[u64]) -> Result<Self, CopyProblem> {
        if shape.len() != stride.len() {
            return Err(CopyProblem::Strides { shape: shape.len(), stride: stride.len() });
        }
        let dims = shape.iter().copied().zip(stride.iter().copied()).collect();
        Ok(Self { offset, dims })
    }

    /// The whole of a contiguous tensor cut to a slice of each of its first dimensions.
    pub(super) fn slice(shape: &[u64], slice: &[[u64; 2]]) -> Result<Self, CopyProblem> {
        if slice.len() > shape.len() {
            return Err(CopyProblem::Slices { slices: slice.len(), dims: shape.len() });
        }
        let mut sliced = Self { offset: 0, dims: Vec::with_capacity(shape.len()) };
        let mut stride = 1;
        for (dim, &extent) in shape.iter().enumerate().rev() {
            let [start, stop] = slice.get(dim).copied().unwrap_or([0, extent]);
            if start > stop || stop > extent {
                return Err(CopyProblem::Slice { dim, start, stop, extent });
            }
            // Inside the tensor, whose elements are counted.
            sliced.offset += start * stride;
            sliced.dims.push((stop - start, stride));
            stride *= extent;
        }
        sliced.dims.reverse();
        Ok(sliced)
    }

    /// How many elements it has; `None` where that does not fit.
    pub(super) fn elements(&self) -> Option<u64> {
        if self.dims.iter().any(|(extent, _)| *extent == 0) {
            return Some(0);
        }
        self.dims.iter().try_fold(1_u64, |product, (extent, _)| product.checked_mul(*extent))
    }

    /// Whether all of it lies inside a tensor of this many elements.
    pub(super) fn inside(&self, elements: u64) -> bool {
        let last = self.dims.iter().try_fold(self.offset, |last, &(extent, stride)| {
            last.checked_add(extent.checked_sub(1)?.checked_mul(stride)?)
        });
        last.is_some_and(|last| last < elements)
    }

    /// The same elements in the same order in as few dimensions as there can be.
    fn merged(&self) -> Vec<(u64, u64)> {
        let mut merged: Vec<(u64, u64)> = Vec::with_capacity(self.dims.len());
        for &(extent, stride) in self.dims.iter().filter(|(extent, _)| *extent != 1) {
            match merged.last_mut() {
                // What lies inside its tensor has spans that fit.
                Some(outer) if outer.1 == extent * stride => *outer = (outer.0 * extent, stride),
                _ => merged.push((extent, stride)),
            }
        }
        merged
    }
}

/// A repetition on both sides: how often, and how many elements further each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Dim {
    count: u64,
    from: u64,
    to: u64,
}

/// A copy: a contiguous run of elements that repeats.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Copy {
    from: u64,
    to: u64,
    /// Outermost first.
    dims: Vec<Dim>,
    /// Elements that follow each other on both sides; 1 where none do.
    run: u64,
}

/// A box of a logical tensor's view and its place in a parameter's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Box2 {
    pub(super) row: u64,
    pub(super) col: u64,
    pub(super) rows: u64,
    pub(super) cols: u64,
    pub(super) at_row: u64,
    pub(super) at_col: u64,
    pub(super) row_step: u64,
}

impl Copy {
    /// Pairs the elements of two patterns that lie inside their tensors and have equally many, at least one.
    pub(super) fn new(from: &Strided, to: &Strided) -> Result<Self, CopyProblem> {
        let (mut sources, mut targets) = (from.merged(), to.merged());
        if sources.iter().chain(&targets).any(|(_, stride)| *stride == 0) {
            return Err(CopyProblem::Repeated);
        }
        let mut dims: Vec<Dim> = Vec::new();
        // From the innermost dimension outwards: what both sides count alike becomes one.
        while let (Some(source), Some(target)) = (sources.last_mut(), targets.last_mut()) {
            let count = source.0.min(target.0);
            if !source.0.is_multiple_of(count) || !target.0.is_multiple_of(count) {
                return Err(CopyProblem::Reshaped { from: source.0, to: target.0 });
            }
            let dim = Dim { count, from: source.1, to: target.1 };
            match dims.last_mut() {
                Some(inner)
                    if (dim.from, dim.to) == (inner.count * inner.from, inner.count * inner.to) =>
                {
                    inner.count *= count;
                }
                _ => dims.push(dim),
            }
            for (side, stack) in [(*source, &mut sources), (*target, &mut targets)] {
                stack.pop();
                if side.0 > count {
                    stack.push((side.0 / count, side.1 * count));
                }
            }
        }
        let run = match dims.first() {
            Some(Dim { count, from: 1, to: 1 }) => *count,
            _ => 1,
        };
        if run > 1 {
            dims.remove(0);
        }
        dims.reverse();
        Ok(Self { from: from.offset, to: to.offset, dims, run })
    }

    /// How many boxes it takes at most between views of `from` and `to` columns.
    pub(super) fn boxes(&self, from: u64, to: u64) -> Result<u64, CopyProblem> {
        let rows = self.row_dim(from, to);
        let mut boxes: u64 = 1;
        for (index, dim) in self.dims.iter().enumerate().rev() {
            if rows == Some(index) {
                continue;
            }
            // Single elements that move inside a row: what a band cannot say.
            if self.run == 1 && !(dim.from.is_multiple_of(from) && dim.to.is_multiple_of(to)) {
                return Err(match (dim.from < from, dim.to < to) {
                    (true, true) => CopyProblem::Columns { from: dim.from, to: dim.to },
                    _ => CopyProblem::Transposed { from: dim.from, to: dim.to },
                });
            }
            boxes = boxes.saturating_mul(dim.count);
        }
        if !self.fits(from, to) {
            boxes = boxes.saturating_mul(self.pieces(from, to));
        }
        if boxes > MAX_BANDS_PER_COPY {
            return Err(CopyProblem::TooMany { bands: boxes });
        }
        Ok(boxes)
    }

    /// Calls `visit` with every box between views of `from` and `to` columns, of which there are not too many.
    pub(super) fn visit(&self, from: u64, to: u64, visit: &mut impl FnMut(Box2)) {
        let rows = self.row_dim(from, to);
        let mut others = self.dims.clone();
        let rows = rows.map(|index| others.remove(index));
        self.walk(&others, rows, (self.from, self.to), (from, to), visit);
    }

    fn walk(
        &self,
        dims: &[Dim],
        rows: Option<Dim>,
        at: (u64, u64),
        cols: (u64, u64),
        visit: &mut impl FnMut(Box2),
    ) {
        let Some((dim, inner)) = dims.split_first() else {
            return match rows {
                Some(rows) => visit(Self::boxed(at, cols, rows.count, self.run, rows.to / cols.1)),
                None => self.runs(at, cols, visit),
            };
        };
        for step in 0..dim.count {
            let at = (at.0 + step * dim.from, at.1 + step * dim.to);
            self.walk(inner, rows, at, cols, visit);
        }
    }

    /// The boxes of one run, which may go over the ends of rows.
    fn runs(&self, mut at: (u64, u64), cols: (u64, u64), visit: &mut impl FnMut(Box2)) {
        let mut left = self.run;
        while left > 0 {
            let ends = (cols.0 - at.0 % cols.0, cols.1 - at.1 % cols.1);
            let (rows, width) = match (ends, cols) {
                // Both at the start of rows of equal length: as many whole ones as there are.
                ((a, b), (from, to)) if a == from && b == to && from == to && left >= from => {
                    (left / from, from)
                }
                _ => (1, left.min(ends.0).min(ends.1)),
            };
            visit(Self::boxed(at, cols, rows, width, 1));
            left -= rows * width;
            at = (at.0 + rows * width, at.1 + rows * width);
        }
    }

    fn boxed(at: (u64, u64), cols: (u64, u64), rows: u64, width: u64, row_step: u64) -> Box2 {
        Box2 {
            row: at.0 / cols.0,
            col: at.0 % cols.0,
            rows,
            cols: width,
            at_row: at.1 / cols.1,
            at_col: at.1 % cols.1,
            row_step,
        }
    }

    /// Which dimension counts rows: consecutive ones of the tensor, equally far apart in the parameter.
    fn row_dim(&self, from: u64, to: u64) -> Option<usize> {
        let counts_rows = |dim: &Dim| dim.from == from && dim.to.is_multiple_of(to);
        let found = self.dims.iter().position(counts_rows)?;
        self.fits(from, to).then_some(found)
    }

    /// How many boxes a run takes at most that goes over the ends of rows.
    fn pieces(&self, from: u64, to: u64) -> u64 {
        if !self.aligned(from, to) {
            // One up to every end of a row on either side.
            return (self.run / from).saturating_add(self.run / to).saturating_add(3);
        }
        if self.dims.iter().any(|dim| !dim.from.is_multiple_of(from)) {
            return 3;
        }
        // The rest of a row, whole rows, the beginning of a row.
        let head = (from - self.from % from) % from;
        let rest = self.run - head.min(self.run);
        u64::from(head > 0) + u64::from(rest >= from) + u64::from(!rest.is_multiple_of(from))
    }

    /// Whether every run starts in the same column on both sides, of rows of equal length.
    fn aligned(&self, from: u64, to: u64) -> bool {
        let dims = self.dims.iter().map(|dim| (dim.from, dim.to));
        from == to && dims.chain([(self.from, self.to)]).all(|(a, b)| a % from == b % to)
    }

    /// Whether no run goes over the end of a row: neither the first, nor any other if they all start in its column.
    fn fits(&self, from: u64, to: u64) -> bool {
        let (mut most_from, mut most_to) = (self.from % from, self.to % to);
        for dim in &self.dims {
            let last = dim.count - 1;
            if !dim.from.is_multiple_of(from) {
                most_from = most_from.saturating_add(last.saturating_mul(dim.from));
            }
            if !dim.to.is_multiple_of(to) {
                most_to = most_to.saturating_add(last.saturating_mul(dim.to));
            }
        }
        most_from.saturating_add(self.run) <= from && most_to.saturating_add(self.run) <= to
    }
}
