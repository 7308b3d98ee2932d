use std::error::Error;

use crate::{Key, MemoryKind};

/// Why the pool refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The entry is out on a lease, or another thread is building it.
    #[error(
        "entry {key} is leased or being built; return that lease first, or use a pool for each worker"
    )]
    Leased {
        /// The entry.
        key: Key,
    },
    /// An arena does not fit beside what cannot be evicted.
    #[error(
        "an arena of {needed} bytes does not fit: of a budget of {budget} bytes, {leased} are leased or being built \
         and {quarantined} are quarantined; return leases, raise the budget, or restart a worker with much quarantine"
    )]
    Budget {
        /// Bytes asked for.
        needed: u64,
        /// Bytes the pool may hold.
        budget: u64,
        /// Bytes of leased entries and of entries being built, the one that asks included.
        leased: u64,
        /// Bytes that cannot be freed now, because a transfer may still write them.
        quarantined: u64,
    },
    /// Too much memory waits for transfers that do not end.
    #[error(
        "{quarantined} bytes in {entries} entries are quarantined, more than {limit}: reads into them have not ended; end \
         the silent peer, which settles them, or restart this process"
    )]
    Quarantine {
        /// Bytes that a transfer may still write.
        quarantined: u64,
        /// Entries they are in.
        entries: u64,
        /// Bytes there may be, [`PoolOptions::quarantine_bytes`](crate::PoolOptions::quarantine_bytes).
        limit: u64,
    },
    /// The allocator gave no memory.
    #[error(transparent)]
    Allocate(#[from] AllocateError),
    /// The registrar refused memory.
    #[error(
        "cannot register {bytes} bytes of {kind}: see the cause; usual ones are a memlock limit, a full BAR1 window, \
         and memory that is not one plain allocation"
    )]
    Register {
        /// Bytes of the piece that was refused.
        bytes: u64,
        /// Where the piece lives.
        kind: MemoryKind,
        /// What the registrar said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// Registrations of entries dropped earlier could not be undone. Reported once, before anything else is done.
    #[error(
        "{failures} registrations of dropped entries could not be undone, the first one's cause follows; nothing was \
         leased: call again to go on, and restart the worker if it keeps happening"
    )]
    Deregister {
        /// Failures since the last report.
        failures: u64,
        /// What the registrar said to the first.
        source: Box<dyn Error + Send + Sync>,
    },
}

/// Why there is no lease.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseError<E> {
    /// The pool refused before anything was built.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The caller's `build` failed. What it had allocated and registered is undone.
    #[error(transparent)]
    Build(E),
}

/// An allocator has no memory to give.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot allocate {bytes} bytes of {kind}; free some, lower the pool's budget, or stage less"
)]
pub struct AllocateError {
    kind: MemoryKind,
    bytes: u64,
    source: Box<dyn Error + Send + Sync>,
}

impl AllocateError {
    /// An error with its cause.
    pub fn new(
        kind: MemoryKind,
        bytes: u64,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self { kind, bytes, source: source.into() }
    }

    /// Where the memory would have lived.
    #[must_use]
    pub fn kind(&self) -> MemoryKind {
        self.kind
    }

    /// Bytes asked for.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Why memory cannot be cut into the parts asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CarveError {
    /// A part reaches behind the end.
    #[error(
        "part {part}, {len} bytes from {offset}, reaches outside the memory's {available} bytes"
    )]
    Outside {
        /// Number of the part.
        part: usize,
        /// Its first byte.
        offset: u64,
        /// Its bytes.
        len: u64,
        /// Bytes there are.
        available: u64,
    },
    /// Two parts share a byte.
    #[error("parts {part} and {other} share byte {offset}; memory has one holder")]
    Overlap {
        /// Number of the part that starts first.
        part: usize,
        /// Number of the other.
        other: usize,
        /// The first byte they share.
        offset: u64,
    },
}
