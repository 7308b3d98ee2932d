use std::fmt;
use std::mem;
use std::sync::Arc;

use crate::pool::{Entry, Shared};
use crate::{Key, Memory, Registrar};

/// An entry that a transfer may still write and that nobody uses. Made by [`Lease::quarantine`](crate::Lease::quarantine).
///
/// Two ways lead out of it, and no third: [`release`](Self::release), once every transfer into it has reached a
/// terminal status, and dropping it, which never frees it. It gives no access to the arenas' bytes.
#[must_use = "dropping a quarantined entry leaks it for good; release it when its transfers have ended"]
pub struct Quarantined<R: Registrar, P> {
    /// `None` once it was released.
    entry: Option<Box<Entry<R, P>>>,
    shared: Arc<Shared<R, P>>,
    key: Key,
}

impl<R: Registrar, P> Quarantined<R, P> {
    pub(crate) fn new(shared: Arc<Shared<R, P>>, key: Key, entry: Box<Entry<R, P>>) -> Self {
        Self { entry: Some(entry), shared, key }
    }

    /// The key that it was leased under.
    #[must_use]
    pub fn key(&self) -> Key {
        self.key
    }

    /// Arena bytes, as they count against the budget and the limit of the quarantine.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.entry().bytes()
    }

    /// What was prepared: what transfers are watched by.
    #[must_use]
    pub fn prepared(&self) -> &P {
        &self.entry().prepared
    }

    /// What was prepared, to move transfers on. A memo about it goes.
    #[must_use]
    pub fn prepared_mut(&mut self) -> &mut P {
        match &mut self.entry {
            Some(entry) => {
                entry.memo = None;
                &mut entry.prepared
            }
            None => unreachable!("only `release` takes it, with `self`"),
        }
    }

    /// The addresses of the arenas, without access to their bytes.
    pub fn arenas(&self) -> impl Iterator<Item = crate::Region> + '_ {
        self.entry().holdings.arenas.iter().map(Memory::region)
    }

    /// Gives the entry back to the pool: it is idle under its key again, or undone if another has been built under
    /// that key meanwhile, or the pool is gone.
    ///
    /// Only after every transfer into its memory has reached a terminal status. "Failed" is one; a deadline that
    /// passed is none.
    pub fn release(mut self) {
        if let Some(entry) = self.entry.take() {
            self.shared.release(self.key, entry);
        }
    }

    fn entry(&self) -> &Entry<R, P> {
        self.entry.as_ref().unwrap_or_else(|| unreachable!("only `release` takes it, with `self`"))
    }
}

impl<R: Registrar, P> Drop for Quarantined<R, P> {
    fn drop(&mut self) {
        let Some(entry) = self.entry.take() else { return };
        tracing::error!(
            key = %self.key,
            bytes = entry.bytes(),
            "memory leaked for good: nobody watches the transfers that may still write it"
        );
        // What its registrations need stays with it: the entry shares it.
        mem::forget(entry);
    }
}

impl<R: Registrar, P: fmt::Debug> fmt::Debug for Quarantined<R, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Quarantined")
            .field("key", &self.key)
            .field("bytes", &self.bytes())
            .field("prepared", self.prepared())
            .finish_non_exhaustive()
    }
}
