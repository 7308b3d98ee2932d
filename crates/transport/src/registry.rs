//! Which memory is registered: by this agent, and by a peer as far as it published.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use refit_pool::{MemoryKind, Region};

use crate::{Cause, ReadOp, Side, TransportError};

/// Where a registration starts.
type Start = (MemoryKind, u64);

/// The memory registered by one agent. `B` is what the backend holds for one registration.
///
/// A region that lies inside a registration shares it: two pool entries adopt the same live parameters, and backends
/// handle nested registrations badly. The entry goes when the last [`Registered`] *and* the last [`Holds`] that uses
/// it is gone, so that prepared reads never outlive the registration they point into.
pub(crate) struct Registry<B> {
    entries: Mutex<BTreeMap<Start, Entry<B>>>,
}

struct Entry<B> {
    end: u64,
    /// Registrations handed out; without any, the memory counts as not registered.
    handles: usize,
    /// Prepared batches that point into it.
    holds: usize,
    /// Dropped before the memory, by declaration order.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "held, never read"))]
    backend: B,
    region: Region,
}

/// A share in a registration.
pub(crate) struct Registered<B> {
    registry: Arc<Registry<B>>,
    start: Start,
    len: u64,
}

/// The registrations that a prepared batch points into.
pub(crate) struct Holds<B> {
    registry: Arc<Registry<B>>,
    starts: Vec<Start>,
}

impl<B> Registry<B> {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { entries: Mutex::new(BTreeMap::new()) })
    }

    /// Registers a region, by `make` unless it lies inside a registration.
    pub(crate) fn register(
        self: &Arc<Self>,
        region: &Region,
        make: impl FnOnce(&Region) -> Result<B, Cause>,
    ) -> Result<Registered<B>, Cause> {
        if region.is_empty() {
            return Err(Cause::Empty);
        }
        let (kind, address) = (region.kind(), region.address());
        let end = address.checked_add(region.len()).ok_or(Cause::Wraps)?;
        let mut entries = self.entries.lock();
        let before =
            entries.range_mut(..=(kind, address)).next_back().filter(|(start, _)| start.0 == kind);
        let start = match before {
            Some((&start, entry)) if end <= entry.end => {
                entry.handles = entry.handles.saturating_add(1);
                start
            }
            Some((_, entry)) if address < entry.end => return Err(Cause::RegisteredInPart),
            _ => {
                let start = (kind, address);
                if entries.range(start..(kind, end)).next().is_some() {
                    return Err(Cause::RegisteredInPart);
                }
                let backend = make(region)?;
                entries.insert(
                    start,
                    Entry { end, handles: 1, holds: 0, backend, region: region.clone() },
                );
                start
            }
        };
        Ok(Registered { registry: Arc::clone(self), start, len: region.len() })
    }

    /// The registered ranges.
    pub(crate) fn ranges(&self) -> Ranges {
        let entries = self.entries.lock();
        let live = entries.iter().filter(|(_, entry)| entry.handles > 0);
        Ranges(live.map(|(&start, entry)| (start, entry.end)).collect())
    }

    /// The registered ranges, and what the backend holds for each of them, of one moment.
    #[cfg(feature = "cuda")]
    pub(crate) fn published(&self, mut visit: impl FnMut(&B)) -> Ranges {
        let entries = self.entries.lock();
        let live = entries.iter().filter(|(_, entry)| entry.handles > 0);
        Ranges(live.inspect(|(_, entry)| visit(&entry.backend)).map(|(&s, e)| (s, e.end)).collect())
    }

    /// Keeps the registrations that these reads from a peer write into.
    pub(crate) fn hold_targets(
        self: &Arc<Self>,
        peer: &str,
        reads: &[ReadOp],
    ) -> Result<Holds<B>, TransportError> {
        self.hold(reads.iter().map(|op| (op.into.kind, op.into.address, op.into.len))).map_err(
            |read| TransportError::not_registered(peer, Side::Local, read, reads[read].into.len),
        )
    }

    /// Refuses to undo a registration that another agent made.
    pub(crate) fn check_own(
        self: &Arc<Self>,
        agent: &str,
        registered: &Registered<B>,
    ) -> Result<(), TransportError> {
        if Arc::ptr_eq(&registered.registry, self) {
            return Ok(());
        }
        let (kind, len) = (registered.start.0, registered.len);
        Err(TransportError::register(agent, kind, len, Cause::Foreign))
    }

    /// Keeps the registrations that cover these ranges; the error is the index of one that is not covered.
    pub(crate) fn hold(
        self: &Arc<Self>,
        ranges: impl Iterator<Item = (MemoryKind, u64, u64)>,
    ) -> Result<Holds<B>, usize> {
        let mut entries = self.entries.lock();
        let mut starts: Vec<Start> = Vec::new();
        for (index, (kind, address, len)) in ranges.enumerate() {
            // Reads come sorted as a rule: most lie in the registration of the one before.
            if let Some(last) = starts.last()
                && last.0 == kind
                && last.1 <= address
                && let Some(entry) = entries.get(last)
                && address.checked_add(len).is_some_and(|end| end <= entry.end)
            {
                continue;
            }
            let live = |entry: &Entry<B>| (entry.handles > 0).then_some(entry.end);
            if !cover(&entries, live, kind, address, len, |start| starts.push(start)) {
                return Err(index);
            }
        }
        starts.sort_unstable();
        starts.dedup();
        for start in &starts {
            if let Some(entry) = entries.get_mut(start) {
                entry.holds = entry.holds.saturating_add(1);
            }
        }
        Ok(Holds { registry: Arc::clone(self), starts })
    }

    /// A share in the lifetime of the memory around a registered range, one per registration it touches.
    pub(crate) fn share(&self, kind: MemoryKind, address: u64, len: u64) -> Option<Vec<Region>> {
        let entries = self.entries.lock();
        let mut regions = Vec::with_capacity(1);
        let live = |entry: &Entry<B>| (entry.handles > 0).then_some(entry.end);
        cover(&entries, live, kind, address, len, |start| {
            regions.extend(entries.get(&start).map(|e| e.region.clone()))
        })
        .then_some(regions)
    }

    fn release(&self, start: Start, count: impl FnOnce(&mut Entry<B>) -> &mut usize) {
        let mut entries = self.entries.lock();
        let Some(entry) = entries.get_mut(&start) else { return };
        let count = count(entry);
        *count = count.saturating_sub(1);
        if entry.handles == 0 && entry.holds == 0 {
            // Under the lock: nobody may register the range again before the backend has forgotten it.
            drop(entries.remove(&start));
        }
    }
}

