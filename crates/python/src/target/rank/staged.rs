//! A rank that reads beside its live parameters, and installs together with the others of its replica.

use std::time::{Duration, Instant};

use refit::transport::draw_incarnation;
use refit_service::groups::Offer;
use refit_service::rank::Counted;
use refit_service::reader::{Reader, Refreshed};
use refit_service::rendezvous::RendezvousError;
use refit_service::replica::{Replica, ReplicaError, ReplicaRank, Stage};
use refit_service::source::GroupRank;
use refit_service::{Reseat, Seat, Seats};

use super::{Live, Reading, rejoining};
use crate::entry::Meeting;
use crate::failure::{Failure, Kind};
use crate::report::Figures;

/// What makes it, besides what stages.
pub(super) struct Join {
    pub(super) seat: Seat<Meeting>,
    pub(super) seats: Seats<Meeting>,
    pub(super) at: GroupRank,
    pub(super) incarnation: u128,
    pub(super) reader: Reader<Meeting>,
    /// For how long a look at the store may be believed.
    pub(super) fresh: Duration,
    pub(super) deadline: Instant,
    pub(super) live: Live,
}

impl Join {
    pub(super) fn with<S>(self, stage: S) -> Result<Box<dyn Reading>, Failure>
    where
        S: Stage + Counted + Reseat<Meeting> + Send + 'static,
    {
        let Self { seat, seats, at, incarnation, reader, fresh, deadline, live } = self;
        let GroupRank { group: replica, rank, ranks } = at;
        let at = ReplicaRank { replica, rank, ranks };
        let joined = Replica::join(seat, at, incarnation, reader, stage, fresh, deadline)?;
        Ok(Box::new(Staged { joined, seats, ranks, live }))
    }
}

#[derive(Debug)]
struct Staged<S: Stage> {
    joined: Replica<Meeting, S>,
    seats: Seats<Meeting>,
    ranks: u32,
    live: Live,
}

impl<S: Stage + Reseat<Meeting>> Staged<S> {
    /// Takes this rank's place again, as another life of it.
    fn rejoin(&mut self, deadline: Instant) -> Result<(), Failure> {
        let incarnation = draw_incarnation("replica")?;
        Ok(self.joined.rejoin(self.seats.take()?, incarnation, deadline)?)
    }

    fn catch_up(&mut self, at_least: u64, deadline: Instant) -> Result<u64, Failure> {
        let refresh = |it: &mut Self| it.joined.refresh(at_least, deadline);
        let rejoin = |it: &mut Self| it.rejoin(deadline);
        let ready = rejoining(self, deadline, refresh, ReplicaError::is_session_ended, rejoin)?;
        Ok(ready.version)
    }
}

impl<S: Stage + Counted + Reseat<Meeting> + Send> Reading for Staged<S> {
    fn refresh(&mut self, at_least: u64, deadline: Instant) -> Result<u64, Failure> {
        let version = self.catch_up(at_least, deadline);
        let invalid = version.as_ref().is_err_and(|error| error.is(Kind::InvalidTarget));
        self.live.set(self.joined.installed().filter(|_| !invalid));
        version
    }

    fn set_attempt(&mut self, attempt: Duration) {
        self.joined.set_attempt(attempt);
    }

    fn read(&self) -> Option<&Refreshed> {
        self.joined.read()
    }

    fn wait_for(
        &mut self,
        at_least: u64,
        deadline: Instant,
    ) -> Result<Option<Offer>, RendezvousError> {
        self.joined.wait_for(at_least, deadline)
    }

    fn serving(&mut self) -> Option<u64> {
        self.joined.serving()
    }

    fn has_settled(&mut self) -> bool {
        self.ranks == 1 && self.joined.serving().is_some()
    }

    fn figures(&self) -> Figures {
        let stage = self.joined.stage();
        let (service, relay) = (self.joined.stats(), stage.offering());
        Figures { service, relay, pulls: stage.totals(), pool: stage.pool_stats() }
    }

    fn leave(self: Box<Self>) -> Result<(), Failure> {
        Ok(self.joined.leave().map(drop)?)
    }
}
