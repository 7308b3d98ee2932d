//! A rank that reads into its live parameters, whatever others do.

use std::time::{Duration, Instant};

use refit::transport::Transport;
use refit_service::groups::Offer;
use refit_service::puller::{Cause, PullFailure, Puller, Reading as Version};
use refit_service::rank::{Counted, Direct};
use refit_service::reader::{Reader, Refreshed, Wanted};
use refit_service::relay::Relay;
use refit_service::rendezvous::RendezvousError;
use refit_service::{Reseat, Seats};

use super::{Live, Reading, rejoining};
use crate::engine::{Callbacks, Notes};
use crate::entry::Meeting;
use crate::failure::Failure;
use crate::report::Figures;

/// What holds the live parameters.
pub(super) trait Holder: Puller + Counted + Reseat<Meeting> + Send {
    /// The version that is whole there.
    fn version(&self) -> Option<u64>;
}

impl<T: Transport> Holder for Direct<T, Callbacks> {
    fn version(&self) -> Option<u64> {
        Self::version(self)
    }
}

impl<T: Transport> Holder for Relay<Meeting, Direct<T, Callbacks>> {
    fn version(&self) -> Option<u64> {
        self.target().and_then(Direct::version)
    }
}

/// What makes it, besides its holder.
pub(super) struct Join {
    pub(super) notes: Notes,
    pub(super) reader: Reader<Meeting>,
    pub(super) seats: Seats<Meeting>,
    pub(super) replica: String,
    pub(super) live: Live,
}

impl Join {
    pub(super) fn with<P: Holder + 'static>(self, holder: P) -> Box<dyn Reading> {
        let Self { notes, reader, seats, replica, live } = self;
        Box::new(InPlace { holder, notes, reader, seats, replica, live, read: None })
    }
}

#[derive(Debug)]
struct InPlace<P> {
    holder: P,
    notes: Notes,
    reader: Reader<Meeting>,
    seats: Seats<Meeting>,
    replica: String,
    live: Live,
    /// What was read last.
    read: Option<Refreshed>,
}

/// A holder whose refresh ends when a callback has raised: trying again would call it again.
#[derive(Debug)]
struct Prompt<'a, P> {
    holder: &'a mut P,
    notes: &'a Notes,
    live: &'a Live,
}

impl<P: Puller> Puller for Prompt<'_, P> {
    fn pull(&mut self, reading: &Version<'_>, deadline: Instant) -> Result<(), PullFailure> {
        // From here on they may be a mix; what they are in the end, the refresh says.
        self.live.set(None);
        self.holder.pull(reading, deadline).map_err(|failure| {
            // The one cause that a reader does not try again after; what is raised in the end is the callback's error.
            let cause = if self.notes.has_raised() { Cause::Lost } else { failure.cause };
            PullFailure { cause, ..failure }
        })
    }

    fn make_ready(&mut self, group: &str, deadline: Instant) -> Result<(), PullFailure> {
        self.holder.make_ready(group, deadline)
    }

    fn quarantined_bytes(&self) -> u64 {
        self.holder.quarantined_bytes()
    }
}

impl<P: Holder> InPlace<P> {
    fn wanted(&self, at_least: u64) -> Wanted {
        Wanted::at_least(at_least).but_not_from(&self.replica)
    }

    fn rejoin(&mut self, deadline: Instant) -> Result<(), Failure> {
        let seat = self.seats.take()?;
        // First: a reader whose session has ended says so when this did not work.
        self.holder.reseat(&seat, deadline)?;
        self.reader.reseat(seat);
        Ok(())
    }

    fn catch_up(&mut self, at_least: u64, deadline: Instant) -> Result<Refreshed, Failure> {
        let wanted = self.wanted(at_least);
        let read = |it: &mut Self| {
            let Self { holder, notes, live, reader, .. } = it;
            reader.refresh(&mut Prompt { holder, notes, live }, &wanted, deadline)
        };
        let rejoin = |it: &mut Self| it.rejoin(deadline);
        rejoining(self, deadline, read, |error| error.is_session_ended(), rejoin)
    }
}

impl<P: Holder> Reading for InPlace<P> {
    fn refresh(&mut self, at_least: u64, deadline: Instant) -> Result<u64, Failure> {
        let was = self.live.version();
        let read = self.catch_up(at_least, deadline);
        self.live.set(self.holder.version());
        match read {
            Ok(refreshed) => Ok(self.read.insert(refreshed).version),
            Err(failure) => {
                // What was whole before is a mix now, unless nothing was read.
                let mixed = was.is_some() && self.holder.version().is_none();
                Err(if mixed { failure.leaving_a_mix() } else { failure })
            }
        }
    }

    fn set_attempt(&mut self, attempt: Duration) {
        self.reader.set_attempt(attempt);
    }

    fn read(&self) -> Option<&Refreshed> {
        self.read.as_ref()
    }

    fn wait_for(
        &mut self,
        at_least: u64,
        deadline: Instant,
    ) -> Result<Option<Offer>, RendezvousError> {
        self.reader.wait_for(&self.wanted(at_least), deadline)
    }

    fn serving(&mut self) -> Option<u64> {
        self.holder.version()
    }

    fn has_settled(&mut self) -> bool {
        true
    }

    fn figures(&self) -> Figures {
        let (service, relay) = (*self.reader.stats(), self.holder.offering());
        Figures { service, relay, pulls: self.holder.totals(), pool: self.holder.pool_stats() }
    }

    fn leave(self: Box<Self>) -> Result<(), Failure> {
        Ok(())
    }
}
