//! Ranks that hold boxes of tensors, as FSDP and `DTensor` do, as bands.
//!
//! A tensor is seen as the first dimension by all others. A box that is cut in later dimensions too comes to several bands.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use refit_planner::{Band, Dtype, LayoutBuilder, LayoutError, Param, RankLayout};

/// Most dimensions of a tensor.
pub const MAX_DIMS: usize = 8;
/// Most bands of one box: a box that is cut in more places is no shard that anybody makes.
pub const MAX_BANDS: u64 = 1 << 16;

/// A rank's box of a tensor: contiguous, row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// The tensor's name; the rank's parameter has the same.
    pub name: Arc<str>,
    /// Extents of the whole tensor.
    pub global_shape: Vec<u64>,
    /// Element type in memory.
    pub dtype: Dtype,
    /// Where the box begins in each dimension.
    pub offsets: Vec<u64>,
    /// Extents of the box.
    pub local_shape: Vec<u64>,
}

/// Why boxes are not a rank's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShardError {
    /// Shape, offsets and local shape do not have as many dimensions, or have too many.
    #[error(
        "`{name}`: a tensor of {global} dimensions with offsets of {offsets} and a shard of {local}; all three have the \
         same number, {MAX_DIMS} at most"
    )]
    Dims {
        /// The tensor.
        name: Arc<str>,
        /// Dimensions of the whole tensor.
        global: usize,
        /// Of the offsets.
        offsets: usize,
        /// Of the box.
        local: usize,
    },
    /// A box that lies outside its tensor.
    #[error(
        "`{name}`: {extent} elements from {offset} on lie outside dimension {dim} of the tensor, which has {size}"
    )]
    Outside {
        /// The tensor.
        name: Arc<str>,
        /// The dimension.
        dim: usize,
        /// Where the box begins.
        offset: u64,
        /// Its extent.
        extent: u64,
        /// The tensor's.
        size: u64,
    },
    /// A box that is cut in too many places.
    #[error(
        "`{name}`: a shard of {local_shape:?} is more than {MAX_BANDS} pieces of its tensor; shard fewer dimensions"
    )]
    Pieces {
        /// The tensor.
        name: Arc<str>,
        /// Extents of the box.
        local_shape: Vec<u64>,
    },
    /// The bands are not a legal layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

impl ShardError {
    /// The tensor that it is about.
    #[must_use]
    pub fn name(&self) -> Option<&Arc<str>> {
        match self {
            Self::Dims { name, .. } | Self::Outside { name, .. } | Self::Pieces { name, .. } => {
                Some(name)
            }
            Self::Layout(_) => None,
        }
    }
}

/// The layout of a rank that holds these boxes. Boxes without elements are left out.
///
/// # Errors
/// [`ShardError`]; [`ShardError::Layout`] for two boxes of one name, and for sizes that cannot be.
pub fn layout(rank: u32, shards: &[Shard]) -> Result<RankLayout, ShardError> {
    let mut layout = LayoutBuilder::new(rank);
    for shard in shards {
        shard.check()?;
        if shard.local_shape.contains(&0) {
            continue;
        }
        let too_large = || LayoutError::TooLarge { rank, name: shard.name.clone() };
        let (rows, cols) = matrix(&shard.global_shape).ok_or_else(too_large)?;
        let tensor = layout.tensor(&shard.name, rows, cols)?;
        let (local_rows, local_cols) = matrix(&shard.local_shape).ok_or_else(too_large)?;
        let at = shard.offsets.first().copied().unwrap_or(0);
        let held = at..at + local_rows;
        let bands = shard
            .pieces()?
            .into_iter()
            .map(|(cols, at)| Band::new(tensor, held.clone(), cols).at(0, at));
        let param = Param::new(shard.name.clone(), shard.dtype, local_rows, local_cols);
        layout.param(param.bands(bands))?;
    }
    Ok(layout.build())
}

/// The first dimension by all others; a scalar is one element. `None` where that is too large to count.
fn matrix(shape: &[u64]) -> Option<(u64, u64)> {
    let (rows, rest) = shape.split_first().map_or((1, shape), |(rows, rest)| (*rows, rest));
    let cols = rest.iter().try_fold(1_u64, |cols, &extent| cols.checked_mul(extent))?;
    Some((rows, cols))
}

impl Shard {
    fn check(&self) -> Result<(), ShardError> {
        let name = || self.name.clone();
        let (global, offsets, local) =
            (self.global_shape.len(), self.offsets.len(), self.local_shape.len());
        if offsets != global || local != global || global > MAX_DIMS {
            return Err(ShardError::Dims { name: name(), global, offsets, local });
        }
        let extents = self.offsets.iter().zip(&self.local_shape).zip(&self.global_shape);
        for (dim, ((&offset, &extent), &size)) in extents.enumerate() {
            if offset.checked_add(extent).is_none_or(|end| end > size) {
                return Err(ShardError::Outside { name: name(), dim, offset, extent, size });
            }
        }
        Ok(())
    }

