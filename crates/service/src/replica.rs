//! Ranks that serve together: all of them stage a version, then all install it, or all stay with the one they have.

mod machine;
mod view;

use std::error::Error;
use std::fmt;
use std::time::{Duration, Instant};

use crate::groups::Offer;
use crate::message::{Message, RankState};
use crate::puller::Puller;
use crate::reader::{Ended, Reader, RefreshError, Refreshed, Wanted};
use crate::rendezvous::{Key, Life, Rendezvous, RendezvousError};
use crate::seat::{Point, Reseat, Seat};
use crate::source::SourceError;
use crate::stats::ServiceStats;

pub use self::machine::{Machine, Step};
pub use self::view::{View, ViewError};

/// What holds a staged version beside the live one.
pub trait Stage: Puller {
    /// Makes the version that was pulled last live, whole: has the engine stop at the end of a step, copies, and derives
    /// what is derived. Live addresses stay as they are.
    ///
    /// # Errors
    /// [`InstallError`]: live parameters may be a mix, and this rank serves no more.
    fn install(&mut self, version: u64) -> Result<(), InstallError>;

    /// All ranks have installed this version: the engine may go on.
    fn resume(&mut self, version: u64);
}

/// Why a version could not be made live.
#[derive(Debug)]
pub struct InstallError(Box<dyn Error + Send + Sync>);

impl InstallError {
    /// For this reason.
    pub fn new(reason: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(reason.into())
    }
}

impl fmt::Display for InstallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Error for InstallError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}

/// Which rank of which replica.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ReplicaRank {
    /// The replica: ranks that answer a request together.
    pub replica: String,
    /// The rank in it, counted from 0.
    pub rank: u32,
    /// How many there are.
    pub ranks: u32,
}

/// A version that all ranks of a replica have installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ready {
    /// The version.
    pub version: u64,
    /// How long it took this rank to get there.
    pub took: Duration,
}

/// One rank of a replica.
#[derive(Debug)]
pub struct Replica<R: Rendezvous, S: Stage> {
    seat: Seat<R>,
    place: ReplicaRank,
    prefix: Key,
    key: Key,
    reader: Reader<R>,
    stage: S,
    machine: Machine,
    /// For how long a view may be believed: as long as nobody can have taken this rank's place.
    fresh: Duration,
    view: View,
    /// Before the view was asked for.
    seen: Instant,
    /// Why it is invalid.
    broken: Option<String>,
    /// What was read last.
    read: Option<Refreshed>,
    /// Whether everything that it is stands under its seat's session.
    seated: bool,
    stats: ServiceStats,
}

impl<R: Rendezvous, S: Stage> Replica<R, S> {
    /// Makes this process a rank of its replica, which has installed nothing. It catches up by
    /// [`refresh`](Self::refresh).
    ///
    /// `fresh` is how long after looking at the store this rank may go on serving: less than the time to live of its
    /// session, so that a rank that is cut off ends before another can take its place.
    ///
    /// A rank that is there already is never taken over. Where it is this rank's former life, its entry vanishes with its
    /// session, and this waits for that until the deadline.
    ///
    /// # Errors
    /// [`ReplicaError::Taken`] when another life of this rank is there until the deadline; [`ReplicaError`] otherwise.
    pub fn join(
        seat: Seat<R>,
        place: ReplicaRank,
        incarnation: u128,
        reader: Reader<R>,
        stage: S,
        fresh: Duration,
        deadline: Instant,
    ) -> Result<Self, ReplicaError> {
        let ReplicaRank { replica, rank, ranks } = &place;
        let prefix = seat.model().replica(replica)?;
        let key = seat.model().rank_state(replica, *rank)?;
        let machine = Machine::new(*rank, *ranks, incarnation);
        RankState::decode(&machine.state().encode())?;
        let mut joined = Self {
            seat,
            place,
            prefix,
            key,
            reader,
            stage,
            machine,
            fresh,
            view: View::default(),
            seen: Instant::now(),
            broken: None,
            read: None,
            seated: true,
            stats: ServiceStats::default(),
        };
        joined.enter(deadline)?;
        Ok(joined)
    }

