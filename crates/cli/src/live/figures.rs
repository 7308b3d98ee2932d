//! What a rank has come to, as plain data that another thread may look at.

use std::sync::{Arc, Mutex, PoisonError};

use refit::pool::PoolStats;
use refit_service::{PullTotals, ServiceStats};

/// Everything that is counted.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Figures {
    /// The version on offer, or the live one.
    pub(super) version: Option<u64>,
    /// Bytes of the rank's parameters.
    pub(super) parameter_bytes: u64,
    /// Bytes that were compared with what they should be, and were right.
    pub(super) verified_bytes: u64,
    /// Steps that failed and were tried again.
    pub(super) failures: u64,
    /// Of the rank as a source, a reader, and a part of its replica.
    pub(super) service: ServiceStats,
    /// Of the side that offers what was read.
    pub(super) relay: ServiceStats,
    pub(super) pulls: PullTotals,
    pub(super) pool: PoolStats,
}

/// Figures that threads share. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Shared(Arc<Mutex<Figures>>);

impl Shared {
    pub(super) fn update(&self, change: impl FnOnce(&mut Figures)) {
        // A panic between two numbers leaves numbers.
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn snapshot(&self) -> Figures {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
