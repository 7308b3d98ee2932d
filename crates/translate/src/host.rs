//! Landing on the host: strided copies from staging into parameters, with casts and element maps, and fills.
//!
//! This is the reference that other executors are compared with, and what runs when parameters are in host memory.
//! Buffers are plain bytes of any alignment, elements little-endian. Everything is checked before the first byte is
//! written; an error leaves the parameter as it was.

mod convert;

use refit_planner::{Dim, Dims, Dtype, Fill, Landing, Transform};

use convert::Conversion;

/// Why a landing copy or a fill was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LandError {
    /// The copy reads beyond staging.
    #[error("the copy reads staging up to byte {end}, which has {len}")]
    OutsideStaging {
        /// One past the last byte read; saturated.
        end: u64,
        /// Bytes of staging.
        len: u64,
    },
    /// The copy or fill writes beyond the parameter.
    #[error("the copy writes the parameter up to byte {end}, which has {len}")]
    OutsideParam {
        /// One past the last byte written; saturated.
        end: u64,
        /// Bytes of the parameter.
        len: u64,
    },
    /// The pattern writes more bytes than there are between its first and its last.
    #[error("the copy writes {written} bytes into {extent}: its runs overlap")]
    Overlap {
        /// Bytes written; saturated.
        written: u64,
        /// Bytes from the first to the last.
        extent: u64,
    },
    /// A run does not hold whole elements.
    #[error("a run of {run} bytes does not hold whole {from} elements")]
    Ragged {
        /// Bytes of a run.
        run: u64,
        /// Element type in staging.
        from: Dtype,
    },
    /// A transform that this executor does not know.
    #[error("{transform:?} cannot be carried out on the host")]
    Unsupported {
        /// The transform.
        transform: Transform,
    },
}

/// Carries out a landing copy: from `staging`, the whole staging area, into `param`, the whole target parameter.
///
/// # Errors
/// [`LandError::OutsideStaging`], [`LandError::OutsideParam`], [`LandError::Overlap`], [`LandError::Ragged`],
/// [`LandError::Unsupported`]; nothing has been written then.
pub fn land(landing: &Landing, staging: &[u8], param: &mut [u8]) -> Result<(), LandError> {
    let Landing { run, transform, .. } = *landing;
    let conversion = match transform {
        Transform::Copy => None,
        transform => Some(Conversion::new(transform).ok_or(LandError::Unsupported { transform })?),
    };
    if let Some(conversion) = conversion
        && !run.is_multiple_of(conversion.from.size())
    {
        return Err(LandError::Ragged { run, from: conversion.from });
    }
    let (staged, held) = (length(staging), length(param));
    each_run(landing, staged, held, |from, into| {
        // Sizes of runs that were found inside the slices.
        let (run, target_run) = (index(run), index(transform.target_bytes(run)));
        let (from, into) = (&staging[from..from + run], &mut param[into..into + target_run]);
        match conversion {
            None => into.copy_from_slice(from),
            Some(conversion) => conversion.run(from, into),
        }
    })
}

/// Calls `visit` with the place of every run of a landing copy, in a staging area of `staged` bytes and in a parameter
/// of `held` bytes: for executors that copy in ways of their own. Every run lies inside both.
///
/// # Errors
/// [`LandError::OutsideStaging`], [`LandError::OutsideParam`], [`LandError::Overlap`]; nothing has been visited then.
pub fn each_run(
    landing: &Landing,
    staged: u64,
    held: u64,
    mut visit: impl FnMut(usize, usize),
) -> Result<(), LandError> {
    let Landing { staging_offset, offset, run, ref dims, transform, .. } = *landing;
    if run == 0 || dims.runs() == 0 {
        return Ok(());
    }
    let end = staging_offset.saturating_add(dims.source_extent(run));
    if end > staged {
        return Err(LandError::OutsideStaging { end, len: staged });
    }
    check_target(offset, transform.target_bytes(run), dims, held)?;
    walk(dims.as_slice(), staging_offset, offset, &mut visit);
    Ok(())
}

/// Sets a box of `param`, the whole target parameter, to zero.
///
/// # Errors
/// [`LandError::OutsideParam`] and [`LandError::Overlap`]; nothing has been written then.
pub fn fill(fill: &Fill, param: &mut [u8]) -> Result<(), LandError> {
    let Fill { offset, run, ref dims, .. } = *fill;
    if run == 0 || dims.runs() == 0 {
        return Ok(());
    }
    check_target(offset, run, dims, length(param))?;
    let run = index(run);
    walk(dims.as_slice(), 0, offset, &mut |_, into| param[into..into + run].fill(0));
    Ok(())
}

/// Bounds, and that no more is written than fits: it also bounds the time taken and, as every dimension that counts
/// at least doubles the bytes, the depth of [`walk`].
fn check_target(offset: u64, run: u64, dims: &Dims, held: u64) -> Result<(), LandError> {
    let extent = dims.target_extent(run);
    let end = offset.saturating_add(extent);
    if end > held {
        return Err(LandError::OutsideParam { end, len: held });
    }
    let written = run.saturating_mul(dims.runs());
    if written > extent {
        return Err(LandError::Overlap { written, extent });
    }
    Ok(())
}

/// Calls `copy` with the place of every run on either side, outermost dimension slowest: additions only, no division.
fn walk(mut dims: &[Dim], mut source: u64, mut target: u64, copy: &mut impl FnMut(usize, usize)) {
    while let [Dim { count: 1, .. }, inner @ ..] = dims {
        dims = inner;
    }
    let Some((dim, inner)) = dims.split_first() else {
        return copy(index(source), index(target));
    };
    // Wrapping, because a fill has no source to check: what it says about one is never used.
    for _ in 0..dim.count {
        if inner.is_empty() {
            copy(index(source), index(target));
        } else {
            walk(inner, source, target, copy);
        }
        source = source.wrapping_add(dim.source_stride);
        target = target.wrapping_add(dim.target_stride);
    }
}

fn length(bytes: &[u8]) -> u64 {
    bytes.len() as u64
}

/// A number that was found to be at most a slice's length.
#[allow(clippy::cast_possible_truncation, reason = "slices are no longer than usize::MAX")]
fn index(number: u64) -> usize {
    number as usize
}
