use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use refit_pool::{Memory, Quarantined};

use super::{Owned, Progress, PullStats, State, abandon, poll_all, progress};
use crate::{Transport, TransportError, TransportRegistrar};

type Apart<T> = Quarantined<TransportRegistrar<T>, Vec<<T as Transport>::Prepared>>;

/// A pull that nobody waits for any more, with its memory, which is quarantined until every read has settled. Made by
/// [`Pull::park`](super::Pull::park).
///
/// Whoever holds it polls it now and then. Dropped before it has settled, it leaks like a pull does.
#[must_use = "dropping a parked pull that has not settled leaks its memory for good"]
pub struct Parked<T: Transport> {
    transport: Arc<T>,
    /// `None` once it was given back.
    owned: Option<(Apart<T>, Vec<Memory>)>,
    batches: Range<usize>,
    states: Vec<State>,
    errors: Vec<TransportError>,
    stats: PullStats,
    since: Instant,
}

/// What a parked pull leaves when every read has settled. Its arenas are the pool's again.
#[derive(Debug)]
#[non_exhaustive]
pub struct Returned {
    /// Live memory, as it was given to [`Pull::start`](super::Pull::start). If the pull wrote it, it is a mix of old
    /// bytes and new.
    pub live: Vec<Memory>,
    /// Why reads failed; none if all bytes have arrived after all.
    pub errors: Vec<TransportError>,
    /// What the pull did.
    pub stats: PullStats,
}

/// Why a parked pull gives nothing back.
#[non_exhaustive]
pub enum Unsettled<T: Transport> {
    /// Reads are still under way.
    Pending(Box<Parked<T>>),
    /// Reads can no longer be watched, and may write the memory for ever. It has been leaked.
    Lost {
        /// What went wrong, at least one.
        errors: Vec<TransportError>,
        /// Bytes that the pull would have written.
        bytes: u64,
    },
}

impl<T: Transport> Parked<T> {
    pub(super) fn new(
        transport: Arc<T>,
        owned: Owned<T>,
        batches: Range<usize>,
        states: Vec<State>,
        errors: Vec<TransportError>,
        stats: PullStats,
    ) -> Self {
        let Owned { lease, live } = owned;
        let owned = Some((lease.quarantine(), live));
        Self { transport, owned, batches, states, errors, stats, since: Instant::now() }
    }

    /// Moves every batch on that has not settled. Never waits for a peer.
    pub fn poll(&mut self) -> Progress {
        if let Some((apart, _)) = &mut self.owned {
            let batches = &mut apart.prepared_mut()[self.batches.clone()];
            if poll_all(&*self.transport, batches, &mut self.states, &mut self.errors) {
                self.stats.polls += 1;
            }
        }
        self.progress()
    }

    /// Where it stands, as of the last poll. [`Progress::Failed`] may mean that reads were lost: [`settle`](Self::settle)
    /// tells.
    #[must_use]
    pub fn progress(&self) -> Progress {
        progress(&self.states, &self.errors)
    }

    /// Returns the arenas to the pool and the live memory to the caller, if every read has settled. Does not poll.
    ///
    /// # Errors
    /// [`Unsettled::Pending`] with the pull while reads are under way; [`Unsettled::Lost`], without it, when some can
    /// no longer be watched.
    pub fn settle(mut self) -> Result<Returned, Unsettled<T>> {
        if self.progress() == Progress::Pending {
            return Err(Unsettled::Pending(Box::new(self)));
        }
        let errors = std::mem::take(&mut self.errors);
        if self.states.contains(&State::Lost) {
            // Dropping `self` leaks the memory.
            return Err(Unsettled::Lost { errors, bytes: self.stats.bytes });
        }
        match self.owned.take() {
            Some((apart, live)) => {
                apart.release();
                Ok(Returned { live, errors, stats: self.stats })
            }
            None => unreachable!("the memory is given back by the method that takes the pull"),
        }
    }

    /// The transport whose reads these are.
    #[must_use]
    pub fn transport(&self) -> &Arc<T> {
        &self.transport
    }

    /// Bytes that are kept away: those of the arenas and of the live memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.owned.as_ref().map_or(0, |(apart, live)| {
            live.iter().fold(apart.bytes(), |sum, one| sum.saturating_add(one.len() as u64))
        })
    }

    /// For how long it has been parked.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }
}

impl<T: Transport> Drop for Parked<T> {
    fn drop(&mut self) {
        let Some((apart, live)) = self.owned.take() else { return };
        let batches = &apart.prepared()[self.batches.clone()];
        if abandon(&*self.transport, batches, &self.states, self.stats.bytes) {
            // Never freed, as the arenas are not.
            drop(apart);
            std::mem::forget(live);
        } else {
            apart.release();
        }
    }
}

impl<T: Transport> fmt::Debug for Parked<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parked")
            .field("agent", &self.transport.agent())
            .field("states", &self.states)
            .field("errors", &self.errors)
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}

impl<T: Transport> fmt::Display for Unsettled<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pending(parked) => write!(
                f,
                "reads into agent `{}` have not settled {} ms after they were given up; end the silent peer, which \
                 settles them",
                parked.transport.agent(),
                parked.age().as_millis()
            ),
            Self::Lost { errors, bytes } => {
                write!(f, "reads were lost and the {bytes} bytes they may write are leaked")?;
                errors.first().map_or(Ok(()), |first| write!(f, ": {first}"))
            }
        }
    }
}

impl<T: Transport> fmt::Debug for Unsettled<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pending(parked) => f.debug_tuple("Pending").field(parked).finish(),
            Self::Lost { errors, bytes } => {
                f.debug_struct("Lost").field("errors", errors).field("bytes", bytes).finish()
            }
        }
    }
}

impl<T: Transport> std::error::Error for Unsettled<T> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Pending(_) => None,
            Self::Lost { errors, .. } => errors.first().map(|error| error as _),
        }
    }
}
