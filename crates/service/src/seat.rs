//! Where a process takes part: a store, its session there, and a model.

use std::fmt;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::keys::Model;
use crate::rendezvous::{Created, Key, Life, Rendezvous, RendezvousError, Revision, Snapshot};
use crate::source::SourceError;
use crate::stop::{Stop, receive};

/// Too short a wait to cut.
const SHORT: Duration = Duration::from_millis(250);

/// Longer than a store takes, behind a deadline, to say what trouble it had.
const BEHIND: Duration = Duration::from_secs(3600);

/// A process's place at the rendezvous of a model. Clones are the same place.
pub struct Seat<R: Rendezvous> {
    rendezvous: Arc<R>,
    session: Arc<R::Session>,
    model: Model,
    observer: Option<Observer>,
    stop: Option<Stop>,
}

/// What is told of every [`Point`] that is passed, before anything else happens.
pub type Observer = Arc<dyn Fn(Point) + Send + Sync>;

/// Points of the protocol between which a process may die without anybody reading or serving what it should not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Point {
    /// A source rank is a member, and has published.
    Joined,
    /// It is about to close its version.
    Closing,
    /// It has closed it, and has not looked for readers yet.
    Closed,
    /// No reader is left.
    Drained,
    /// Its header says that its parameters are being written.
    Writing,
    /// Its header says the new version, which nobody has been told of.
    Committed,
    /// The new version is announced.
    Opened,
    /// It has left, and its readers may not have.
    Withdrawn,
    /// A reader has written its lease, and has not looked again.
    Leased,
    /// It has looked again, and is about to read.
    Reading,
    /// It has read, and still holds its lease.
    Read,
    /// It has given its lease back.
    Released,
    /// A rank of a replica is there.
    RankJoined,
    /// It holds the version in its staging memory, and has told nobody.
    Staged,
    /// It is bound to keep it until the round is decided.
    Prepared,
    /// It is about to decide the round.
    Deciding,
    /// The round is decided.
    Decided,
    /// It has said that its parameters are being written.
    Installing,
    /// Its parameters are new, and it has told nobody.
    Installed,
    /// It has said so.
    Reported,
}

impl Point {
    /// Every point.
    pub const ALL: [Self; 20] = [
        Self::Joined,
        Self::Closing,
        Self::Closed,
        Self::Drained,
        Self::Writing,
        Self::Committed,
        Self::Opened,
        Self::Withdrawn,
        Self::Leased,
        Self::Reading,
        Self::Read,
        Self::Released,
        Self::RankJoined,
        Self::Staged,
        Self::Prepared,
        Self::Deciding,
        Self::Decided,
        Self::Installing,
        Self::Installed,
        Self::Reported,
    ];
}

/// What has entries of its own under the session of its process, and takes them along to the next.
pub trait Reseat<R: Rendezvous> {
    /// Goes on under this seat's session, after the last one has ended.
    ///
    /// # Errors
    /// [`SourceError`], as [`LiveSource::rejoin`](crate::source::LiveSource::rejoin).
    fn reseat(&mut self, seat: &Seat<R>, deadline: Instant) -> Result<(), SourceError>;
}

impl<R: Rendezvous> Seat<R> {
    /// A place in this store, whose entries this session keeps.
    #[must_use]
    pub fn new(rendezvous: Arc<R>, session: Arc<R::Session>, model: Model) -> Self {
        Self { rendezvous, session, model, observer: None, stop: None }
    }

    /// Tells `observer` of every point that is passed from here.
    #[must_use]
    pub fn with_observer(mut self, observer: Observer) -> Self {
        self.observer = Some(observer);
        self
    }

    /// Whatever waits from here comes to an end when `stop` is told.
    #[must_use]
    pub fn with_stop(mut self, stop: Stop) -> Self {
        self.stop = Some(stop);
        self
    }

    /// Whatever waits from here waits for as long as it may, told or not.
    pub(crate) fn ignore_stop(&mut self) {
        self.stop = None;
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The store.
    #[must_use]
    pub fn rendezvous(&self) -> &Arc<R> {
        &self.rendezvous
    }

    pub(crate) fn at(&self, point: Point) {
        if let Some(observer) = &self.observer {
            observer(point);
        }
    }

    /// Writes an entry that goes with this process.
    pub(crate) fn put(&self, key: &Key, value: &[u8]) -> Result<(), RendezvousError> {
        self.rendezvous.put(key, value, Life::Session(&self.session))
    }

    /// Writes one once there is no other, as that of a former life, which vanishes with its session. Gives back the other's if
    /// it is there at the deadline still.
    pub(crate) fn claim(
        &self,
        key: &Key,
        value: &[u8],
        deadline: Instant,
    ) -> Result<Result<(), Vec<u8>>, RendezvousError> {
        loop {
            let found = self.list(key)?;
            match self.rendezvous.create(key, value, Life::Session(&self.session))? {
                Created::New => return Ok(Ok(())),
                // A retry of our own, whose answer was lost.
                Created::Already(there) if there == value => return Ok(Ok(())),
                Created::Already(there) => {
                    if self.changed(key, found.revision, deadline)?.is_none() {
                        return Ok(Err(there));
                    }
                }
            }
        }
    }

    pub(crate) fn list(&self, prefix: &Key) -> Result<Snapshot, RendezvousError> {
        self.rendezvous.list(prefix)
    }

    /// Whether the process is to end.
    pub(crate) fn is_told(&self) -> bool {
        self.stop.as_ref().is_some_and(Stop::is_told)
    }

    /// Until when may be waited for others.
    pub(crate) fn until(&self, deadline: Instant) -> Instant {
        self.stop.as_ref().map_or(deadline, |stop| stop.waits_until(deadline))
    }

    /// As [`Rendezvous::changed`], and `None` as well when the process is to end.
    pub(crate) fn changed(
        &self,
        prefix: &Key,
        since: Revision,
        deadline: Instant,
    ) -> Result<Option<Snapshot>, RendezvousError> {
        let until = self.until(deadline);
        let Some(stop) = &self.stop else {
            return self.rendezvous.changed(prefix, since, until);
        };
        if until.saturating_duration_since(Instant::now()) <= SHORT {
            return self.rendezvous.changed(prefix, since, until);
        }
        // One wait, not many short ones: a store tells its own trouble by how long it lasts.
        let (answer, answers) = mpsc::sync_channel(1);
        let (store, key) = (self.rendezvous.clone(), prefix.clone());
        let wait = move || {
            // Whoever asked may have gone.
            let _ = answer.send(store.changed(&key, since, until));
        };
        let Ok(waiting) = thread::Builder::new().name("refit-wait".to_owned()).spawn(wait) else {
            return self.rendezvous.changed(prefix, since, until);
        };
        let ended = until.checked_add(BEHIND).unwrap_or(until);
        match receive(&answers, ended, Some(stop), Stop::waits_until) {
            Ok(changed) => changed,
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => match waiting.join() {
                Err(panic) => resume_unwind(panic),
                Ok(()) => Ok(None),
            },
        }
    }
}

impl<R: Rendezvous> Clone for Seat<R> {
    fn clone(&self) -> Self {
        Self {
            rendezvous: self.rendezvous.clone(),
            session: self.session.clone(),
            model: self.model.clone(),
            observer: self.observer.clone(),
            stop: self.stop.clone(),
        }
    }
}

impl<R: Rendezvous> fmt::Debug for Seat<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seat")
            .field("rendezvous", &self.rendezvous)
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}
