use std::mem;
use std::ops::Range;

use refit_pool::{Memory, MemoryKind};

use crate::patterns::shared;
use crate::{Transport, TransportLease, Written};

/// What a pull writes, and whoever could access it.
pub(super) struct Owned<T: Transport> {
    pub(super) lease: TransportLease<T>,
    pub(super) live: Vec<Memory>,
}

/// Why batches cannot be posted into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The lease has not so many batches, or they do not follow those of the pull.
    #[error("the lease has no such batches")]
    NoBatch,
    /// A batch writes memory that the pull does not own.
    #[error("batch {batch} writes {len} bytes that the pull does not own")]
    NotOwned {
        /// Index of the batch in the lease.
        batch: usize,
        /// Bytes of the pattern that lies outside.
        len: u64,
    },
    /// Two batches write the same byte.
    #[error("batches {first} and {second} write the same bytes")]
    Overlap {
        /// Index of a batch in the lease.
        first: usize,
        /// Index of another.
        second: usize,
    },
}

/// What was found about ranges of an entry's batches, for as long as the memory is the same. It is kept with the entry:
/// comparing every pattern again is most of what a warm pull does before its first byte.
#[derive(Debug)]
pub(super) struct Checked {
    /// The arenas and the live memory.
    memory: Vec<(MemoryKind, u64, u64)>,
    /// Ranges of batches that write nothing else, and no byte twice, and the bytes they write.
    ranges: Vec<(Range<usize>, u64)>,
}

impl Checked {
    /// Whether everything these batches write is in there, and no byte is written by two of them. Counts the bytes.
    pub(super) fn check<T: Transport>(
        &mut self,
        owned: &Owned<T>,
        transport: &T,
        batches: Range<usize>,
    ) -> Result<u64, Refusal> {
        if let Some((_, bytes)) = self.ranges.iter().find(|(range, _)| *range == batches) {
            return Ok(*bytes);
        }
        let bytes = owned.check(transport, batches.clone())?;
        self.ranges.push((batches, bytes));
        Ok(bytes)
    }
}

impl<T: Transport> Owned<T> {
    fn memory(&self) -> impl Iterator<Item = (MemoryKind, u64, u64)> {
        let memory = self.lease.arenas().iter().chain(&self.live);
        memory.map(|memory| (memory.kind(), memory.address(), memory.len() as u64))
    }

    /// What pulls before have found, if it was about this memory.
    pub(super) fn recall(&mut self) -> Box<Checked> {
        match self.lease.take_memo::<Checked>() {
            Some(checked) if checked.memory.iter().copied().eq(self.memory()) => checked,
            _ => Box::new(Checked { memory: self.memory().collect(), ranges: Vec::new() }),
        }
    }

    /// Keeps it for pulls to come. Nobody can change the batches and leave it there.
    pub(super) fn note(&mut self, checked: Box<Checked>) {
        self.lease.set_memo(checked);
    }

    /// Whether everything these batches write is in here, and no byte is written by two of them. Counts the bytes.
    fn check(&self, transport: &T, which: Range<usize>) -> Result<u64, Refusal> {
        let owned = joined(self.memory());
        let batches = which.clone().zip(&self.lease.prepared()[which]);
        let mut written: Vec<(&Written, usize)> = batches
            .flat_map(|(batch, reads)| {
                transport.written(reads).iter().map(move |pattern| (pattern, batch))
            })
            .collect();
        // Each batch's patterns are sorted: a stable sort merges them.
        written.sort_by_key(|(pattern, _)| (pattern.kind, pattern.address));
        check(&written, &owned)
    }

    /// Never frees any of it.
    pub(super) fn leak(self) {
        drop(self.lease.quarantine());
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

fn check(written: &[(&Written, usize)], owned: &[Span]) -> Result<u64, Refusal> {
    let mut bytes = 0;
    let mut owned = owned.iter().peekable();
    for &(pattern, batch) in written {
        let (kind, start, end) = (pattern.kind, pattern.address, pattern.end());
        while owned.next_if(|span| (span.0, span.2) <= (kind, start)).is_some() {}
        let inside =
            owned.peek().is_some_and(|span| span.0 == kind && span.1 <= start && end <= span.2);
        if !inside {
            return Err(Refusal::NotOwned { batch, len: pattern.bytes() });
        }
        bytes += pattern.bytes();
    }
    match shared(written) {
        Some((first, second)) => Err(Refusal::Overlap { first, second }),
        None => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: MemoryKind = MemoryKind::Host;

    fn check_all(ranges: &[(u64, u64, usize)], owned: &[Span]) -> Result<u64, Refusal> {
        let patterns: Vec<Written> =
            ranges.iter().map(|&(address, len, _)| Written::range(HOST, address, len)).collect();
        let tagged: Vec<(&Written, usize)> =
            patterns.iter().zip(ranges).map(|(pattern, range)| (pattern, range.2)).collect();
        check(&tagged, owned)
    }

    #[test]
    fn ranges_may_cross_memories_that_touch_and_nothing_else() {
        let owned =
            joined([(HOST, 300, 10), (HOST, 100, 50), (HOST, 150, 50), (HOST, 0, 0)].into_iter());
        assert_eq!(owned, [(HOST, 100, 200), (HOST, 300, 310)]);
        assert_eq!(check_all(&[(140, 20, 0), (160, 40, 1), (309, 1, 0)], &owned), Ok(61));
        for (address, len) in
            [(99, 1), (199, 2), (200, 1), (299, 2), (309, 2), (310, 1), (100, u64::MAX)]
        {
            assert_eq!(
                check_all(&[(address, len, 7)], &owned),
                Err(Refusal::NotOwned { batch: 7, len })
            );
        }
        let device = Written::range(MemoryKind::Cuda(0), 100, 1);
        assert_eq!(check(&[(&device, 0)], &owned), Err(Refusal::NotOwned { batch: 0, len: 1 }));
    }

    #[test]
    fn two_batches_never_write_one_byte() {
        let owned = [(HOST, 0, 100)];
        assert_eq!(
            check_all(&[(0, 10, 0), (9, 1, 1)], &owned),
            Err(Refusal::Overlap { first: 0, second: 1 })
        );
    }
}
