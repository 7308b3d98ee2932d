//! Reads under way, together with the memory they write.

mod error;
mod owned;
mod parked;
mod patience;

use std::fmt;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::Arc;
use std::time::{Duration, Instant};

use refit_pool::{Memory, MemoryKind};

use self::owned::{Checked, Owned};
use crate::{Status, Transport, TransportError, TransportLease};

pub use self::error::PullError;
pub use self::owned::Refusal;
pub use self::parked::{Parked, Returned, Unsettled};
pub use self::patience::Patience;

/// Reads under way. Owns every byte they write until all of them have settled.
///
/// NIXL cannot cancel a posted read, so there is no cancelling here either. [`wait`](Self::wait) keeps a deadline and
/// gives the pull back when it passes; the caller waits again, or [parks](Self::park) it: its memory is quarantined then
/// until the reads have settled. Dropping a pull that has not settled is the last resort and leaks its memory, loudly:
/// the lease stays quarantined, live memory is never freed, and the transport takes no new reads. That is the price of
/// never letting a NIC write memory that somebody else has been given.
///
/// What a pull owns cannot be given back, freed or read meanwhile, because it is not the caller's any more:
///
/// ```
/// # use std::sync::Arc;
/// # use refit_pool::Memory;
/// # use refit_transport::{Pull, PullError, Transport, TransportLease};
/// fn pull<T: Transport>(
///     transport: Arc<T>,
///     lease: TransportLease<T>,
///     live: Memory,
/// ) -> Result<Pull<T>, PullError<T>> {
///     let pull = Pull::start(transport, lease, vec![live], ..)?;
///     Ok(pull)
/// }
/// ```
///
/// ```compile_fail,E0382
/// # use std::sync::Arc;
/// # use refit_pool::Memory;
/// # use refit_transport::{Pull, PullError, Transport, TransportLease};
/// fn pull<T: Transport>(
///     transport: Arc<T>,
///     lease: TransportLease<T>,
///     live: Memory,
/// ) -> Result<Pull<T>, PullError<T>> {
///     let pull = Pull::start(transport, lease, vec![live], ..)?;
///     drop(live); // error: use of moved value
///     Ok(pull)
/// }
/// ```
///
/// ```compile_fail,E0382
/// # use std::sync::Arc;
/// # use refit_pool::Memory;
/// # use refit_transport::{Pull, PullError, Transport, TransportLease};
/// fn pull<T: Transport>(
///     transport: Arc<T>,
///     lease: TransportLease<T>,
///     live: Memory,
/// ) -> Result<Pull<T>, PullError<T>> {
///     let pull = Pull::start(transport, lease, vec![live], ..)?;
///     drop(lease); // error: use of moved value
///     Ok(pull)
/// }
/// ```
#[must_use = "dropping a pull that has not settled leaks its memory"]
pub struct Pull<T: Transport> {
    transport: Arc<T>,
    /// `None` once it was given back.
    owned: Option<Owned<T>>,
    /// What was found about the lease's batches, now or by pulls before.
    checked: Option<Box<Checked>>,
    /// The batches of the lease that this pull is about.
    batches: Range<usize>,
    /// One for each of them.
    states: Vec<State>,
    errors: Vec<TransportError>,
    stats: PullStats,
    started: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not posted: nothing writes.
    Idle,
    Pending,
    Settled,
    /// May write for ever.
    Lost,
}

/// Where a pull stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Some reads may still write the pull's memory.
    Pending,
    /// Every read has arrived.
    Done,
    /// Some reads failed, and none is under way that could be waited for. [`Pull::finish`] says why.
    Failed,
}

/// What a pull did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PullStats {
    /// Batches, one or more for each peer.
    pub batches: usize,
    /// Bytes written to local memory.
    pub bytes: u64,
    /// How often the batches were polled, all of them once counting as one.
    pub polls: u64,
    /// How long it took to post all batches, without what lay between. Backends that copy with the caller's thread do much of their work here.
    pub posting: Duration,
    /// From before the first post to the poll that found the last read settled.
    pub total: Duration,
}

