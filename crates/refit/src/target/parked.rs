//! A refit that nobody waits for any more, until its reads have settled.

use std::iter;
use std::sync::Arc;
use std::time::Duration;

use refit_transport::{Parked, Progress, Returned, Transport, Unsettled};

use super::waves::{Reading, Stop};
use super::{Failed, InvalidTarget, Pulling, Refit, Target, Unfinished};
use crate::error::RefitError;

/// A refit that was given up while reads were under way. Nothing is posted or landed any more; the target comes back
/// when every read has settled. Until then its staging memory is quarantined in the pool, and nobody can reach its
/// parameters.
///
/// Dropped before, it leaks that memory, loudly: a NIC may still write it.
#[derive(Debug)]
#[must_use = "dropping it leaks the target's memory"]
pub struct ParkedTarget<T: Transport> {
    // Dropped before the memory: it waits for landings, which read and write it.
    refit: Refit<T>,
    pull: Parked<T>,
}

/// What [`ParkedTarget::settle`] gives back.
#[derive(Debug)]
pub enum Settling<T: Transport> {
    /// Reads are under way still.
    Parked(Box<ParkedTarget<T>>),
    /// Live parameters had been written.
    Invalid(InvalidTarget<T>),
    /// Only staging memory was written.
    Whole(Target<T>),
    /// Reads can no longer be watched and may write the target's memory for ever. It has been leaked: start the
    /// engine's worker anew.
    Lost(RefitError),
}

impl<T: Transport> Pulling<T> {
    /// Gives up waiting, as after [`RefitError::Deadline`]: the memory stays owned until every read has settled, which
    /// is found out by polling.
    ///
    /// # Errors
    /// What waiting would have said, when no read is under way.
    pub fn park(self) -> Result<ParkedTarget<T>, Box<Failed<Unfinished<T>>>> {
        let Self { reading, refit } = self;
        match reading {
            Some(Reading::UnderWay(pull)) => Ok(ParkedTarget { refit, pull: pull.park() }),
            Some(Reading::Stopped(stop)) => Err(Box::new(refit.stopped(stop))),
            // Everything has arrived and nothing is under way: given up before it has landed.
            Some(Reading::Arrived(lease)) => {
                drop(lease);
                let stop = Stop::Landing(refit.late(iter::empty()));
                Err(Box::new(refit.stopped(stop)))
            }
            None => unreachable!("methods leave the reading behind them"),
        }
    }
}

impl<T: Transport> ParkedTarget<T> {
    /// Moves the reads on. Never waits for a peer.
    pub fn poll(&mut self) -> Progress {
        self.pull.poll()
    }

    /// Bytes that are kept away: those of staging and of the parameters.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pull.bytes()
    }

    /// Bytes that cannot be used before it has settled: those of [`bytes`](Self::bytes), and what else its pool holds.
    #[must_use]
    pub fn kept_bytes(&self) -> u64 {
        let pool = self.refit.inner.pool.stats();
        self.bytes().saturating_add(pool.bytes.saturating_sub(pool.quarantined_bytes))
    }

    /// The transport whose reads these are.
    #[must_use]
    pub fn transport(&self) -> &Arc<T> {
        &self.refit.inner.transport
    }

    /// For how long it has been parked.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.pull.age()
    }

    /// Gives the target back, if every read has settled. Does not poll.
    #[must_use]
    pub fn settle(self) -> Settling<T> {
        let Self { mut refit, pull } = self;
        let Returned { live, .. } = match pull.settle() {
            Ok(returned) => returned,
            Err(Unsettled::Pending(pull)) => {
                return Settling::Parked(Box::new(Self { refit, pull: *pull }));
            }
            Err(Unsettled::Lost { errors, .. }) => return Settling::Lost(super::first(errors)),
            Err(_) => {
                let what = "a parked pull that ended in a way this release does not know";
                return Settling::Lost(RefitError::Unsupported { what });
            }
        };
        refit.inner.live = live;
        let stop = Stop::Landing(refit.late(iter::empty()));
        match refit.stopped(stop).state {
            Unfinished::Invalid(target) => Settling::Invalid(target),
            Unfinished::Whole(target) => Settling::Whole(target),
            Unfinished::Pulling(_) | Unfinished::Lost => {
                unreachable!("a refit that stopped in landing has its target")
            }
        }
    }
}
