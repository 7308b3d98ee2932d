//! Other memory for a rank whose own may still be written.

use std::fmt;

use refit::Target;
use refit::transport::Transport;

use super::RankError;
use super::pulls::Pulls;
use crate::puller::{Cause, PullFailure};
use crate::worker::{BuildError, Quarantine};

type Build<T> = dyn FnMut(u64) -> Result<Target<T>, BuildError> + Send;

/// Makes targets, and parts with those whose reads are out, or whose agents are of no use.
pub(super) struct Failover<T: Transport> {
    quarantine: Quarantine,
    build: Box<Build<T>>,
    /// Targets built so far.
    built: u64,
}

impl<T: Transport> Failover<T> {
    pub(super) fn new(
        quarantine: Quarantine,
        build: impl FnMut(u64) -> Result<Target<T>, BuildError> + Send + 'static,
    ) -> Self {
        Self { quarantine, build: Box::new(build), built: 0 }
    }

    /// A target in memory of its own, if one that keeps so many bytes may be parted with.
    pub(super) fn build(&mut self, kept_bytes: u64) -> Result<Target<T>, PullFailure> {
        self.quarantine
            .has_room(kept_bytes)
            .map_err(|full| PullFailure::new(Cause::Quarantined, full))?;
        self.built += 1;
        (self.build)(self.built)
            .map_err(|source| PullFailure::new(Cause::Failed, RankError::NoAgent { source }))
    }

    /// Keeps it until its reads have settled.
    pub(super) fn retire(&self, pulls: Pulls<T>) {
        self.quarantine.retire(pulls);
    }

    /// Bytes of those whose reads have not.
    pub(super) fn kept_bytes(&self) -> u64 {
        self.quarantine.bytes()
    }
}

impl<T: Transport> fmt::Debug for Failover<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failover")
            .field("quarantine", &self.quarantine)
            .field("built", &self.built)
            .finish_non_exhaustive()
    }
}