impl<B> Drop for Registered<B> {
    fn drop(&mut self) {
        self.registry.release(self.start, |entry| &mut entry.handles);
    }
}

impl<B> Drop for Holds<B> {
    fn drop(&mut self) {
        for &start in &self.starts {
            self.registry.release(start, |entry| &mut entry.holds);
        }
    }
}

impl<B> fmt::Debug for Registry<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("entries", &self.entries.lock().len()).finish()
    }
}

impl<B> fmt::Debug for Registered<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registered")
            .field("kind", &self.start.0)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl<B> fmt::Debug for Holds<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holds").field("registrations", &self.starts.len()).finish_non_exhaustive()
    }
}

/// Disjoint ranges, as published.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Ranges(BTreeMap<Start, u64>);

impl Ranges {
    /// Adds a range that lies behind all earlier ones of its kind.
    pub(crate) fn push(&mut self, kind: MemoryKind, address: u64, len: u64) -> Option<()> {
        let end = address.checked_add(len).filter(|_| len > 0)?;
        if let Some((start, &last)) = self.0.last_key_value()
            && (start.0 > kind || (start.0 == kind && last > address))
        {
            return None;
        }
        self.0.insert((kind, address), end);
        Some(())
    }

    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = (MemoryKind, u64, u64)> {
        self.0.iter().map(|(&(kind, start), end)| (kind, start, end.saturating_sub(start)))
    }

    /// Whether the range is covered. `border` is told where each range that covers it starts.
    pub(crate) fn cover(
        &self,
        kind: MemoryKind,
        address: u64,
        len: u64,
        mut border: impl FnMut(u64),
    ) -> bool {
        cover(&self.0, |&end| Some(end), kind, address, len, |start| border(start.1))
    }
}

impl fmt::Debug for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Addresses stay out of logs.
        f.debug_struct("Ranges").field("ranges", &self.0.len()).finish()
    }
}