/// A pull that ended well: every byte has arrived, nothing writes the memory any more.
pub struct Settled<T: Transport> {
    /// The lease, with its arenas.
    pub lease: TransportLease<T>,
    /// Live memory, as it was given to [`Pull::start`].
    pub live: Vec<Memory>,
    /// What it took.
    pub stats: PullStats,
}

impl<T: Transport> Pull<T> {
    /// Posts these batches of the lease (`..`: all of them), all peers before any is waited for.
    ///
    /// `live` is the memory outside the lease's arenas that the batches write: live parameters. It is registered by
    /// the lease's entry (`Build::register`).
    ///
    /// # Errors
    /// [`PullError::NotOwned`], [`PullError::Overlap`] and [`PullError::NoBatch`] before anything is posted;
    /// [`PullError::Failed`] when a post failed and nothing is under way; [`PullError::Lost`] when nothing is under
    /// way that could be watched. If a post fails while other batches run, no further one is posted and the pull is
    /// returned to be waited for.
    pub fn start(
        transport: Arc<T>,
        lease: TransportLease<T>,
        live: Vec<Memory>,
        batches: impl RangeBounds<usize>,
    ) -> Result<Self, PullError<T>> {
        let mut owned = Owned { lease, live };
        let Some(batches) = inside(batches, owned.lease.prepared().len()) else {
            let Owned { lease, live } = owned;
            return Err(PullError::NoBatch { lease: Box::new(lease), live });
        };
        let mut checked = owned.recall();
        let bytes = match checked.check(&owned, &transport, batches.clone()) {
            Ok(bytes) => bytes,
            Err(refusal) => {
                let Owned { lease, live } = owned;
                let lease = Box::new(lease);
                return Err(match refusal {
                    Refusal::NotOwned { batch, len } => {
                        PullError::NotOwned { batch, len, lease, live }
                    }
                    Refusal::Overlap { first, second } => {
                        PullError::Overlap { first, second, lease, live }
                    }
                    Refusal::NoBatch => PullError::NoBatch { lease, live },
                });
            }
        };
        let mut pull = Self {
            transport,
            owned: Some(owned),
            checked: Some(checked),
            states: vec![State::Idle; batches.len()],
            errors: Vec::new(),
            stats: PullStats { batches: batches.len(), bytes, ..PullStats::default() },
            batches,
            started: Instant::now(),
        };
        pull.post(0);
        match pull.progress() {
            Progress::Failed => Err(pull.fail()),
            Progress::Pending | Progress::Done => Ok(pull),
        }
    }

    /// Posts the batches of the lease that follow those of this pull, up to number `end`, while those before may be under
    /// way. Posts nothing once a batch has failed: the pull says so when the others have settled.
    ///
    /// # Errors
    /// [`Refusal`], when the lease has no such batches, or they write what the pull does not own, or a byte that a batch
    /// before does which has not settled. Nothing was posted then.
    pub fn extend(&mut self, end: usize) -> Result<(), Refusal> {
        let (Some(owned), Some(checked)) = (&self.owned, &mut self.checked) else {
            return Err(Refusal::NoBatch);
        };
        if end < self.batches.end || end > owned.lease.prepared().len() {
            return Err(Refusal::NoBatch);
        }
        if !self.errors.is_empty() {
            return Ok(());
        }
        // With all of them from the first one on that may write.
        let quiet = self.states.iter().take_while(|state| **state == State::Settled).count();
        checked.check(owned, &self.transport, self.batches.start + quiet..end)?;
        let written = checked.check(owned, &self.transport, self.batches.end..end)?;
        let first = self.states.len();
        self.batches.end = end;
        self.states.resize(self.batches.len(), State::Idle);
        self.stats.batches = self.batches.len();
        self.stats.bytes = self.stats.bytes.saturating_add(written);
        self.post(first);
        Ok(())
    }

