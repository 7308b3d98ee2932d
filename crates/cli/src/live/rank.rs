//! Target ranks without an engine.

use refit::pool::{Memory, PoolStats};
use refit::translate::PostAction;
use refit::transport::Transport;
use refit_service::puller::Puller;
use refit_service::rank::{Direct, Engine, EngineError, Shadow};
use refit_service::relay::Relay;
use refit_service::rendezvous::Rendezvous;
use refit_service::source::SourceRank;
use refit_service::{PullTotals, ServiceStats};

/// Nobody computes with these parameters, so nothing has to be derived from them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bystander;

impl Engine for Bystander {
    fn pause(&mut self) -> Result<(), EngineError> {
        Ok(())
    }

    fn derive(
        &mut self,
        actions: &[PostAction],
        _: &mut dyn Iterator<Item = (&str, &Memory)>,
    ) -> Result<(), EngineError> {
        for action in actions {
            tracing::debug!(%action, "an engine would do this now");
        }
        Ok(())
    }

    fn resume(&mut self, version: u64) {
        tracing::debug!(version, "an engine would go on now");
    }
}

pub(super) type Live<'a> = Box<dyn Iterator<Item = (&'a str, &'a Memory)> + 'a>;

/// What holds live parameters.
pub(super) trait Holder: Puller {
    /// Them, if they are whole.
    fn live(&self) -> Option<Live<'_>>;

    fn totals(&self) -> PullTotals;

    /// The memory that it reads into beside its parameters.
    fn pool(&self) -> PoolStats;

    /// What has happened on the side that offers, if there is one.
    fn offering(&self) -> ServiceStats {
        ServiceStats::default()
    }
}

impl<T: Transport> Holder for Shadow<T, Bystander> {
    fn live(&self) -> Option<Live<'_>> {
        Some(Box::new(self.params()))
    }

    fn totals(&self) -> PullTotals {
        *Self::totals(self)
    }

    fn pool(&self) -> PoolStats {
        self.pool_stats()
    }
}

impl<T: Transport> Holder for Direct<T, Bystander> {
    fn live(&self) -> Option<Live<'_>> {
        self.params()
    }

    fn totals(&self) -> PullTotals {
        *Self::totals(self)
    }

    fn pool(&self) -> PoolStats {
        self.pool_stats()
    }
}

impl<R: Rendezvous, P: Holder + SourceRank> Holder for Relay<R, P> {
    fn live(&self) -> Option<Live<'_>> {
        self.target()?.live()
    }

    fn totals(&self) -> PullTotals {
        self.target().map(Holder::totals).unwrap_or_default()
    }

    fn pool(&self) -> PoolStats {
        self.target().map(Holder::pool).unwrap_or_default()
    }

    fn offering(&self) -> ServiceStats {
        *self.stats()
    }
}
