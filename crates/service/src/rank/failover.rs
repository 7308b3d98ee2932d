//! Other memory for a rank whose own may still be written.

use std::fmt;
use std::sync::Arc;

use refit::transport::Transport;
use refit::{ParkedTarget, Settling, Target};

use super::RankError;
use crate::puller::{Cause, PullFailure};
use crate::worker::{Agent, BuildError, Quarantine, Standing};

type Build<T> = dyn FnMut(u64) -> Result<Target<T>, BuildError> + Send;

/// Makes targets, and parts with those whose reads are out.
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
    pub(super) fn retire(&self, parked: ParkedTarget<T>) {
        let transport = Arc::clone(parked.transport());
        let bytes = parked.kept_bytes();
        self.quarantine.retire(Retired {
            held: Some(Settling::Parked(Box::new(parked))),
            bytes,
            transport,
        });
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

/// A target that nobody uses any more. Its transport goes last.
struct Retired<T: Transport> {
    /// Absent only while it is polled.
    held: Option<Settling<T>>,
    bytes: u64,
    transport: Arc<T>,
}

impl<T: Transport> Agent for Retired<T> {
    fn name(&self) -> String {
        self.transport.agent().to_owned()
    }

    fn poll(&mut self) -> Standing {
        self.held = self.held.take().map(|held| match held {
            Settling::Parked(mut parked) => {
                parked.poll();
                parked.settle()
            }
            settled => settled,
        });
        match &self.held {
            Some(Settling::Invalid(_) | Settling::Whole(_)) if self.transport.unsettled() == 0 => {
                Standing::Quiet
            }
            Some(Settling::Lost(_)) | None => Standing::Lost,
            Some(_) => Standing::Restless,
        }
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }
}
