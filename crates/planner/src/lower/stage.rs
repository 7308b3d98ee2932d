//! Cutting what is staged into pieces, and packing pieces into waves.
//!
//! Staging everything at once takes as much memory as is staged, and every byte of it leaves the processor's caches
//! before it is landed. A wave takes a few megabytes, is landed while it is still there, and the next one uses the
//! same memory.

use alloc::vec;
use alloc::vec::Vec;

use super::STAGING_ALIGN;
use crate::{Dim, Dims, LowerError, Segment};

/// Segments of one source parameter that are staged together.
pub(super) type Piece = Vec<Segment>;

/// How segments lie in staging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// As in the source: one contiguous range, what lies between the segments included.
    Span,
    /// Run after run. Such pieces have one segment each.
    Packed,
}

impl Form {
    /// Bytes that a piece takes in staging.
    pub(super) fn bytes(self, piece: &[Segment]) -> u64 {
        match self {
            Self::Span => {
                let range = range(piece);
                range.1.saturating_sub(range.0)
            }
            Self::Packed => piece.iter().map(Segment::source_bytes).sum(),
        }
    }

    /// How many of the outermost steps of a piece fit into `limit`; at least one. `None` when a step reaches into the
    /// next, so that cutting there would read bytes twice.
    fn steps(self, piece: &[Segment], dim: &Dim, limit: u64) -> Option<u64> {
        let inner = self.bytes(&steps(piece, 0, 1));
        let stride = match self {
            Self::Span => dim.source_stride,
            Self::Packed => inner,
        };
        let fitting = limit.saturating_sub(inner).checked_div(stride).map_or(1, |more| more + 1);
        (inner <= stride).then_some(fitting)
    }
}

/// What pieces may take: bytes of staging each, and how many there may be.
#[derive(Debug)]
pub(super) struct Room {
    limit: u64,
    most: u64,
    left: u64,
}

impl Room {
    /// Pieces of at most `limit` bytes, with at most `most` segments in all of them. Without a limit on bytes nothing
    /// is cut, and there are no more than there were.
    pub(super) fn new(limit: u64, most: u64) -> Self {
        Self { limit, most, left: if limit == u64::MAX { u64::MAX } else { most } }
    }

    /// The same room for pieces of another size, whoever had some of it before.
    pub(super) fn with_limit(&self, limit: u64) -> Self {
        Self::new(if self.limit == u64::MAX { u64::MAX } else { limit }, self.most)
    }

    /// Refuses to cut where it takes more than there is room for.
    fn check(&self, pieces: u64) -> Result<(), LowerError> {
        if pieces <= self.left {
            return Ok(());
        }
        let taken = self.most - self.left;
        Err(LowerError::TooManyReads { reads: taken.saturating_add(pieces), max: self.most })
    }

    fn take(&mut self, piece: Piece, pieces: &mut Vec<Piece>) -> Result<(), LowerError> {
        let segments = piece.len() as u64;
        self.check(segments)?;
        self.left -= segments;
        pieces.push(piece);
        Ok(())
    }
}

/// First byte and one past the last that the segments span in their source parameter.
pub(super) fn range(piece: &[Segment]) -> (u64, u64) {
    let starts = piece.iter().map(|segment| segment.source_offset);
    let ends = piece.iter().map(|segment| {
        segment.source_offset.saturating_add(segment.dims.source_extent(segment.run))
    });
    (starts.min().unwrap_or(0), ends.max().unwrap_or(0))
}

/// Cuts a piece into pieces of at most `limit` bytes of staging, as far as its pattern allows: along the outermost
/// repetition that its segments share, and inside it; between segments; one run of one segment anywhere. The segments
/// are sorted by source offset.
pub(super) fn cut(
    piece: Piece,
    form: Form,
    room: &mut Room,
    pieces: &mut Vec<Piece>,
) -> Result<(), LowerError> {
    let bytes = form.bytes(&piece);
    if bytes <= room.limit {
        return room.take(piece, pieces);
    }
    if let Some(dim) = shared_outermost(&piece)
        && let Some(steps_each) = form.steps(&piece, &dim, room.limit)
    {
        room.check(dim.count / steps_each)?;
        let mut first = 0;
        while first < dim.count {
            let count = steps_each.min(dim.count - first);
            cut(steps(&piece, first, count), form, room, pieces)?;
            first += count;
        }
        return Ok(());
    }
    match piece.as_slice() {
        [segment] if segment.dims.is_none() => {
            // Every element size divides the alignment of staging.
            let most = (room.limit / STAGING_ALIGN).max(1) * STAGING_ALIGN;
            room.check(segment.run / most)?;
            runs(segment, most).try_for_each(|piece| room.take(piece, pieces))
        }
        [_] => room.take(piece, pieces),
        _ => between(piece, form, room, pieces),
    }
}

