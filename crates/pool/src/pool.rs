use std::any::Any;
use std::collections::HashMap;
use std::collections::hash_map;
use std::fmt;
use std::mem;
use std::sync::Arc;

use crate::budget::{Ledger, Reservation};
use crate::build::{Build, BuildCost, Holdings, Reserve};
use crate::registrar::Core;
use crate::sync::Mutex;
use crate::{Allocator, Key, Lease, LeaseError, PoolError, PoolStats, Registrar};

/// How a pool is bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolOptions {
    /// Arena bytes that the pool may hold at once, quarantined ones included. Unlimited by default.
    pub budget_bytes: u64,
    /// Arena bytes that may be quarantined at once: while there are more, the pool gives no lease. `None`, the default,
    /// means a quarter of the budget.
    pub quarantine_bytes: Option<u64>,
    /// The longest registration the transport takes, in bytes; longer regions are registered in pieces, cut at
    /// multiples of 4 KiB. Unlimited by default, as `Some(0)` is.
    pub max_registration: Option<u64>,
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self { budget_bytes: u64::MAX, quarantine_bytes: None, max_registration: None }
    }
}

/// Entries that outlive the refits that lease them: arenas, registrations, and the caller's prepared work `P`.
///
/// Clones share one pool. When the last one goes, idle entries go with it; leases stay valid, and their entries go
/// when they are returned.
///
/// Prepared work, the allocator and the registrar must not call back into the pool from a drop or from their own
/// methods. `build` may lease other keys.
pub struct Pool<R: Registrar, P> {
    handle: Arc<Handle<R, P>>,
}

/// The share of the pool that its clones hold and leases do not.
struct Handle<R: Registrar, P> {
    shared: Arc<Shared<R, P>>,
}

pub(crate) struct Shared<R: Registrar, P> {
    entries: Mutex<Entries<R, P>>,
    core: Arc<Core<R>>,
    allocator: Box<dyn Allocator>,
    budget: u64,
}

/// Everything a key stands for. Dropped in the order of the fields: prepared work refers to registrations, those
/// refer to memory, and `Holdings` goes on in that order.
#[derive(Debug)]
pub(crate) struct Entry<R: Registrar, P> {
    pub(crate) prepared: P,
    pub(crate) memo: Option<Box<dyn Any + Send>>,
    pub(crate) holdings: Holdings<R>,
}

struct Entries<R: Registrar, P> {
    slots: HashMap<Key, Slot<R, P>>,
    /// Counts returns: the order that eviction goes by.
    clock: u64,
    /// No `Pool` is left: returned entries go.
    closed: bool,
    hits: u64,
    misses: u64,
    evictions: u64,
    quarantines: u64,
    releases: u64,
}

/// What a key stands for. A quarantined entry has no slot: its key is free.
///
/// ```text
/// (free) ──lease──▶ Building ──▶ Leased ──drop──▶ Idle ──lease──▶ Leased
///   ▲                  │           │                ▲  └──evict──▶ (free)
///   └──── failed ──────┘      quarantine            │
///                                  ▼                │ the key is free still
///                             Quarantined ──release─┤
///                                  │                └ otherwise the entry is undone
///                                  └──drop──▶ leaked for good
/// ```
enum Slot<R: Registrar, P> {
    Building,
    Leased { bytes: u64 },
    Idle { entry: Box<Entry<R, P>>, returned: u64 },
}

impl<R: Registrar, P> Slot<R, P> {
    fn idle_bytes(&self) -> u64 {
        match self {
            Self::Idle { entry, .. } => entry.bytes(),
            Self::Building | Self::Leased { .. } => 0,
        }
    }
}

impl<R: Registrar, P> Entry<R, P> {
    pub(crate) fn bytes(&self) -> u64 {
        self.holdings.reservation.bytes()
    }
}

impl<R: Registrar, P: Send> Pool<R, P> {
    /// An empty pool.
    #[must_use]
    pub fn new(allocator: impl Allocator + 'static, registrar: R, options: PoolOptions) -> Self {
        let PoolOptions { budget_bytes, quarantine_bytes, max_registration } = options;
        let ledger = Arc::new(Ledger::new(quarantine_bytes.unwrap_or(budget_bytes / 4)));
        let core = Core { registrar, max_registration, ledger };
        let shared = Shared {
            entries: Mutex::new(Entries::default()),
            core: Arc::new(core),
            allocator: Box::new(allocator),
            budget: budget_bytes,
        };
        Self { handle: Arc::new(Handle { shared: Arc::new(shared) }) }
    }

