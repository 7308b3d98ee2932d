use std::mem;
use std::ops::Range;

use refit_pool::{Memory, MemoryKind};

use crate::{LocalRange, Transport, TransportLease};

/// What a pull writes, and whoever could access it.
pub(super) struct Owned<T: Transport> {
    pub(super) lease: TransportLease<T>,
    pub(super) live: Vec<Memory>,
}

/// Why batches cannot be posted into memory.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    NotOwned { batch: usize, len: u64 },
    Overlap { first: usize, second: usize },
}

impl<T: Transport> Owned<T> {
    /// Whether everything these batches write is in here, and no byte is written by two of them. Counts the bytes.
    pub(super) fn check(&self, transport: &T, which: Range<usize>) -> Result<u64, Refusal> {
        let memory = self.lease.arenas().iter().chain(&self.live);
        let owned =
            joined(memory.map(|memory| (memory.kind(), memory.address(), memory.len() as u64)));
        let batches = which.clone().zip(&self.lease.prepared()[which]);
        let mut written: Vec<(LocalRange, usize)> = batches
            .flat_map(|(batch, reads)| {
                transport.written(reads).iter().map(move |range| (*range, batch))
            })
            .collect();
        // Each batch's ranges are sorted: a stable sort merges them.
        written.sort_by_key(|(range, _)| (range.kind, range.address));
        check(&written, &owned)
    }

    /// Never frees any of it.
    pub(super) fn leak(self) {
        self.lease.quarantine();
        mem::forget(self.live);
    }
}

type Span = (MemoryKind, u64, u64);

/// The ranges in order, those that touch made one; as kind, start and end.
fn joined(ranges: impl Iterator<Item = (MemoryKind, u64, u64)>) -> Vec<Span> {
    let mut spans: Vec<Span> = ranges
        .filter(|range| range.2 > 0)
        .map(|(kind, start, len)| (kind, start, start.saturating_add(len)))
        .collect();
    spans.sort_unstable();
    let mut joined = Vec::<Span>::with_capacity(spans.len());
    for span in spans {
        match joined.last_mut() {
            Some(last) if last.0 == span.0 && span.1 <= last.2 => last.2 = last.2.max(span.2),
            _ => joined.push(span),
        }
    }
    joined
}

fn check(written: &[(LocalRange, usize)], owned: &[Span]) -> Result<u64, Refusal> {
    let mut bytes = 0;
    let mut owned = owned.iter().peekable();
    let mut last: Option<(MemoryKind, u64, usize)> = None;
    for &(range, batch) in written {
        let end = range
            .address
            .checked_add(range.len)
            .ok_or(Refusal::NotOwned { batch, len: range.len })?;
        if let Some((kind, last_end, other)) = last
            && kind == range.kind
            && range.address < last_end
        {
            return Err(Refusal::Overlap { first: other, second: batch });
        }
        last = Some((range.kind, end, batch));
        while owned.next_if(|span| (span.0, span.2) <= (range.kind, range.address)).is_some() {}
        let inside = owned
            .peek()
            .is_some_and(|span| span.0 == range.kind && span.1 <= range.address && end <= span.2);
        if !inside {
            return Err(Refusal::NotOwned { batch, len: range.len });
        }
        bytes += range.len;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: MemoryKind = MemoryKind::Host;

    fn at(address: u64, len: u64, batch: usize) -> (LocalRange, usize) {
        (LocalRange { address, len, kind: HOST }, batch)
    }

    #[test]
    fn ranges_may_cross_memories_that_touch_and_nothing_else() {
        let owned =
            joined([(HOST, 300, 10), (HOST, 100, 50), (HOST, 150, 50), (HOST, 0, 0)].into_iter());
        assert_eq!(owned, [(HOST, 100, 200), (HOST, 300, 310)]);
        assert_eq!(check(&[at(140, 20, 0), at(160, 40, 1), at(309, 1, 0)], &owned), Ok(61));
        for (address, len) in
            [(99, 1), (199, 2), (200, 1), (299, 2), (309, 2), (310, 1), (100, u64::MAX)]
        {
            assert_eq!(
                check(&[at(address, len, 7)], &owned),
                Err(Refusal::NotOwned { batch: 7, len })
            );
        }
        let device = LocalRange { address: 100, len: 1, kind: MemoryKind::Cuda(0) };
        assert_eq!(check(&[(device, 0)], &owned), Err(Refusal::NotOwned { batch: 0, len: 1 }));
    }

    #[test]
    fn two_batches_never_write_one_byte() {
        let owned = [(HOST, 0, 100)];
        assert_eq!(
            check(&[at(0, 10, 0), at(9, 1, 1)], &owned),
            Err(Refusal::Overlap { first: 0, second: 1 })
        );
    }
}
