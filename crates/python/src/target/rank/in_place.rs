//! A rank that reads into its live parameters, whatever others do.

use std::time::{Duration, Instant};

use refit::transport::Transport;
use refit_service::groups::Offer;
use refit_service::puller::{Cause, PullFailure, Puller, Reading as Version};
use refit_service::rank::Direct;
use refit_service::reader::{Reader, Refreshed, Wanted};
use refit_service::rendezvous::RendezvousError;

use super::{Live, Reading};
use crate::engine::{Callbacks, Notes};
use crate::failure::Failure;
use crate::place::{Meeting, Place};
use crate::report::Figures;

/// What makes it, besides what reads.
pub(super) struct Join {
    pub(super) notes: Notes,
    pub(super) reader: Reader<Meeting>,
    pub(super) place: Place,
    pub(super) replica: String,
    pub(super) live: Live,
}

impl Join {
    pub(super) fn with<T: Transport>(self, direct: Direct<T, Callbacks>) -> Box<dyn Reading> {
        let Self { notes, reader, place, replica, live } = self;
        Box::new(InPlace { direct, notes, reader, place, replica, live, rejoins: 0 })
    }
}

#[derive(Debug)]
struct InPlace<T: Transport> {
    direct: Direct<T, Callbacks>,
    notes: Notes,
    reader: Reader<Meeting>,
    place: Place,
    replica: String,
    live: Live,
    /// Times its session had ended.
    rejoins: u64,
}

/// A target whose refresh ends when a callback has raised: trying again would call it again.
#[derive(Debug)]
struct Prompt<'a, T: Transport> {
    direct: &'a mut Direct<T, Callbacks>,
    notes: &'a Notes,
    live: &'a Live,
}

impl<T: Transport> Puller for Prompt<'_, T> {
    fn pull(&mut self, reading: &Version<'_>, deadline: Instant) -> Result<(), PullFailure> {
        // From here on they may be a mix; what they are in the end, the refresh says.
        self.live.set(None);
        self.direct.pull(reading, deadline).map_err(|failure| {
            // The one cause that a reader does not try again after; what is raised in the end is the callback's error.
            let cause = if self.notes.has_raised() { Cause::Lost } else { failure.cause };
            PullFailure { cause, ..failure }
        })
    }

    fn make_ready(&mut self, group: &str, deadline: Instant) -> Result<(), PullFailure> {
        self.direct.make_ready(group, deadline)
    }

    fn quarantined_bytes(&self) -> u64 {
        self.direct.quarantined_bytes()
    }
}

impl<T: Transport> InPlace<T> {
    /// Nothing that its own ranks offer.
    fn wanted(&self, at_least: u64) -> Wanted {
        Wanted { not_from: Some(self.replica.clone()), ..Wanted::at_least(at_least) }
    }

    fn rejoin(&mut self) -> Result<(), Failure> {
        let seat = self.place.seat()?;
        // Nobody else has this rank's place: only readers' leases were kept by the session.
        self.reader.reseat(seat);
        self.rejoins += 1;
        Ok(())
    }

    fn catch_up(&mut self, at_least: u64, deadline: Instant) -> Result<Refreshed, Failure> {
        let wanted = self.wanted(at_least);
        let mut rejoined = false;
        loop {
            let Self { direct, notes, live, reader, .. } = self;
            let error = match reader.refresh(&mut Prompt { direct, notes, live }, &wanted, deadline)
            {
                Ok(refreshed) => return Ok(refreshed),
                Err(error) => error,
            };
            if !error.is_session_ended() || (rejoined && Instant::now() >= deadline) {
                return Err(error.into());
            }
            self.rejoin()?;
            rejoined = true;
        }
    }
}

impl<T: Transport> Reading for InPlace<T> {
    fn refresh(&mut self, at_least: u64, deadline: Instant) -> Result<u64, Failure> {
        let was = self.live.version();
        let read = self.catch_up(at_least, deadline);
        self.live.set(self.direct.version());
        match read {
            Ok(refreshed) => Ok(refreshed.version),
            Err(failure) => {
                // What was whole before is a mix now, unless nothing was read.
                let mixed = was.is_some() && self.direct.version().is_none();
                Err(if mixed { failure.leaving_a_mix() } else { failure })
            }
        }
    }

    fn set_attempt(&mut self, attempt: Duration) {
        self.reader.set_attempt(attempt);
    }

    fn wait_for(
        &mut self,
        at_least: u64,
        deadline: Instant,
    ) -> Result<Option<Offer>, RendezvousError> {
        self.reader.wait_for(&self.wanted(at_least), deadline)
    }

    fn serving(&mut self) -> Option<u64> {
        self.direct.version()
    }

    fn has_settled(&mut self) -> bool {
        true
    }

    fn figures(&self) -> Figures {
        let (mut service, pulls) = (*self.reader.stats(), *self.direct.totals());
        service.rejoins = self.rejoins;
        Figures { service, pulls, pool: self.direct.pool_stats() }
    }

    fn leave(self: Box<Self>) -> Result<(), Failure> {
        Ok(())
    }
}