    /// Leases the entry under `key`, exclusively, and builds it first if there is none.
    ///
    /// `build` runs without a lock: other keys stay leasable, this one is refused. If it fails or panics, what it
    /// had built is undone and the key is free again.
    ///
    /// # Errors
    /// [`LeaseError::Build`] with what `build` said, or [`LeaseError::Pool`] with [`PoolError::Leased`],
    /// [`PoolError::Deregister`], or [`PoolError::Quarantine`] while more is quarantined than may be.
    pub fn lease<E>(
        &self,
        key: Key,
        build: impl FnOnce(&mut Build<'_, R>) -> Result<P, E>,
    ) -> Result<Lease<R, P>, LeaseError<E>> {
        let shared = &self.handle.shared;
        shared.core.ledger.check()?;
        let (entry, built) = match shared.take(key)? {
            Some(entry) => (entry, None),
            None => {
                let (entry, cost) = shared.build(key, build).map_err(LeaseError::Build)?;
                (entry, Some(cost))
            }
        };
        let bytes = entry.bytes();
        let lease = Lease::new(Arc::clone(shared), key, entry, built);
        tracing::debug!(%key, hit = lease.is_hit(), bytes, "lease");
        Ok(lease)
    }

    /// Counters and gauges, all of one moment.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        let shared = &self.handle.shared;
        let entries = shared.entries.lock();
        let books = shared.core.ledger.books();
        let leased = |slot: &Slot<R, P>| match slot {
            Slot::Leased { bytes } => *bytes,
            Slot::Building | Slot::Idle { .. } => 0,
        };
        PoolStats {
            allocations: books.allocations,
            registrations: books.registrations,
            deregistrations: books.deregistrations,
            failed_deregistrations: books.failed_deregistrations,
            hits: entries.hits,
            misses: entries.misses,
            evictions: entries.evictions,
            quarantines: entries.quarantines,
            releases: entries.releases,
            bytes: books.bytes,
            leased_bytes: entries.slots.values().map(leased).sum(),
            quarantined_bytes: books.quarantined,
            quarantined_entries: books.quarantined_entries,
            entries: entries.slots.len() as u64,
        }
    }

    /// Drops every idle entry.
    pub fn clear(&self) {
        self.handle.shared.clear();
    }

    /// Drops the entry under `key` if it is idle, and says whether it was.
    pub fn evict(&self, key: Key) -> bool {
        let shared = &self.handle.shared;
        let mut entries = shared.entries.lock();
        let entry = match entries.slots.entry(key) {
            hash_map::Entry::Occupied(slot) if matches!(slot.get(), Slot::Idle { .. }) => {
                slot.remove()
            }
            _ => return false,
        };
        let entry = shared.leaving(&mut entries, entry);
        drop(entries);
        drop(entry);
        true
    }
}

impl<R: Registrar, P> Shared<R, P> {
    /// Takes an idle entry out, or makes room for one to be built.
    fn take(&self, key: Key) -> Result<Option<Box<Entry<R, P>>>, PoolError> {
        let mut entries = self.entries.lock();
        let Entries { slots, hits, misses, .. } = &mut *entries;
        match slots.entry(key) {
            hash_map::Entry::Vacant(slot) => {
                slot.insert(Slot::Building);
                *misses += 1;
                Ok(None)
            }
            hash_map::Entry::Occupied(mut slot) => {
                let slot = slot.get_mut();
                let bytes = slot.idle_bytes();
                match mem::replace(slot, Slot::Leased { bytes }) {
                    Slot::Idle { entry, .. } => {
                        *hits += 1;
                        Ok(Some(entry))
                    }
                    taken => {
                        *slot = taken;
                        Err(PoolError::Leased { key })
                    }
                }
            }
        }
    }