/// Whether `len` bytes from `address` on lie in entries that touch one another, each told to `visit`.
fn cover<V>(
    map: &BTreeMap<Start, V>,
    end_of: impl Fn(&V) -> Option<u64>,
    kind: MemoryKind,
    address: u64,
    len: u64,
    mut visit: impl FnMut(Start),
) -> bool {
    let Some(end) = address.checked_add(len).filter(|_| len > 0) else { return false };
    let Some((&start, value)) =
        map.range(..=(kind, address)).next_back().filter(|(start, _)| start.0 == kind)
    else {
        return false;
    };
    let Some(mut covered) = end_of(value).filter(|&covered| covered > address) else {
        return false;
    };
    visit(start);
    while covered < end {
        let next = (kind, covered);
        let Some(further) = map.get(&next).and_then(&end_of) else { return false };
        visit(next);
        covered = further;
    }
    true
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;

    use refit_pool::Memory;

    use super::*;

    const HOST: MemoryKind = MemoryKind::Host;

    fn ranges(list: &[(u64, u64)]) -> Ranges {
        let mut ranges = Ranges::default();
        for &(address, len) in list {
            ranges.push(HOST, address, len).unwrap();
        }
        ranges
    }

    #[test]
    fn ranges_that_touch_cover_together_and_nothing_wraps() {
        let ranges = ranges(&[(100, 50), (150, 50), (300, 10)]);
        let mut borders = Vec::new();
        assert!(ranges.cover(HOST, 120, 80, |start| borders.push(start)));
        assert_eq!(borders, [100, 150]);
        for (address, len) in
            [(99, 2), (120, 81), (200, 1), (300, 11), (120, 0), (120, u64::MAX), (u64::MAX, 2)]
        {
            assert!(!ranges.cover(HOST, address, len, |_| {}), "{address} + {len}");
        }
        assert!(!ranges.cover(MemoryKind::Cuda(0), 120, 8, |_| {}));
    }

    #[test]
    fn ranges_out_of_order_or_overlapping_are_refused() {
        let mut ranges = ranges(&[(100, 50)]);
        assert!(ranges.push(HOST, 149, 5).is_none());
        assert!(ranges.push(HOST, 10, 5).is_none());
        assert!(ranges.push(HOST, u64::MAX, 5).is_none());
        assert!(ranges.push(HOST, 200, 0).is_none());
        assert!(ranges.push(MemoryKind::Cuda(1), 10, 5).is_some());
    }

    /// Says when a registration and its memory go.
    struct Goes(&'static str, Arc<Mutex<Vec<&'static str>>>);

    impl Drop for Goes {
        fn drop(&mut self) {
            self.1.lock().push(self.0);
        }
    }

    #[test]
    fn registrations_go_after_their_last_user_and_before_their_memory() {
        let log = Arc::new(Mutex::new(Vec::new()));
        let registry = Registry::new();
        let bytes: &'static mut [u8] = Box::leak(Box::new([0; 64]));
        let owner = Arc::new(Goes("memory", Arc::clone(&log)));
        // SAFETY: the bytes are leaked, and used through this alone.
        let memory = unsafe { Memory::adopt(NonNull::from(bytes).cast(), 64, HOST, owner) };
        let make = |_: &Region| Ok(Goes("registration", Arc::clone(&log)));
        let handle = registry.register(memory.allocation(), make).unwrap();
        let shared =
            registry.register(memory.allocation(), |_| unreachable!("it is registered")).unwrap();
        let address = memory.address();
        let hold = || registry.hold([(HOST, address, 8), (HOST, address + 56, 8)].into_iter());
        let batch = hold().unwrap();
        drop((memory, handle));
        assert!(registry.ranges().cover(HOST, address, 64, |_| {}));
        drop(shared);
        // Nothing new may use it, but the batch does.
        assert_eq!(registry.ranges().iter().len(), 0);
        assert_eq!(hold().unwrap_err(), 0);
        assert!(registry.share(HOST, address, 8).is_none());
        assert!(log.lock().is_empty());
        drop(batch);
        assert_eq!(*log.lock(), ["registration", "memory"]);
    }

    #[test]
    fn regions_across_a_border_are_refused_and_the_registration_stays() {
        let registry = Registry::new();
        let bytes: &'static mut [u8] = Box::leak(Box::new([0; 64]));
        let region = |start: usize, len: usize| {
            // SAFETY: nothing is read or written, here or by the registry.
            unsafe { Memory::adopt(NonNull::from(&bytes[start]), len, HOST, Arc::new(())) }
        };
        let _middle = registry.register(region(16, 32).allocation(), |_| Ok(())).unwrap();
        for (start, len) in [(0, 17), (0, 64), (47, 2), (16, 33)] {
            let refused =
                registry.register(region(start, len).allocation(), |_| Ok(())).unwrap_err();
            assert_eq!(refused, Cause::RegisteredInPart, "{start} + {len}");
        }
        let empty = registry.register(region(0, 0).allocation(), |_| Ok(())).unwrap_err();
        assert_eq!(empty, Cause::Empty);
        for (start, len) in [(0, 16), (48, 16), (20, 4)] {
            registry.register(region(start, len).allocation(), |_| Ok(())).unwrap();
        }
    }
}
