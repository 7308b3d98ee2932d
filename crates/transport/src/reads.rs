//! The checks every backend makes before it builds a batch. None of the arithmetic can wrap.

use refit_planner::Capabilities;
use refit_pool::MemoryKind;

use crate::{Cause, LocalRange, ReadOp, Side, TransportError};

/// Refuses reads whose numbers disagree, or that the transport does not execute.
pub(crate) fn check_shapes(reads: &[ReadOp], capabilities: &Capabilities) -> Result<(), Cause> {
    if reads.len() as u64 > capabilities.max_reads {
        return Err(Cause::TooMany { reads: reads.len(), max: capabilities.max_reads });
    }
    for (read, op) in reads.iter().enumerate() {
        if op.run == 0 || op.dims.as_slice().iter().any(|dim| dim.count == 0) {
            return Err(Cause::Empty);
        }
        if !op.dims.is_none() && !capabilities.strided_reads {
            return Err(Cause::Strided { read });
        }
        // Extents saturate; one that did cannot lie inside registered memory, which is checked next.
        let sides = [
            (Side::Remote, op.from.len, op.dims.source_extent(op.run)),
            (Side::Local, op.into.len, op.dims.target_extent(op.run)),
        ];
        for (side, len, extent) in sides {
            if len != extent {
                return Err(Cause::Extent { read, side, len, extent });
            }
        }
    }
    Ok(())
}

/// The bytes that reads write, sorted and joined where they touch.
///
/// The reads have passed [`check_shapes`] and lie in registered memory, so that the number of runs is bounded by it.
///
/// # Errors
/// [`TransportError::Overlap`] when a byte would be written twice.
pub(crate) fn written(peer: &str, reads: &[ReadOp]) -> Result<Vec<LocalRange>, TransportError> {
    let mut runs: Vec<Run> = Vec::with_capacity(reads.len());
    for (read, op) in reads.iter().enumerate() {
        let bytes = op.dims.runs().checked_mul(op.run);
        if bytes.is_none_or(|bytes| bytes > op.into.len) {
            // More bytes than room: some byte is written twice, and the runs may be too many to list.
            return Err(TransportError::Overlap { peer: peer.into(), first: read, second: read });
        }
        runs.extend(op.dims.offsets().map(|(_, offset)| {
            let start = op.into.address + offset;
            Run { kind: op.into.kind, start, end: start + op.run, read }
        }));
    }
    // Plans come sorted; asking costs a tenth of sorting.
    if !runs.is_sorted_by_key(|run| (run.kind, run.start)) {
        runs.sort_unstable_by_key(|run| (run.kind, run.start));
    }
    let mut joined: Vec<LocalRange> = Vec::new();
    let mut last: Option<&Run> = None;
    for run in &runs {
        if let Some(last) = last
            && last.kind == run.kind
            && run.start < last.end
        {
            return Err(TransportError::Overlap {
                peer: peer.into(),
                first: last.read,
                second: run.read,
            });
        }
        last = Some(run);
        push_joined(&mut joined, run.kind, run.start, run.end);
    }
    Ok(joined)
}

struct Run {
    kind: MemoryKind,
    start: u64,
    end: u64,
    read: usize,
}

fn push_joined(joined: &mut Vec<LocalRange>, kind: MemoryKind, start: u64, end: u64) {
    if let Some(last) = joined.last_mut()
        && last.kind == kind
        && last.address + last.len == start
    {
        last.len = end - last.address;
        return;
    }
    joined.push(LocalRange { address: start, len: end - start, kind });
}

/// Most bytes of an agent's name, incarnation included.
pub(crate) const MAX_NAME: usize = 128;

/// Refuses names that a C string, a log line or a file name could not carry.
pub(crate) fn check_name(name: &str) -> Result<(), Cause> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let fits = (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(plain);
    if fits { Ok(()) } else { Err(Cause::Name { max: MAX_NAME }) }
}

#[cfg(test)]
mod tests {
    use refit_planner::{Dim, Dims};

    use super::*;
    use crate::RemoteRange;

    const CAPABILITIES: Capabilities =
        Capabilities { strided_reads: true, bytes_per_us: 1, ns_per_read: 1, max_reads: 8 };

    fn op(address: u64, run: u64, dims: Dims) -> ReadOp {
        let kind = MemoryKind::Host;
        let (from, into) = (dims.source_extent(run), dims.target_extent(run));
        ReadOp {
            from: RemoteRange { address: 1, len: from, kind },
            into: LocalRange { address, len: into, kind },
            run,
            dims,
        }
    }

    fn strided(count: u64, stride: u64) -> Dims {
        Dims::one(Dim { count, source_stride: stride, target_stride: stride })
    }

    #[test]
    fn touching_ranges_join_and_interleaved_ones_do_not_overlap() {
        let reads =
            [op(200, 10, Dims::none()), op(100, 100, Dims::none()), op(300, 4, strided(3, 8))];
        let joined = written("p", &reads).unwrap();
        let spans: Vec<_> = joined.iter().map(|range| (range.address, range.len)).collect();
        assert_eq!(spans, [(100, 110), (300, 4), (308, 4), (316, 4)]);
        let interleaved = [op(300, 4, strided(3, 8)), op(304, 4, strided(3, 8))];
        assert_eq!(
            written("p", &interleaved).unwrap(),
            [LocalRange { address: 300, len: 24, kind: MemoryKind::Host }]
        );
    }

    #[test]
    fn overlaps_are_found_between_reads_and_within_one() {
        let pair = [op(100, 10, Dims::none()), op(109, 1, Dims::none())];
        assert_eq!(
            written("p", &pair).unwrap_err(),
            TransportError::Overlap { peer: "p".into(), first: 0, second: 1 }
        );
        for dims in [strided(3, 3), strided(u64::MAX, 0), strided(1 << 60, 1)] {
            let own = [op(100, 4, dims)];
            assert!(matches!(
                written("p", &own),
                Err(TransportError::Overlap { first: 0, second: 0, .. })
            ));
        }
    }

    #[test]
    fn numbers_that_disagree_are_refused() {
        assert_eq!(check_shapes(&[op(1, 0, Dims::none())], &CAPABILITIES), Err(Cause::Empty));
        assert_eq!(check_shapes(&[op(1, 1, strided(0, 1))], &CAPABILITIES), Err(Cause::Empty));
        let mut wrong = op(1, 4, strided(2, 8));
        wrong.into.len += 1;
        assert!(matches!(
            check_shapes(&[wrong], &CAPABILITIES),
            Err(Cause::Extent { side: Side::Local, .. })
        ));
        let many = vec![op(1, 1, Dims::none()); 9];
        assert_eq!(check_shapes(&many, &CAPABILITIES), Err(Cause::TooMany { reads: 9, max: 8 }));
        let plain = Capabilities { strided_reads: false, ..CAPABILITIES };
        assert_eq!(
            check_shapes(&[op(1, 4, strided(2, 8))], &plain),
            Err(Cause::Strided { read: 0 })
        );
    }

    #[test]
    fn names_are_plain() {
        assert!(check_name("trainer-3.a_B").is_ok());
        for name in ["", "a\0b", "ä", "a b", "a/b", &"x".repeat(MAX_NAME + 1)] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }
}