    fn build<E>(
        &self,
        key: Key,
        build: impl FnOnce(&mut Build<'_, R>) -> Result<P, E>,
    ) -> Result<(Box<Entry<R, P>>, BuildCost), E> {
        // Declared first, so dropped last: on failure the key is free only when everything is undone.
        let placeholder = Placeholder { shared: self, key };
        let mut holdings = Build::new(&self.core, &*self.allocator, self);
        let prepared = build(&mut holdings)?;
        let (holdings, cost) = holdings.finish();
        let entry = Box::new(Entry { prepared, memo: None, holdings });
        // The entry exists, nothing can fail any more.
        mem::forget(placeholder);
        if let Some(slot) = self.entries.lock().slots.get_mut(&key) {
            *slot = Slot::Leased { bytes: entry.bytes() };
        }
        Ok((entry, cost))
    }

    /// Takes a leased entry back.
    pub(crate) fn give_back(&self, key: Key, entry: Box<Entry<R, P>>) {
        let mut entries = self.entries.lock();
        if entries.closed {
            entries.slots.remove(&key);
            drop(entries);
            drop(entry);
            return;
        }
        entries.clock += 1;
        let returned = entries.clock;
        // The key is always there: it is `Leased`, and only this lease changes that.
        if let Some(slot) = entries.slots.get_mut(&key) {
            *slot = Slot::Idle { entry, returned };
        }
    }

    /// Takes a leased entry that is quarantined from here on off the map.
    pub(crate) fn quarantine(&self, key: Key, bytes: u64) {
        let mut entries = self.entries.lock();
        entries.slots.remove(&key);
        entries.quarantines += 1;
        self.core.ledger.quarantine(bytes);
        drop(entries);
        tracing::warn!(%key, bytes, "memory quarantined: a transfer may still write it");
    }

    /// Takes a quarantined entry back that nothing writes any more.
    pub(crate) fn release(&self, key: Key, entry: Box<Entry<R, P>>) {
        let mut entries = self.entries.lock();
        entries.releases += 1;
        entries.clock += 1;
        let (returned, bytes) = (entries.clock, entry.bytes());
        self.core.ledger.release(bytes);
        let closed = entries.closed;
        let undone = match entries.slots.entry(key) {
            hash_map::Entry::Vacant(slot) if !closed => {
                slot.insert(Slot::Idle { entry, returned });
                None
            }
            _ => Some(entry),
        };
        drop(entries);
        tracing::info!(%key, bytes, idle = undone.is_none(), "memory released from quarantine");
        drop(undone);
    }

    fn clear(&self) {
        let mut entries = self.entries.lock();
        let idle = entries
            .slots
            .extract_if(|_, slot| matches!(slot, Slot::Idle { .. }))
            .collect::<Vec<_>>();
        let idle =
            idle.into_iter().map(|(_, slot)| self.leaving(&mut entries, slot)).collect::<Vec<_>>();
        drop(entries);
        drop(idle);
    }

    /// Counts an entry that was just taken out of the map as leaving. To be dropped without the lock.
    fn leaving(&self, entries: &mut Entries<R, P>, mut slot: Slot<R, P>) -> Slot<R, P> {
        if let Slot::Idle { entry, .. } = &mut slot {
            entries.evictions += 1;
            entry.holdings.reservation.leave(&mut self.core.ledger.books());
        }
        slot
    }
}

impl<R: Registrar, P> Reserve for Shared<R, P> {
    fn reserve(&self, needed: u64) -> Result<Reservation, PoolError> {
        let Self { budget, core, .. } = self;
        loop {
            let mut entries = self.entries.lock();
            let mut books = core.ledger.books();
            if books.bytes.checked_add(needed).is_some_and(|bytes| bytes <= *budget) {
                return Ok(Reservation::new(Arc::clone(&core.ledger), &mut books, needed));
            }
            // Look before evicting: entries that would not make enough room stay.
            let idle = entries.slots.values().map(Slot::idle_bytes).sum::<u64>();
            let fixed = books.bytes - idle - books.leaving;
            if needed > budget - fixed {
                let quarantined = books.quarantined;
                return Err(PoolError::Budget {
                    needed,
                    budget: *budget,
                    leased: fixed - quarantined,
                    quarantined,
                });
            }
            if let Some(key) = entries.oldest() {
                drop(books);
                let evicted =
                    entries.slots.remove(&key).map(|slot| self.leaving(&mut entries, slot));
                drop(entries);
                drop(evicted);
            } else {
                // Nothing is idle, so what is missing is being freed by another thread.
                drop(entries);
                core.ledger.wait(&mut books);
            }
        }
    }
}

impl<R: Registrar, P> Entries<R, P> {
    /// The idle entry with memory that was returned first.
    fn oldest(&self) -> Option<Key> {
        let idle = self.slots.iter().filter_map(|(key, slot)| match slot {
            Slot::Idle { entry, returned } if entry.bytes() > 0 => Some((*returned, *key)),
            _ => None,
        });
        idle.min().map(|(_, key)| key)
    }
}

impl<R: Registrar, P> Default for Entries<R, P> {
    fn default() -> Self {
        Self {
            slots: HashMap::new(),
            clock: 0,
            closed: false,
            hits: 0,
            misses: 0,
            evictions: 0,
            quarantines: 0,
            releases: 0,
        }
    }
}

/// Frees a key whose build failed.
struct Placeholder<'a, R: Registrar, P> {
    shared: &'a Shared<R, P>,
    key: Key,
}

impl<R: Registrar, P> Drop for Placeholder<'_, R, P> {
    fn drop(&mut self) {
        self.shared.entries.lock().slots.remove(&self.key);
    }
}

impl<R: Registrar, P> Drop for Handle<R, P> {
    fn drop(&mut self) {
        self.shared.entries.lock().closed = true;
        self.shared.clear();
    }
}

impl<R: Registrar, P> Clone for Pool<R, P> {
    fn clone(&self) -> Self {
        Self { handle: Arc::clone(&self.handle) }
    }
}

impl<R: Registrar, P> fmt::Debug for Pool<R, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.handle.shared.fmt(f)
    }
}

impl<R: Registrar, P> fmt::Debug for Shared<R, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("allocator", &self.allocator)
            .field("registrar", &self.core.registrar)
            .field("budget", &self.budget)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, loom))]
mod models;