/// Cuts a piece of several segments where none of them crosses the cut.
fn between(
    piece: Piece,
    form: Form,
    room: &mut Room,
    pieces: &mut Vec<Piece>,
) -> Result<(), LowerError> {
    let mut parts: Vec<Piece> = Vec::new();
    let (mut start, mut end) = (0, 0);
    for segment in piece {
        let (first, last) = range(core::slice::from_ref(&segment));
        match parts.last_mut() {
            Some(part) if first < end || last - start <= room.limit => part.push(segment),
            _ => {
                parts.push(vec![segment]);
                start = first;
            }
        }
        end = last.max(end);
    }
    if parts.len() == 1 {
        return parts.into_iter().try_for_each(|part| room.take(part, pieces));
    }
    parts.into_iter().try_for_each(|part| cut(part, form, room, pieces))
}

/// The outermost repetition, if all segments have the same one up to its target stride.
fn shared_outermost(piece: &[Segment]) -> Option<Dim> {
    let outermost = |segment: &Segment| segment.dims.as_slice().first().copied();
    let first = outermost(piece.first()?)?;
    let same = |dim: Dim| (dim.count, dim.source_stride) == (first.count, first.source_stride);
    piece.iter().all(|segment| outermost(segment).is_some_and(same)).then_some(first)
}

/// `count` outermost steps of every segment, from number `first` on.
fn steps(piece: &[Segment], first: u64, count: u64) -> Piece {
    let part = |segment: &Segment| {
        let mut part = segment.clone();
        if let [dim, inner @ ..] = segment.dims.as_slice() {
            part.source_offset = part.source_offset.wrapping_add(first * dim.source_stride);
            part.target_offset = part.target_offset.wrapping_add(first * dim.target_stride);
            let outer = (count > 1).then_some(Dim { count, ..*dim });
            part.dims = outer.into_iter().chain(inner.iter().copied()).collect();
        }
        part
    };
    piece.iter().map(part).collect()
}

/// A contiguous segment in parts of at most `most` bytes, which hold whole elements.
fn runs(segment: &Segment, most: u64) -> impl Iterator<Item = Piece> {
    (0..segment.run.div_ceil(most)).map(move |index| {
        let start = index * most;
        vec![Segment {
            source_offset: segment.source_offset + start,
            target_offset: segment.target_offset + segment.transform.target_bytes(start),
            run: most.min(segment.run - start),
            dims: Dims::none(),
            ..*segment
        }]
    })
}

/// Where the next piece goes: a wave, and a place in its staging memory.
#[derive(Debug)]
pub(super) struct Stager {
    limit: u64,
    wave: usize,
    /// Bytes of the wave that are taken.
    taken: u64,
    /// The most that any wave takes.
    pub(super) most: u64,
}

impl Stager {
    pub(super) fn new(limit: u64) -> Self {
        Self { limit, wave: 0, taken: 0, most: 0 }
    }

    /// The wave and the staging offset of a piece of this size. A piece larger than a wave gets one of its own.
    pub(super) fn place(&mut self, bytes: u64) -> Result<(usize, u64), LowerError> {
        let base = self
            .taken
            .checked_next_multiple_of(STAGING_ALIGN)
            .ok_or(LowerError::StagingTooLarge)?;
        let end = base.checked_add(bytes).filter(|end| i64::try_from(*end).is_ok());
        let end = end.ok_or(LowerError::StagingTooLarge)?;
        if end > self.limit && base > 0 {
            (self.wave, self.taken) = (self.wave + 1, 0);
            return self.place(bytes);
        }
        self.taken = end;
        self.most = self.most.max(end);
        Ok((self.wave, base))
    }

    /// Bytes from the staging memory of one wave to that of the next, where `slots` waves have memory of their own.
    pub(super) fn slot(&self, slots: u64) -> Result<u64, LowerError> {
        let slot = self.most.checked_next_multiple_of(STAGING_ALIGN);
        let all = slot.and_then(|slot| slot.checked_mul(slots));
        match (slot, all.is_some_and(|all| i64::try_from(all).is_ok())) {
            (Some(slot), true) => Ok(slot),
            _ => Err(LowerError::StagingTooLarge),
        }
    }
}
