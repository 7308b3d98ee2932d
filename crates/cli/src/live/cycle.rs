//! How a target rank goes from one version to the next: together with the other ranks of its replica, or on its own.

use std::fmt;
use std::time::Instant;

use refit::RefitError;
use refit::transport::draw_incarnation;
use refit_service::puller::Cause;
use refit_service::reader::{Attempt, Ended, Reader, RefreshError, Wanted};
use refit_service::rendezvous::Rendezvous;
use refit_service::replica::{Replica, ReplicaError, Stage};
use refit_service::{Reseat, Seat, ServiceStats};

use super::rank::Holder;
use crate::error::CliError;

/// Why a version was not installed.
#[derive(Debug)]
pub(super) enum Missed {
    /// Trying again may help.
    Again(CliError),
    /// The session has ended: the rank has to join again first.
    Session,
    Fatal(CliError),
}

/// A rank that goes from version to version.
pub(super) trait Cycle<R: Rendezvous>: fmt::Debug {
    type Holder: Holder;

    /// Reads and installs a version from this one on.
    fn refresh(&mut self, at_least: u64, deadline: Instant) -> Result<u64, Missed>;

    /// Whether its session has ended, as far as that shows.
    fn has_vanished(&mut self) -> bool;

    /// Goes on under another session. Gives back the version that it still answers for.
    fn rejoin(&mut self, seat: &Seat<R>, deadline: Instant) -> Result<Option<u64>, Missed>;

    fn holder(&self) -> &Self::Holder;

    fn stats(&self) -> ServiceStats;
}

/// One rank of a replica, which installs when all others can.
#[derive(Debug)]
pub(super) struct Together<R: Rendezvous, S: Stage>(pub(super) Replica<R, S>);

impl<R: Rendezvous, S: Stage + Holder + Reseat<R>> Cycle<R> for Together<R, S> {
    type Holder = S;

    fn refresh(&mut self, at_least: u64, deadline: Instant) -> Result<u64, Missed> {
        let error = match self.0.refresh(at_least, deadline) {
            Ok(ready) => return Ok(ready.version),
            Err(error) => error,
        };
        match (&error, self.0.installed()) {
            // Others were waited for, who may have left meanwhile.
            (ReplicaError::Deadline { .. }, Some(version)) if version >= at_least => Ok(version),
            _ => Err(of_replica(error)),
        }
    }

    fn has_vanished(&mut self) -> bool {
        self.0.has_vanished()
    }

    fn rejoin(&mut self, seat: &Seat<R>, deadline: Instant) -> Result<Option<u64>, Missed> {
        let incarnation = draw_incarnation("replica").map_err(RefitError::from);
        let incarnation = incarnation.map_err(|error| Missed::Fatal(error.into()))?;
        self.0.rejoin(seat.clone(), incarnation, deadline).map_err(of_replica)?;
        Ok(self.0.installed())
    }

    fn holder(&self) -> &S {
        self.0.stage()
    }

    fn stats(&self) -> ServiceStats {
        self.0.stats()
    }
}

/// A rank that reads into its live parameters, whatever others do.
#[derive(Debug)]
pub(super) struct Alone<R: Rendezvous, P: Holder> {
    pub(super) rank: P,
    pub(super) reader: Reader<R>,
    /// What a relay of its own is called.
    pub(super) replica: String,
    pub(super) version: Option<u64>,
}

impl<R: Rendezvous, P: Holder + Reseat<R>> Cycle<R> for Alone<R, P> {
    type Holder = P;

    fn refresh(&mut self, at_least: u64, deadline: Instant) -> Result<u64, Missed> {
        let wanted = Wanted::at_least(at_least).but_not_from(&self.replica);
        let refreshed = self.reader.refresh(&mut self.rank, &wanted, deadline);
        let version = refreshed.map_err(|error| of_refresh(*error))?.version;
        self.version = Some(version);
        Ok(version)
    }

    /// Nobody looks for it: it finds out when it takes a lease.
    fn has_vanished(&mut self) -> bool {
        false
    }

    fn rejoin(&mut self, seat: &Seat<R>, deadline: Instant) -> Result<Option<u64>, Missed> {
        // First: a reader whose session has ended says so when this did not work.
        self.rank.reseat(seat, deadline).map_err(|error| of_replica(error.into()))?;
        self.reader.reseat(seat.clone());
        Ok(self.version)
    }

    fn holder(&self) -> &P {
        &self.rank
    }

    fn stats(&self) -> ServiceStats {
        *self.reader.stats()
    }
}

fn of_replica(error: ReplicaError) -> Missed {
    if error.is_session_ended() {
        return Missed::Session;
    }
    match error {
        ReplicaError::Staging { ref source, .. } if hopeless(source) => Missed::Fatal(error.into()),
        ReplicaError::Staging { .. }
        | ReplicaError::Deadline { .. }
        | ReplicaError::Rendezvous(_) => Missed::Again(error.into()),
        _ => Missed::Fatal(error.into()),
    }
}

fn of_refresh(error: RefreshError) -> Missed {
    if error.is_session_ended() {
        Missed::Session
    } else if hopeless(&error) {
        Missed::Fatal(Box::new(error).into())
    } else {
        Missed::Again(Box::new(error).into())
    }
}

/// Whether trying again is of no use: reads cannot be watched any more, or whatever was tried cannot be joined.
fn hopeless(error: &RefreshError) -> bool {
    let refused = |attempt: &Attempt| attempt.failure.cause == Cause::Refused;
    matches!(error.ended, Ended::Lost(_))
        || (!error.attempts.is_empty() && error.attempts.iter().all(refused))
}
