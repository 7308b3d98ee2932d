use std::time::Instant;

use refit::pool::{Memory, PoolStats};
use refit::transport::Transport;
use refit::{DigestRequest, Digests, Expected, Publication, RefitError, Target};

use super::RankError;
use super::engine::{Engine, EngineError};
use super::pulls::Pulls;
use crate::puller::{Cause, PullFailure, Puller, Reading};
use crate::rendezvous::Rendezvous;
use crate::seat::{Reseat, Seat};
use crate::source::{SourceError, SourceRank};
use crate::stats::PullTotals;
use crate::stop::Stop;

/// A target rank that reads into its live parameters, while its engine stands still.
///
/// A pull that fails leaves them a mix: the engine does not go on until another has succeeded. And while a peer is silent
/// in the middle of one nothing else can be read: it may write them whenever it goes on, and no other memory can be the live
/// one. That takes until it is ended, or goes on; a refresh says so at its deadline. It saves the memory and the
/// copy of a [`Shadow`](super::Shadow); it cannot cut over together with other ranks, so it is for replicas of one rank, or
/// for engines that stop as a whole.
#[derive(Debug)]
pub struct Direct<T: Transport, E: Engine> {
    pulls: Pulls<T>,
    engine: E,
    /// The version that is live and whole.
    version: Option<u64>,
    totals: PullTotals,
}

impl<T: Transport, E: Engine> Direct<T, E> {
    /// A rank that reads into this target's parameters.
    #[must_use]
    pub fn new(target: Target<T>, engine: E) -> Self {
        Self { pulls: Pulls::new(target), engine, version: None, totals: PullTotals::default() }
    }

    /// What waits here comes to an end when `stop` is told.
    #[must_use]
    pub fn with_stop(mut self, stop: Stop) -> Self {
        self.pulls.set_stop(stop);
        self
    }

    /// The version that is live and whole.
    #[must_use]
    pub fn version(&self) -> Option<u64> {
        self.version
    }

    /// What the pool of its target holds.
    #[must_use]
    pub fn pool_stats(&self) -> PoolStats {
        self.pulls.pool_stats()
    }

    /// What its pulls came to.
    #[must_use]
    pub fn totals(&self) -> &PullTotals {
        &self.totals
    }

    /// The live parameters by name, if they are whole and not being read into.
    #[must_use]
    pub fn params(&self) -> Option<Box<dyn Iterator<Item = (&str, &Memory)> + '_>> {
        self.pulls.params()
    }

    /// The engine.
    #[must_use]
    pub fn engine(&self) -> &E {
        &self.engine
    }
}

impl<T: Transport, E: Engine> Puller for Direct<T, E> {
    fn pull(&mut self, reading: &Reading<'_>, deadline: Instant) -> Result<(), PullFailure> {
        let stopped = |what, source: EngineError| {
            PullFailure::new(Cause::Failed, RankError::Engine { what, source })
        };
        let (engine, totals) = (&mut self.engine, &mut self.totals);
        engine.pause().map_err(|error| stopped("pause", error))?;
        self.version = None;
        let derived = self.pulls.pull(reading, deadline, |installed| {
            let span = tracing::debug_span!("post_install", version = reading.version);
            let _entered = span.enter();
            let derived = engine.derive(installed.post_actions(), &mut installed.params());
            match derived {
                Ok(()) => {
                    let (target, report) = installed.refreshed();
                    totals.add(&report);
                    Ok(target)
                }
                Err(error) => Err((installed.stale(), error)),
            }
        })?;
        derived.map_err(|error| stopped("derive", error))?;
        self.version = Some(reading.version);
        self.engine.resume(reading.version);
        Ok(())
    }

    /// Waits: the parameters are the engine's, and no others can take their place.
    fn make_ready(&mut self, _: &str, deadline: Instant) -> Result<(), PullFailure> {
        self.pulls.settle(deadline)
    }

    fn quarantined_bytes(&self) -> u64 {
        self.pulls.kept_bytes()
    }
}

/// Has no entries of its own.
impl<R: Rendezvous, T: Transport, E: Engine> Reseat<R> for Direct<T, E> {
    fn reseat(&mut self, _: &Seat<R>, _: Instant) -> Result<(), SourceError> {
        Ok(())
    }
}

impl<T: Transport, E: Engine> SourceRank for Direct<T, E> {
    fn publication(&self) -> Result<Publication, RefitError> {
        self.pulls.publication()
    }

    fn digests(&self, request: &DigestRequest) -> Result<Digests, RefitError> {
        self.pulls.digests(request)
    }

    fn begin(&mut self) -> Result<(), RefitError> {
        self.pulls.take_back()
    }

    /// Lends what it holds.
    fn commit(&mut self, version: u64) -> Result<Expected, RefitError> {
        if self.version != Some(version) {
            return Err(RefitError::NothingInstalled);
        }
        self.pulls.lend()
    }
}