    /// Whether these batches of the lease were posted and have arrived.
    #[must_use]
    pub fn has_arrived(&self, batches: Range<usize>) -> bool {
        self.batches.start <= batches.start
            && batches.end <= self.batches.end
            && self.errors.is_empty()
            && self.states[batches.start - self.batches.start..batches.end - self.batches.start]
                .iter()
                .all(|state| *state == State::Settled)
    }

    /// Which batches of the lease were posted and have not settled, as of the last poll.
    pub fn under_way(&self) -> impl Iterator<Item = usize> + '_ {
        let pending = self.states.iter().zip(self.batches.clone());
        pending.filter(|(state, _)| **state == State::Pending).map(|(_, batch)| batch)
    }

    /// The lease's first arena, if it is memory of a device: that gives no access to bytes which reads may be writing.
    #[must_use]
    pub fn device_arena(&self) -> Option<&Memory> {
        let arena = self.owned.as_ref()?.lease.arenas().first()?;
        (arena.kind() != MemoryKind::Host).then_some(arena)
    }

    /// Posts the batches from this one of the pull on.
    fn post(&mut self, first: usize) {
        let Some(owned) = &mut self.owned else { return };
        let started = Instant::now();
        let batches = self.batches.start + first..self.batches.end;
        let batches = &mut owned.lease.prepared_mut()[batches];
        // SAFETY: `check` found everything the batches write inside the lease's arenas and `live`, and no byte written
        // by two of them. This pull holds the exclusive handles of both: they are given back only when every batch
        // has settled, and leaked otherwise.
        let answers = unsafe { self.transport.post_all(batches) };
        for (answer, state) in answers.into_iter().zip(&mut self.states[first..]) {
            *state = step(answer, &mut self.errors);
        }
        self.stats.posting += started.elapsed();
        self.stats.total = self.started.elapsed();
    }

    /// Moves every batch on that has not settled.
    pub fn poll(&mut self) -> Progress {
        let Some(owned) = &mut self.owned else { return Progress::Done };
        let batches = &mut owned.lease.prepared_mut()[self.batches.clone()];
        if poll_all(&*self.transport, batches, &mut self.states, &mut self.errors) {
            self.stats.polls += 1;
            self.stats.total = self.started.elapsed();
        }
        self.progress()
    }

    /// Where the pull stands, as of the last poll.
    #[must_use]
    pub fn progress(&self) -> Progress {
        progress(&self.states, &self.errors)
    }

    /// Polls until everything has settled or the deadline has passed.
    ///
    /// Waits between polls as [`Patience`] does. A backend may spend long inside one poll (it may copy there); the
    /// deadline is looked at after each.
    ///
    /// # Errors
    /// As [`finish`](Self::finish).
    pub fn wait(mut self, deadline: Instant) -> Result<Settled<T>, PullError<T>> {
        let mut patience = Patience::new();
        while self.poll() == Progress::Pending && patience.pause(deadline) {}
        self.finish()
    }

    /// Gives back the memory, if every read has settled. Does not poll.
    ///
    /// # Errors
    /// [`PullError::Deadline`], with the pull, while reads are under way. [`PullError::Failed`], with the memory,
    /// when some failed. [`PullError::Lost`], without it, when some can no longer be watched.
    pub fn finish(mut self) -> Result<Settled<T>, PullError<T>> {
        match self.progress() {
            Progress::Pending => Err(PullError::Deadline { pull: Box::new(self) }),
            Progress::Failed => Err(self.fail()),
            Progress::Done => match self.owned.take() {
                Some(mut owned) => {
                    self.checked.take().into_iter().for_each(|checked| owned.note(checked));
                    let Owned { lease, live } = owned;
                    Ok(Settled { lease, live, stats: self.stats })
                }
                None => unreachable!("the memory is given back by the methods that take the pull"),
            },
        }
    }

    /// Gives up waiting. The memory is quarantined until every read has settled, which whoever holds the parked pull
    /// finds out by polling it; the agent goes on.
    pub fn park(mut self) -> Parked<T> {
        let Some(owned) = self.owned.take() else {
            unreachable!("the memory is given back by the methods that take the pull")
        };
        let (states, errors) = (std::mem::take(&mut self.states), std::mem::take(&mut self.errors));
        let (transport, batches) = (Arc::clone(&self.transport), self.batches.clone());
        Parked::new(transport, owned, batches, states, errors, self.stats)
    }

    fn fail(mut self) -> PullError<T> {
        let errors = std::mem::take(&mut self.errors);
        if self.states.contains(&State::Lost) {
            // Dropping `self` leaks the memory.
            return PullError::Lost { errors, bytes: self.stats.bytes };
        }
        match self.owned.take() {
            Some(Owned { lease, live }) => {
                PullError::Failed { errors, lease: Box::new(lease), live }
            }
            None => unreachable!("the memory is given back by the methods that take the pull"),
        }
    }

    /// The transport whose reads these are.
    #[must_use]
    pub fn transport(&self) -> &Arc<T> {
        &self.transport
    }

    /// What it did so far.
    #[must_use]
    pub fn stats(&self) -> PullStats {
        self.stats
    }
}

