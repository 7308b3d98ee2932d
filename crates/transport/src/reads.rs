//! The checks every backend makes before it builds a batch. None of the arithmetic can wrap.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use refit_planner::{Capabilities, Transform};

use crate::patterns::shared;
use crate::{Cause, LocalRange, ReadOp, Side, TransportError, Written};

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
        if op.transform != Transform::Copy && !capabilities.transforms {
            return Err(Cause::Transform { read, transform: op.transform });
        }
        if !op.transform.takes(op.run) {
            return Err(Cause::Elements { read, len: op.run, transform: op.transform });
        }
        // Extents saturate; one that did cannot lie inside registered memory, which is checked next.
        let sides = [
            (Side::Remote, op.from.len, op.dims.source_extent(op.run)),
            (Side::Local, op.into.len, op.dims.target_extent(op.written_run())),
        ];
        for (side, len, extent) in sides {
            if len != extent {
                return Err(Cause::Extent { read, side, len, extent });
            }
        }
    }
    Ok(())
}

/// What reads write, sorted, contiguous patterns joined where they touch.
///
/// The reads have passed [`check_shapes`] and lie in registered memory.
///
/// # Errors
/// [`TransportError::Overlap`] when a byte would be written twice.
pub(crate) fn written(peer: &str, reads: &[ReadOp]) -> Result<Vec<Written>, TransportError> {
    let overlap = |first, second| TransportError::Overlap { peer: peer.into(), first, second };
    let mut patterns: Vec<(Written, usize)> = Vec::with_capacity(reads.len());
    for (read, op) in reads.iter().enumerate() {
        let LocalRange { address, kind, .. } = op.into;
        let pattern = Written { kind, address, run: op.written_run(), dims: op.dims.clone() };
        if pattern.overlaps_itself() {
            return Err(overlap(read, read));
        }
        patterns.push((pattern, read));
    }
    // Plans come sorted; asking costs a tenth of sorting.
    let place = |pattern: &(Written, usize)| (pattern.0.kind, pattern.0.address);
    if !patterns.is_sorted_by_key(place) {
        patterns.sort_by_key(place);
    }
    let tagged: Vec<(&Written, usize)> =
        patterns.iter().map(|(pattern, read)| (pattern, *read)).collect();
    if let Some((first, second)) = shared(&tagged) {
        return Err(overlap(first, second));
    }
    let mut joined: Vec<Written> = Vec::with_capacity(patterns.len());
    for (pattern, _) in patterns {
        match joined.last_mut() {
            Some(last)
                if last.kind == pattern.kind
                    && last.dims.is_none()
                    && pattern.dims.is_none()
                    && last.end() == pattern.address =>
            {
                // Both lie in registered memory, which does not wrap.
                last.run = last.run.saturating_add(pattern.run);
            }
            _ => joined.push(pattern),
        }
    }
    Ok(joined)
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
    use refit_planner::{Dim, Dims, Dtype};
    use refit_pool::MemoryKind;

    use super::*;
    use crate::RemoteRange;

    const CAPABILITIES: Capabilities =
        Capabilities { strided_reads: true, max_reads: 8, ..Capabilities::plain(1, 1) };

    fn op(address: u64, run: u64, dims: Dims) -> ReadOp {
        let kind = MemoryKind::Host;
        let (from, into) = (dims.source_extent(run), dims.target_extent(run));
        ReadOp {
            from: RemoteRange { address: 1, len: from, kind },
            into: LocalRange { address, len: into, kind },
            run,
            dims,
            transform: Transform::Copy,
            bulk: false,
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
        let spans: Vec<_> = joined.iter().map(|w| (w.address, w.run, w.dims.runs())).collect();
        assert_eq!(spans, [(100, 110, 1), (300, 4, 3)]);
        let interleaved = [op(300, 4, strided(3, 8)), op(304, 4, strided(3, 8))];
        assert_eq!(written("p", &interleaved).unwrap().len(), 2);
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
    fn transforms_need_a_transport_that_has_them_and_whole_elements() {
        let cast = Transform::Cast { from: Dtype::F32, to: Dtype::Bf16 };
        let mut read = op(100, 8, Dims::none());
        read.transform = cast;
        read.into.len = 4;
        assert_eq!(
            check_shapes(&[read.clone()], &CAPABILITIES),
            Err(Cause::Transform { read: 0, transform: cast })
        );
        let casting = Capabilities { transforms: true, ..CAPABILITIES };
        assert_eq!(check_shapes(&[read.clone()], &casting), Ok(()));
        assert_eq!(
            written("p", &[read.clone()]).unwrap(),
            [Written::range(MemoryKind::Host, 100, 4)]
        );
        read.run = 7;
        assert!(matches!(check_shapes(&[read], &casting), Err(Cause::Elements { len: 7, .. })));
    }

    #[test]
    fn names_are_plain() {
        assert!(check_name("trainer-3.a_B").is_ok());
        for name in ["", "a\0b", "ä", "a b", "a/b", &"x".repeat(MAX_NAME + 1)] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }
}