    /// Joins again after the session has ended, under that of another seat and as another life of this rank, which needs an
    /// incarnation of its own. Its memory, its agent, its plans and what it has staged stay as they are.
    ///
    /// It has installed nothing, as far as others are told, and serves nothing before the next
    /// [`refresh`](Self::refresh) has caught up with what was committed. Where that is staged still, nothing is read
    /// for it.
    ///
    /// # Errors
    /// As [`join`](Self::join), and what [`Reseat`] says. May be tried again, with another seat if need be; until it has
    /// succeeded the rank is [not there](Self::has_vanished).
    pub fn rejoin(
        &mut self,
        seat: Seat<R>,
        incarnation: u128,
        deadline: Instant,
    ) -> Result<(), ReplicaError>
    where
        S: Reseat<R>,
    {
        self.seated = false;
        self.machine.reborn(incarnation);
        self.view = View::default();
        self.seat = seat;
        self.reader.reseat(self.seat.clone());
        self.enter(deadline)?;
        self.stage.reseat(&self.seat, deadline)?;
        self.seated = true;
        self.stats.rejoins += 1;
        Ok(())
    }

    /// Takes this rank's place, once no other life of it is there.
    fn enter(&mut self, deadline: Instant) -> Result<(), ReplicaError> {
        let state = self.machine.state();
        if let Err(there) = self.seat.claim(&self.key, &state.encode(), deadline)? {
            let holder = RankState::decode(&there).ok().map(|state| state.incarnation);
            return Err(ReplicaError::Taken { place: self.place.clone(), holder });
        }
        self.machine.reported(state);
        self.seat.at(Point::RankJoined);
        self.look()
    }

    /// What stages and installs.
    #[must_use]
    pub fn stage(&self) -> &S {
        &self.stage
    }

    /// The version that is live on this rank, whether or not the others have it.
    #[must_use]
    pub fn installed(&self) -> Option<u64> {
        self.machine.installed_version()
    }

    /// What was read last, and from where. It may not be installed yet.
    #[must_use]
    pub fn read(&self) -> Option<&Refreshed> {
        self.read.as_ref()
    }

    /// For how long one attempt to read may go on from now on, as [`ReaderOptions::attempt`](crate::reader::ReaderOptions).
    pub fn set_attempt(&mut self, attempt: Duration) {
        self.reader.set_attempt(attempt);
    }

    /// Waits until others offer a version from `at_least` on, and reads nothing. `None` at the deadline.
    ///
    /// # Errors
    /// [`RendezvousError`].
    pub fn wait_for(
        &mut self,
        at_least: u64,
        deadline: Instant,
    ) -> Result<Option<Offer>, RendezvousError> {
        let wanted = self.wanted(at_least, None);
        self.reader.wait_for(&wanted, deadline)
    }

    /// What has happened so far, to this rank as a reader as well.
    #[must_use]
    pub fn stats(&self) -> ServiceStats {
        let ServiceStats { installs, aborts, rejoins, .. } = self.stats;
        let quarantined_bytes = self.stage.quarantined_bytes();
        ServiceStats { installs, aborts, rejoins, quarantined_bytes, ..*self.reader.stats() }
    }

    /// Whether this rank's session has ended, as far as the store is known, so that it has to
    /// [`rejoin`](Self::rejoin) before it can do anything. Asks the store as [`serving`](Self::serving) does.
    pub fn has_vanished(&mut self) -> bool {
        self.look_now_and_then();
        !self.seated || self.machine.has_vanished(&self.view)
    }

    /// The version that this rank may answer for now: all ranks have installed it. `None` while they differ, when a rank is
    /// missing or invalid, and when the store has not been heard of for too long.
    ///
    /// Asks the store when what is known is a third of its time old.
    pub fn serving(&mut self) -> Option<u64> {
        self.look_now_and_then();
        self.machine.serving(&self.view).filter(|_| self.seen.elapsed() < self.fresh)
    }

