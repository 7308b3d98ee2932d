use std::error::Error;
use std::fmt::Debug;
use std::mem;
use std::sync::Arc;

use crate::budget::Ledger;
use crate::{PoolError, Region};

/// What makes memory readable and writable by a transport: its registration half.
///
/// Called without any lock of the pool held, from whichever thread leases, evicts or returns. A registrar must not
/// call back into the pool.
pub trait Registrar: Debug + Send + Sync {
    /// Keeps memory registered until it is given to [`deregister`](Self::deregister).
    type Registration: Send + Debug;
    /// Why memory cannot be registered, or the registration not be undone.
    type Error: Error + Send + Sync + 'static;

    /// Registers a region. The pool never registers a byte twice within one entry; entries that adopt the same memory
    /// each register it, and one of them going must not end it for the others.
    ///
    /// # Errors
    /// When the transport refuses; nothing is registered then.
    fn register(&self, region: &Region) -> Result<Self::Registration, Self::Error>;

    /// Undoes a registration. Its memory is still allocated, and may be freed as soon as this returns.
    ///
    /// # Errors
    /// When the transport complains; the registration counts as gone all the same.
    fn deregister(&self, registration: Self::Registration) -> Result<(), Self::Error>;
}

impl<R: Registrar> Registrar for Arc<R> {
    type Registration = R::Registration;
    type Error = R::Error;

    fn register(&self, region: &Region) -> Result<Self::Registration, Self::Error> {
        (**self).register(region)
    }

    fn deregister(&self, registration: Self::Registration) -> Result<(), Self::Error> {
        (**self).deregister(registration)
    }
}

/// What entries need to undo themselves, whoever drops them.
#[derive(Debug)]
pub(crate) struct Core<R> {
    pub(crate) registrar: R,
    pub(crate) max_registration: Option<u64>,
    pub(crate) ledger: Arc<Ledger>,
}

/// Registrations, and the regions they cover. Dropping them deregisters.
#[derive(Debug)]
pub(crate) struct Registrations<R: Registrar> {
    core: Arc<Core<R>>,
    handles: Vec<R::Registration>,
    /// Disjoint, sorted by kind and address.
    regions: Vec<Region>,
}

impl<R: Registrar> Registrations<R> {
    pub(crate) fn new(core: Arc<Core<R>>) -> Self {
        Self { core, handles: Vec::new(), regions: Vec::new() }
    }

    pub(crate) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Registers what is not registered yet, or nothing at all.
    pub(crate) fn add(
        &mut self,
        regions: impl IntoIterator<Item = Region>,
    ) -> Result<(), PoolError> {
        let mut added = Self::new(Arc::clone(&self.core));
        for region in unregistered(merged(regions), &self.regions) {
            for piece in pieces(&region, self.core.max_registration) {
                let handle =
                    self.core.registrar.register(&piece).map_err(|source| PoolError::Register {
                        bytes: piece.len(),
                        kind: piece.kind(),
                        source: Box::new(source),
                    })?;
                added.handles.push(handle);
                added.regions.push(piece);
                self.core.ledger.registered();
            }
        }
        self.handles.append(&mut added.handles);
        self.regions.append(&mut added.regions);
        self.regions.sort_unstable_by_key(place);
        Ok(())
    }
}

impl<R: Registrar> Drop for Registrations<R> {
    fn drop(&mut self) {
        for handle in mem::take(&mut self.handles).into_iter().rev() {
            let result = self.core.registrar.deregister(handle);
            if let Err(error) = &result {
                tracing::warn!(%error, "a registration could not be undone");
            }
            self.core.ledger.deregistered(result);
        }
    }
}

fn place(region: &Region) -> (crate::MemoryKind, u64) {
    (region.kind(), region.address())
}

/// The regions in order, those that share bytes joined. Regions that merely touch stay apart: they may be two
/// allocations, and a NIC refuses a registration across two allocations of device memory.
pub(crate) fn merged(regions: impl IntoIterator<Item = Region>) -> Vec<Region> {
    let mut regions = regions.into_iter().filter(|region| !region.is_empty()).collect::<Vec<_>>();
    regions.sort_unstable_by_key(place);
    let mut merged = Vec::new();
    let mut joined = Vec::<Region>::new();
    let mut end = 0;
    for region in regions {
        let apart = joined
            .last()
            .is_some_and(|last| last.kind() != region.kind() || end <= region.address());
        if apart {
            merged.extend(Region::join(mem::take(&mut joined)));
            end = 0;
        }
        end = end.max(region.end());
        joined.push(region);
    }
    merged.extend(Region::join(joined));
    merged
}

/// What `wanted` has and `registered` lacks. Both are sorted and disjoint.
///
/// A byte is never registered twice: transports answer for nested registrations by the inner one.
fn unregistered(wanted: Vec<Region>, registered: &[Region]) -> Vec<Region> {
    let mut missing = Vec::with_capacity(wanted.len());
    for region in wanted {
        let mut at = region.address();
        for other in registered.iter().filter(|other| other.kind() == region.kind()) {
            if other.end() <= at || other.address() >= region.end() {
                continue;
            }
            if at < other.address() {
                missing.push(region.part(at, other.address()));
            }
            at = other.end().min(region.end());
        }
        if at < region.end() {
            missing.push(region.part(at, region.end()));
        }
    }
    missing
}

/// The region in pieces of at most `max` bytes, cut at page boundaries of the region where pages fit.
fn pieces(region: &Region, max: Option<u64>) -> impl Iterator<Item = Region> {
    const PAGE: u64 = 4096;
    let step = match max {
        None | Some(0) => u64::MAX,
        Some(max) if max < PAGE => max,
        Some(max) => max - max % PAGE,
    };
    let (region, mut at) = (region.clone(), region.address());
    std::iter::from_fn(move || {
        let start = at;
        at = start.saturating_add(step).min(region.end());
        (start < at).then(|| region.part(start, at))
    })
}

#[cfg(test)]
mod tests;
