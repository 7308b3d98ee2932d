use refit::pool::PoolStats;
use refit::transport::Transport;

use super::direct::Direct;
use super::engine::Engine;
use super::shadow::Shadow;
use crate::puller::Puller;
use crate::relay::Relay;
use crate::rendezvous::Rendezvous;
use crate::source::SourceRank;
use crate::stats::{PullTotals, ServiceStats};

/// What counts what came of a target rank, whichever way it reads, and whether or not it offers what it has read.
pub trait Counted {
    /// What its pulls came to.
    fn totals(&self) -> PullTotals;

    /// The memory that it reads into beside its parameters.
    fn pool_stats(&self) -> PoolStats;

    /// What has happened on the side that offers, if there is one.
    fn offering(&self) -> ServiceStats {
        ServiceStats::default()
    }
}

impl<T: Transport, E: Engine> Counted for Shadow<T, E> {
    fn totals(&self) -> PullTotals {
        *Self::totals(self)
    }

    fn pool_stats(&self) -> PoolStats {
        Self::pool_stats(self)
    }
}

impl<T: Transport, E: Engine> Counted for Direct<T, E> {
    fn totals(&self) -> PullTotals {
        *Self::totals(self)
    }

    fn pool_stats(&self) -> PoolStats {
        Self::pool_stats(self)
    }
}

impl<R: Rendezvous, P: Counted + SourceRank + Puller> Counted for Relay<R, P> {
    fn totals(&self) -> PullTotals {
        self.target().map(Counted::totals).unwrap_or_default()
    }

    fn pool_stats(&self) -> PoolStats {
        self.target().map(Counted::pool_stats).unwrap_or_default()
    }

    fn offering(&self) -> ServiceStats {
        *self.stats()
    }
}