    /// The columns of the whole tensor that a row of the box is made of, and where each run of them begins in it.
    ///
    /// The last dimension that is cut, and all behind it, are one run for each place in the dimensions between the first and
    /// that one. Only for boxes that were checked, with elements, whose tensor's columns can be counted.
    fn pieces(&self) -> Result<Vec<(Range<u64>, u64)>, ShardError> {
        let dims = self.global_shape.len();
        let whole = |dim: usize| self.local_shape[dim] == self.global_shape[dim];
        let last = (1..dims).rev().find(|&dim| !whole(dim));
        let Some(last) = last else {
            let cols = self.global_shape.iter().skip(1).product();
            return Ok(Vec::from([(0..cols, 0)]));
        };
        let behind: u64 = self.global_shape[last + 1..].iter().product();
        let run = self.local_shape[last] * behind;
        // Places between the first dimension and the last that is cut, counted like a row of digits.
        let between = 1..last;
        let count = between.clone().try_fold(1_u64, |count, dim| {
            count.checked_mul(self.local_shape[dim]).filter(|count| *count <= MAX_BANDS)
        });
        let count = count.ok_or_else(|| ShardError::Pieces {
            name: self.name.clone(),
            local_shape: self.local_shape.clone(),
        })?;
        let piece = |index: u64| {
            let (mut left, mut start, mut stride) =
                (index, self.offsets[last] * behind, self.global_shape[last] * behind);
            for dim in between.clone().rev() {
                let extent = self.local_shape[dim];
                start += (self.offsets[dim] + left % extent) * stride;
                left /= extent;
                stride *= self.global_shape[dim];
            }
            (start..start + run, index * run)
        };
        Ok((0..count).map(piece).collect())
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    fn shard(global: &[u64], offsets: &[u64], local: &[u64]) -> Shard {
        Shard {
            name: "w".into(),
            global_shape: global.to_vec(),
            dtype: Dtype::Bf16,
            offsets: offsets.to_vec(),
            local_shape: local.to_vec(),
        }
    }

    /// Which element of the whole tensor each element of the box is, one by one.
    fn oracle(shard: &Shard) -> Vec<u64> {
        let elements: u64 = shard.local_shape.iter().product();
        let element = |index: u64| {
            let (mut left, mut at, mut stride) = (index, 0, 1);
            for dim in (0..shard.local_shape.len()).rev() {
                let extent = shard.local_shape[dim];
                at += (shard.offsets[dim] + left % extent) * stride;
                left /= extent;
                stride *= shard.global_shape[dim];
            }
            at
        };
        (0..elements).map(element).collect()
    }

    fn held(layout: &RankLayout) -> Vec<u64> {
        let param = layout.param("w").unwrap();
        let mut held = vec![u64::MAX; usize::try_from(param.rows() * param.cols()).unwrap()];
        for (_, tensor, band) in layout.bands() {
            let (at_row, at_col) = band.origin();
            for (local_row, row) in (at_row..).zip(band.logical_rows()) {
                for (local_col, col) in (at_col..).zip(band.logical_cols()) {
                    let place = usize::try_from(local_row * param.cols() + local_col).unwrap();
                    assert_eq!(held[place], u64::MAX, "said twice");
                    held[place] = row * tensor.cols + col;
                }
            }
        }
        held
    }

    #[test]
    fn every_element_is_where_the_box_has_it() {
        for (global, offsets, local) in [
            (&[7][..], &[3][..], &[2][..]),
            (&[], &[], &[]),
            (&[6, 5], &[2, 0], &[3, 5]),
            (&[6, 5], &[0, 1], &[6, 3]),
            (&[6, 5], &[1, 1], &[4, 4]),
            (&[4, 3, 5], &[1, 1, 0], &[2, 2, 5]),
            (&[4, 3, 5], &[0, 0, 2], &[4, 3, 2]),
            (&[4, 3, 5], &[2, 1, 1], &[2, 1, 3]),
            (&[2, 3, 4, 5], &[1, 1, 1, 2], &[1, 2, 2, 3]),
            (&[2, 3, 4, 5], &[0, 0, 1, 0], &[2, 3, 2, 5]),
        ] {
            let shard = shard(global, offsets, local);
            let layout = layout(0, core::slice::from_ref(&shard)).unwrap();
            assert_eq!(held(&layout), oracle(&shard), "{shard:?}");
        }
    }

    #[test]
    fn what_is_whole_behind_the_rows_is_one_band() {
        let layout = layout(3, &[shard(&[8, 3, 5], &[4, 0, 0], &[4, 3, 5])]).unwrap();
        assert_eq!((layout.rank(), layout.bands().count()), (3, 1));
    }

    #[test]
    fn a_box_without_elements_is_left_out() {
        let layout = layout(0, &[shard(&[3, 4], &[3, 0], &[0, 4])]).unwrap();
        assert!(layout.params().is_empty() && layout.tensors().is_empty());
    }

    #[test]
    fn boxes_that_cannot_be_are_refused() {
        let refused = |it: Shard| layout(0, &[it]).unwrap_err();
        let outside = refused(shard(&[4, 4], &[2, 0], &[3, 4]));
        assert!(matches!(outside, ShardError::Outside { dim: 0, .. }), "{outside}");
        let overflowing = refused(shard(&[4, 4], &[0, u64::MAX], &[4, 4]));
        assert!(matches!(overflowing, ShardError::Outside { dim: 1, .. }), "{overflowing}");
        let dims = refused(shard(&[4, 4], &[0], &[4, 4]));
        assert!(matches!(dims, ShardError::Dims { global: 2, offsets: 1, .. }), "{dims}");
        let many = refused(shard(&[2, 1 << 20, 2], &[0, 0, 0], &[2, 1 << 20, 1]));
        assert!(matches!(many, ShardError::Pieces { .. }), "{many}");
        let large = refused(shard(&[2, 1 << 40, 1 << 40], &[0, 0, 0], &[2, 1 << 40, 1 << 40]));
        assert!(matches!(large, ShardError::Layout(LayoutError::TooLarge { .. })), "{large}");
        let zeros = layout(0, &[shard(&[0, u64::MAX, 9], &[0, 0, 0], &[0, 0, 0])]).unwrap();
        assert!(zeros.params().is_empty());
        let twice = shard(&[4], &[0], &[4]);
        let twice = layout(0, &[twice.clone(), twice]).unwrap_err();
        assert!(matches!(twice, ShardError::Layout(LayoutError::DuplicateParam { .. })));
    }
}