    /// Brings this rank, with all others of the replica, to a version from `at_least` on, and returns when all of them have
    /// installed it. All ranks have to be told.
    ///
    /// What was decided before the deadline is carried out, behind it if need be: copying is not waiting.
    ///
    /// # Errors
    /// [`ReplicaError`]. Unless that is [`ReplicaError::Invalid`], this rank's live parameters are whole: the old version,
    /// or the new one if only other ranks were waited for ([`installed`](Self::installed)).
    pub fn refresh(&mut self, at_least: u64, deadline: Instant) -> Result<Ready, ReplicaError> {
        let began = Instant::now();
        if !self.seated {
            return Err(ReplicaError::Vanished { place: self.place.clone() });
        }
        self.machine.want(at_least);
        let mut staging = None;
        loop {
            if Instant::now() >= self.seat.until(deadline) {
                self.machine.give_up();
            }
            self.look()?;
            match self.machine.next(&self.view) {
                Step::Report(state) => self.report(state)?,
                Step::Stage { at_least, prefer } => {
                    if let Err(error) = self.pull(at_least, prefer, deadline) {
                        self.machine.give_up();
                        staging = Some(error);
                    }
                }
                Step::Decide(decision) => {
                    self.seat.at(Point::Deciding);
                    let key = self.seat.model().decision(&self.place.replica, decision.round)?;
                    // Whoever was first has decided. What that was, the next look tells.
                    self.seat.rendezvous().create(&key, &decision.encode(), Life::Kept)?;
                    self.seat.at(Point::Decided);
                }
                Step::Install(version) => self.install(version),
                Step::Wait => {
                    let span =
                        tracing::debug_span!("rollout_readiness", replica = self.place.replica);
                    let _entered = span.enter();
                    self.seat.changed(&self.prefix, self.view.revision, deadline)?;
                }
                Step::Done(version) => {
                    self.stage.resume(version);
                    return Ok(Ready { version, took: began.elapsed() });
                }
                Step::Left => return Err(self.late(at_least, staging)),
                Step::Invalid => {
                    let reason = self.broken.clone().unwrap_or_default();
                    return Err(ReplicaError::Invalid { place: self.place.clone(), reason });
                }
                Step::Superseded => {
                    return Err(ReplicaError::Superseded { place: self.place.clone() });
                }
                Step::Vanished => {
                    return Err(ReplicaError::Vanished { place: self.place.clone() });
                }
            }
        }
    }

    /// Leaves the replica, which serves no more until somebody takes this rank's place, and gives back what stages. Another
    /// life of it that is there already stays.
    ///
    /// # Errors
    /// [`RendezvousError`]; the rank is dropped then.
    pub fn leave(self) -> Result<S, RendezvousError> {
        let found = self.seat.list(&self.key)?;
        let there = found.entries.get(&self.key).map(|value| RankState::decode(value));
        let ours = self.machine.state().incarnation;
        if !matches!(there, Some(Ok(state)) if state.incarnation != ours) {
            self.seat.rendezvous().remove(&self.key)?;
        }
        Ok(self.stage)
    }

    fn look_now_and_then(&mut self) {
        if self.seen.elapsed() > self.fresh / 3
            && let Err(error) = self.look()
        {
            tracing::warn!(%error, "the replica cannot be looked at");
        }
    }

    /// Takes a new view, and removes decisions that later ones have made superfluous.
    fn look(&mut self) -> Result<(), ReplicaError> {
        let asked = Instant::now();
        let snapshot = self.seat.list(&self.prefix)?;
        let view = View::read(&self.prefix, self.place.ranks, &snapshot)?;
        let aborted = |view: &View| {
            view.latest.filter(|it| it.standing().map(|it| it.round) != Some(it.round))
        };
        if aborted(&view) != aborted(&self.view) && aborted(&view).is_some() {
            self.stats.aborts += 1;
        }
        let latest = view.latest.map_or(0, |latest| latest.round);
        for round in view.rounds.iter().filter(|round| **round < latest.saturating_sub(1)) {
            let key = self.seat.model().decision(&self.place.replica, *round)?;
            self.seat.rendezvous().remove(&key)?;
        }
        (self.view, self.seen) = (view, asked);
        Ok(())
    }

    fn report(&mut self, state: RankState) -> Result<(), ReplicaError> {
        self.seat.put(&self.key, &state.encode())?;
        self.machine.reported(state);
        self.seat.at(match (state.prepared, state.health) {
            (Some(_), _) => Point::Prepared,
            (None, crate::message::Health::Installing) => Point::Installing,
            (None, _) => Point::Reported,
        });
        Ok(())
    }

    fn pull(
        &mut self,
        at_least: u64,
        prefer: Option<u64>,
        deadline: Instant,
    ) -> Result<(), Box<RefreshError>> {
        let wanted = self.wanted(at_least, prefer);
        self.machine.staging();
        let refreshed = self.reader.refresh(&mut self.stage, &wanted, deadline)?;
        self.seat.at(Point::Staged);
        self.machine.staged(refreshed.version);
        self.read = Some(refreshed);
        Ok(())
    }

    /// Nothing that its own ranks offer: they have what this one has.
    fn wanted(&self, at_least: u64, prefer: Option<u64>) -> Wanted {
        Wanted { prefer, ..Wanted::at_least(at_least).but_not_from(&self.place.replica) }
    }

