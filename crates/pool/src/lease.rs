use std::any::Any;
use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use crate::pool::{Entry, Shared};
use crate::{BuildCost, Key, Memory, Quarantined, Region, Registrar};

/// Exclusive use of a pool entry. Dropping it returns the entry, as it is, for the next refit.
///
/// Not to be dropped while a transfer may still write the memory: whoever posted one keeps the lease until every
/// read has settled, or sets it apart by [`quarantine`](Self::quarantine).
#[must_use = "dropping a lease returns it"]
pub struct Lease<R: Registrar, P> {
    /// Taken by `drop`, and by nothing else.
    entry: ManuallyDrop<Box<Entry<R, P>>>,
    shared: Arc<Shared<R, P>>,
    key: Key,
    built: Option<BuildCost>,
}

impl<R: Registrar, P> Lease<R, P> {
    pub(crate) fn new(
        shared: Arc<Shared<R, P>>,
        key: Key,
        entry: Box<Entry<R, P>>,
        built: Option<BuildCost>,
    ) -> Self {
        Self { entry: ManuallyDrop::new(entry), shared, key, built }
    }

    /// Whether the entry was there already. If so, arenas hold what the lease before left in them.
    #[must_use]
    pub fn is_hit(&self) -> bool {
        self.built.is_none()
    }

    /// What building the entry cost; `None` when it was there already.
    #[must_use]
    pub fn built(&self) -> Option<BuildCost> {
        self.built
    }

    /// The entry's key.
    #[must_use]
    pub fn key(&self) -> Key {
        self.key
    }

    /// What `build` prepared.
    #[must_use]
    pub fn prepared(&self) -> &P {
        &self.entry.prepared
    }

    /// What `build` prepared. A memo about it goes.
    #[must_use]
    pub fn prepared_mut(&mut self) -> &mut P {
        self.parts_mut().0
    }

    /// What the holder before noted about the entry, if it was a `M`, and has not let anybody change it since.
    #[must_use]
    pub fn take_memo<M: Any + Send>(&mut self) -> Option<Box<M>> {
        self.entry.memo.take()?.downcast().ok()
    }

    /// Notes something about the entry, for the next holder: what it took to check it, say.
    pub fn set_memo<M: Any + Send>(&mut self, memo: Box<M>) {
        self.entry.memo = Some(memo);
    }

    /// The arenas, one for each call of [`Build::arena`](crate::Build::arena), in that order.
    #[must_use]
    pub fn arenas(&self) -> &[Memory] {
        &self.entry.holdings.arenas
    }

    /// The arenas, to be written. A memo about the entry goes.
    #[must_use]
    pub fn arenas_mut(&mut self) -> &mut [Memory] {
        self.parts_mut().1
    }

    /// The prepared work and the arenas at once. A memo about them goes.
    #[must_use]
    pub fn parts_mut(&mut self) -> (&mut P, &mut [Memory]) {
        let Entry { prepared, holdings, memo } = &mut **self.entry;
        *memo = None;
        (prepared, &mut holdings.arenas)
    }

    /// What is registered, piece by piece, disjoint and sorted by kind and address. A read must not cross from one
    /// piece to the next.
    #[must_use]
    pub fn registered(&self) -> &[Region] {
        self.entry.holdings.registrations.regions()
    }

    /// Sets the entry apart because a transfer may still write it and nobody wants to wait for that here.
    ///
    /// The bytes stay in the budget and are counted in [`quarantined_bytes`](crate::PoolStats::quarantined_bytes) until
    /// the entry is [released](Quarantined::release). The key is free again: its next lease builds a new entry.
    pub fn quarantine(self) -> Quarantined<R, P> {
        // Not to be dropped: that would return the entry.
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `entry` is taken here only, and `this` is never dropped.
        let entry = unsafe { ManuallyDrop::take(&mut this.entry) };
        // SAFETY: read once, and `this` is never dropped. The other fields own nothing.
        let shared = unsafe { std::ptr::read(&this.shared) };
        shared.quarantine(this.key, entry.bytes());
        Quarantined::new(shared, this.key, entry)
    }
}

impl<R: Registrar, P> Drop for Lease<R, P> {
    fn drop(&mut self) {
        // SAFETY: `entry` is taken here only, `drop` runs once, and nothing uses `entry` after it.
        let entry = unsafe { ManuallyDrop::take(&mut self.entry) };
        self.shared.give_back(self.key, entry);
    }
}

impl<R: Registrar, P: fmt::Debug> fmt::Debug for Lease<R, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("key", &self.key)
            .field("hit", &self.is_hit())
            .field("prepared", self.prepared())
            .field("arenas", &self.arenas())
            .finish_non_exhaustive()
    }
}
