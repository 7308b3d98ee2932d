//! What an agent remembers of one incarnation of a peer.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use refit_pool::MemoryKind;

use crate::ReadOp;
use crate::registry::Ranges;

/// A registration of a peer: where it lives, where it starts, how long it is.
pub(super) type Place = (MemoryKind, u64, u64);

/// When a peer was heard from, and which of its registrations were read from.
#[derive(Debug, Default)]
pub(super) struct Link {
    heard: Mutex<Option<Instant>>,
    touched: Mutex<BTreeSet<(MemoryKind, u64)>>,
}

impl Link {
    /// A read from the peer has finished.
    pub(super) fn heard(&self) {
        *self.heard.lock() = Some(Instant::now());
    }

    /// Whether a read finished so recently.
    pub(super) fn heard_within(&self, time: Duration) -> bool {
        !time.is_zero() && self.heard.lock().is_some_and(|heard| heard.elapsed() < time)
    }

    /// The registrations of device memory that these reads read into memory of kind `into` and that were not touched,
    /// each once. Pure but for the memory of what was touched.
    pub(super) fn untouched(
        &self,
        published: &Ranges,
        into: MemoryKind,
        reads: &[ReadOp],
    ) -> Vec<Place> {
        let touched = self.touched.lock();
        let mut starts = BTreeSet::new();
        let device = |kind| matches!(kind, MemoryKind::Cuda(_));
        for op in reads.iter().filter(|op| op.into.kind == into && device(op.from.kind)) {
            published.cover(op.from.kind, op.from.address, op.from.len, |start| {
                starts.insert((op.from.kind, start));
            });
        }
        starts.retain(|start| !touched.contains(start));
        published.iter().filter(|&(kind, start, _)| starts.contains(&(kind, start))).collect()
    }

    /// These were read from.
    pub(super) fn touch(&self, places: &[Place]) {
        self.touched.lock().extend(places.iter().map(|&(kind, start, _)| (kind, start)));
    }

    /// The peer published anew: what lies at an address may be another allocation now.
    pub(super) fn forget(&self) {
        self.touched.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use refit_planner::{Dims, Transform};

    use super::*;
    use crate::{LocalRange, RemoteRange};

    const OURS: MemoryKind = MemoryKind::Cuda(0);
    const THEIRS: MemoryKind = MemoryKind::Cuda(3);

    fn published() -> Ranges {
        let mut ranges = Ranges::default();
        ranges.push(MemoryKind::Host, 0x1000, 0x1000).unwrap();
        // Two that touch, and one apart.
        ranges.push(THEIRS, 0x1000, 0x1000).unwrap();
        ranges.push(THEIRS, 0x2000, 0x800).unwrap();
        ranges.push(THEIRS, 0x8000, 0x10).unwrap();
        ranges
    }

    fn read(from: MemoryKind, address: u64, len: u64, into: MemoryKind) -> ReadOp {
        ReadOp {
            from: RemoteRange { address, len, kind: from },
            into: LocalRange { address: 0x10, len, kind: into },
            run: len,
            dims: Dims::none(),
            transform: Transform::Copy,
            bulk: false,
        }
    }

    #[test]
    fn each_registration_is_touched_once() {
        let link = Link::default();
        let reads = [
            read(THEIRS, 0x1010, 8, OURS),
            read(THEIRS, 0x1f00, 0x200, OURS),
            read(THEIRS, 0x1100, 8, OURS),
        ];
        let first = link.untouched(&published(), OURS, &reads);
        assert_eq!(first, [(THEIRS, 0x1000, 0x1000), (THEIRS, 0x2000, 0x800)]);
        // Until it is said that they were.
        assert_eq!(link.untouched(&published(), OURS, &reads), first);
        link.touch(&first);
        assert!(link.untouched(&published(), OURS, &reads).is_empty());
        let further = [read(THEIRS, 0x8000, 0x10, OURS), read(THEIRS, 0x1000, 1, OURS)];
        assert_eq!(link.untouched(&published(), OURS, &further), [(THEIRS, 0x8000, 0x10)]);
    }

    #[test]
    fn host_memory_on_either_side_needs_no_mapping() {
        let reads = [
            read(MemoryKind::Host, 0x1010, 8, OURS),
            read(THEIRS, 0x1010, 8, MemoryKind::Host),
            read(THEIRS, 0x1010, 8, MemoryKind::Cuda(1)),
        ];
        assert!(Link::default().untouched(&published(), OURS, &reads).is_empty());
    }

    #[test]
    fn a_peer_that_publishes_anew_is_touched_anew() {
        let link = Link::default();
        let reads = [read(THEIRS, 0x8000, 4, OURS)];
        link.touch(&link.untouched(&published(), OURS, &reads));
        link.forget();
        assert_eq!(link.untouched(&published(), OURS, &reads).len(), 1);
    }

    #[test]
    fn silence_counts_from_the_last_read() {
        let link = Link::default();
        let long = Duration::from_secs(3600);
        assert!(!link.heard_within(long));
        link.heard();
        assert!(link.heard_within(long));
        assert!(!link.heard_within(Duration::ZERO), "zero always asks");
        std::thread::sleep(Duration::from_millis(2));
        assert!(!link.heard_within(Duration::from_millis(1)));
    }
}
