//! Making segments few: neighbours that are contiguous on both sides become one run, equal ones at equal distances
//! become one strided segment. Counts change, bytes never do.

use alloc::vec::Vec;

use super::Segment;
use crate::Dim;

/// Deeper patterns than this stay separate segments; no layout we know needs more.
const MAX_DIMS: usize = 3;

/// Sorts and merges `segments[first..]`, which belong to one target parameter.
pub(super) fn coalesce(segments: &mut Vec<Segment>, first: usize) {
    segments[first..].sort_unstable_by_key(|segment| segment.target_offset);
    merge(segments, first, join_contiguous);
    for _ in 0..MAX_DIMS {
        let before = segments.len();
        fold(segments, first);
        if segments.len() == before {
            break;
        }
    }
}

/// Replaces neighbours that `join` can unite.
fn merge(segments: &mut Vec<Segment>, first: usize, join: fn(&mut Segment, &Segment) -> bool) {
    let mut kept = first;
    for next in first + 1..segments.len() {
        let (head, tail) = segments.split_at_mut(next);
        if !join(&mut head[kept], &tail[0]) {
            kept += 1;
            segments.swap(kept, next);
        }
    }
    segments.truncate(segments.len().min(kept + 1));
}

/// `b` continues `a` on both sides: one longer run, or one pattern with more rows.
fn join_contiguous(a: &mut Segment, b: &Segment) -> bool {
    if a.source != b.source || a.transform != b.transform {
        return false;
    }
    let distance =
        (b.source_offset.wrapping_sub(a.source_offset), b.target_offset - a.target_offset);
    if a.dims.is_none() && b.dims.is_none() && distance == (a.run, a.target_run()) {
        a.run += b.run;
        return true;
    }
    let same_run = a.run == b.run;
    if let ([da], [db]) = (a.dims.as_slice(), b.dims.as_slice()) {
        let continues = distance
            == (da.count.wrapping_mul(da.source_stride), da.count.wrapping_mul(da.target_stride));
        let same_strides =
            (da.source_stride, da.target_stride) == (db.source_stride, db.target_stride);
        if same_run && same_strides && continues {
            let count = db.count;
            if let Some(dim) = a.dims.first_mut() {
                dim.count += count;
            }
            return true;
        }
    }
    false
}

/// Replaces series of equal segments at equal distances by one segment with an outer dimension.
fn fold(segments: &mut Vec<Segment>, first: usize) {
    let mut kept = first;
    let mut at = first;
    while at < segments.len() {
        let series = series_length(&segments[at..]);
        segments.swap(kept, at);
        if series > 1 {
            let (head, next) = (&segments[kept], &segments[at + 1]);
            let dim = Dim {
                count: series as u64,
                source_stride: next.source_offset - head.source_offset,
                target_stride: next.target_offset - head.target_offset,
            };
            let dims = head.dims.outer(dim);
            segments[kept].dims = dims;
        }
        kept += 1;
        at += series;
    }
    segments.truncate(kept);
}

/// How many leading segments have equal shape and equal, forward distances.
fn series_length(segments: &[Segment]) -> usize {
    let [head, next, rest @ ..] = segments else { return segments.len() };
    let step = |a: &Segment, b: &Segment| {
        let same = a.source == b.source
            && a.transform == b.transform
            && a.run == b.run
            && a.dims == b.dims;
        let forward = b.source_offset > a.source_offset;
        let distance =
            (b.source_offset.wrapping_sub(a.source_offset), b.target_offset - a.target_offset);
        (same && forward && head.dims.as_slice().len() < MAX_DIMS).then_some(distance)
    };
    let Some(distance) = step(head, next) else { return 1 };
    let mut last = next;
    let more = rest.iter().take_while(|&candidate| {
        let fits = step(last, candidate) == Some(distance);
        last = candidate;
        fits
    });
    2 + more.count()
}
