//! Target ranks without an engine.

use refit::pool::Memory;
use refit::translate::PostAction;
use refit::transport::Transport;
use refit_service::puller::Puller;
use refit_service::rank::{Counted, Direct, Engine, EngineError, Shadow};
use refit_service::relay::Relay;
use refit_service::rendezvous::Rendezvous;
use refit_service::source::SourceRank;

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
pub(super) trait Holder: Puller + Counted {
    /// Them, if they are whole.
    fn live(&self) -> Option<Live<'_>>;
}

impl<T: Transport> Holder for Shadow<T, Bystander> {
    fn live(&self) -> Option<Live<'_>> {
        Some(Box::new(self.params()))
    }
}

impl<T: Transport> Holder for Direct<T, Bystander> {
    fn live(&self) -> Option<Live<'_>> {
        self.params()
    }
}

impl<R: Rendezvous, P: Holder + SourceRank> Holder for Relay<R, P> {
    fn live(&self) -> Option<Live<'_>> {
        self.target()?.live()
    }
}