/// The range as numbers of batches, if there are so many.
fn inside(batches: impl RangeBounds<usize>, count: usize) -> Option<Range<usize>> {
    let start = match batches.start_bound() {
        Bound::Included(&start) => start,
        Bound::Excluded(&before) => before.checked_add(1)?,
        Bound::Unbounded => 0,
    };
    let end = match batches.end_bound() {
        Bound::Included(&last) => last.checked_add(1)?,
        Bound::Excluded(&end) => end,
        Bound::Unbounded => count,
    };
    (start <= end && end <= count).then_some(start..end)
}

fn step(result: Result<Status, TransportError>, errors: &mut Vec<TransportError>) -> State {
    match result {
        Ok(Status::Pending) => State::Pending,
        Ok(Status::Done) => State::Settled,
        Err(error) => {
            let state = if error.is_settled() { State::Settled } else { State::Lost };
            errors.push(error);
            state
        }
    }
}

/// Polls the batches that have not settled, and says whether there were any.
fn poll_all<T: Transport>(
    transport: &T,
    batches: &mut [T::Prepared],
    states: &mut [State],
    errors: &mut Vec<TransportError>,
) -> bool {
    let mut pending = false;
    for (batch, state) in batches.iter_mut().zip(states) {
        if *state == State::Pending {
            pending = true;
            *state = step(transport.poll(batch), errors);
        }
    }
    pending
}

fn progress(states: &[State], errors: &[TransportError]) -> Progress {
    if states.contains(&State::Pending) {
        Progress::Pending
    } else if errors.is_empty() {
        Progress::Done
    } else {
        Progress::Failed
    }
}

/// Tells the transport which of these batches nobody watches any more, and says whether there are any: then their
/// memory is to be leaked.
fn abandon<T: Transport>(
    transport: &T,
    batches: &[T::Prepared],
    states: &[State],
    bytes: u64,
) -> bool {
    let restless = |state: &State| matches!(state, State::Pending | State::Lost);
    let mut abandoned = 0_u64;
    for (batch, _) in batches.iter().zip(states).filter(|(_, state)| restless(state)) {
        transport.suspect(batch);
        abandoned += 1;
    }
    if abandoned > 0 {
        tracing::error!(
            agent = transport.agent(),
            batches = abandoned,
            bytes,
            "a pull was dropped before it settled: its memory is leaked, the agent takes no new reads"
        );
    }
    abandoned > 0
}

impl<T: Transport> Drop for Pull<T> {
    fn drop(&mut self) {
        let Some(owned) = self.owned.take() else { return };
        let batches = &owned.lease.prepared()[self.batches.clone()];
        if abandon(&*self.transport, batches, &self.states, self.stats.bytes) {
            owned.leak();
        }
    }
}

impl<T: Transport> fmt::Debug for Pull<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pull")
            .field("agent", &self.transport.agent())
            .field("states", &self.states)
            .field("errors", &self.errors)
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}

impl<T: Transport> fmt::Debug for Settled<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settled").field("stats", &self.stats).finish_non_exhaustive()
    }
}