    fn install(&mut self, version: u64) {
        let span = tracing::debug_span!("installation", replica = self.place.replica, version);
        let _entered = span.enter();
        match self.stage.install(version) {
            Ok(()) => {
                self.seat.at(Point::Installed);
                self.stats.installs += 1;
                self.machine.installed();
            }
            Err(error) => {
                tracing::error!(replica = self.place.replica, rank = self.place.rank, version, %error, "installing failed");
                self.broken = Some(format!("installing version {version} failed: {error}"));
                self.machine.failed();
            }
        }
    }

    fn late(&self, at_least: u64, staging: Option<Box<RefreshError>>) -> ReplicaError {
        if let Some(error) = staging
            && !matches!(error.ended, Ended::Deadline if self.machine.staged_version().is_some())
        {
            return ReplicaError::Staging { place: self.place.clone(), source: error };
        }
        let behind = (0..self.place.ranks).filter(|rank| {
            let state = self.view.ranks.get(rank);
            state.is_none_or(|state| state.installed.is_none_or(|it| it < at_least))
        });
        ReplicaError::Deadline {
            place: self.place.clone(),
            at_least,
            behind: behind.take(8).collect(),
        }
    }
}

impl ReplicaError {
    /// Whether the session has ended, by whatever that was noticed: [`Replica::rejoin`] goes on from here.
    #[must_use]
    pub fn is_session_ended(&self) -> bool {
        match self {
            Self::Vanished { .. } => true,
            Self::Rendezvous(error) => matches!(error, RendezvousError::SessionEnded),
            Self::Source(error) => error.is_session_ended(),
            Self::Staging { source, .. } => source.is_session_ended(),
            _ => false,
        }
    }
}

impl From<SourceError> for ReplicaError {
    fn from(error: SourceError) -> Self {
        Self::Source(Box::new(error))
    }
}

/// Why a rank did not get where it was to go.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplicaError {
    /// The store could not be used.
    #[error(transparent)]
    Rendezvous(#[from] RendezvousError),
    /// What other ranks say cannot be used.
    #[error(transparent)]
    View(#[from] ViewError),
    /// What it would tell others is nothing that they would read.
    #[error(transparent)]
    Message(#[from] crate::message::MessageError),
    /// The rank is there already.
    #[error(
        "rank {} of replica `{}` is there already, as {}; if that is its former life, its entry vanishes with its session: \
         wait longer; if not, two processes were given one rank",
        place.rank, place.replica,
        holder.map_or_else(|| "something unreadable".to_owned(), |it| format!("incarnation {it:032x}"))
    )]
    Taken {
        /// The rank that joins.
        place: ReplicaRank,
        /// Who is there, if that can be read.
        holder: Option<u128>,
    },
    /// Another life of this rank has taken its place.
    #[error("rank {} of replica `{}` is another process by now; end this one", place.rank, place.replica)]
    Superseded {
        /// The rank.
        place: ReplicaRank,
    },
    /// What it had written is gone: it was stopped, or cut off, for longer than its session's time to live.
    #[error(
        "rank {} of replica `{}` has lost its session: it was silent for longer than the time to live; join again",
        place.rank, place.replica
    )]
    Vanished {
        /// The rank.
        place: ReplicaRank,
    },
    /// What it offers to others could not join again.
    #[error(transparent)]
    Source(Box<SourceError>),
    /// Nothing could be staged.
    #[error("rank {} of replica `{}` could not stage a version, and keeps what it has: {source}", place.rank, place.replica)]
    Staging {
        /// The rank.
        place: ReplicaRank,
        /// Why not.
        source: Box<RefreshError>,
    },
    /// Not all ranks got there in time.
    #[error(
        "replica `{}` did not reach version {at_least} in time: ranks {behind:?} have not; every rank keeps what it has \
         installed: have all of them refresh",
        place.replica
    )]
    Deadline {
        /// The rank that says so.
        place: ReplicaRank,
        /// What was wanted.
        at_least: u64,
        /// The first eight ranks that have not installed it.
        behind: Vec<u32>,
    },
    /// The live parameters are a mix.
    #[error(
        "rank {} of replica `{}` must not serve: {reason}; start its engine anew",
        place.rank, place.replica
    )]
    Invalid {
        /// The rank.
        place: ReplicaRank,
        /// What happened.
        reason: String,
    },
}
