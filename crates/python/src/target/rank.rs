//! A target rank over whichever transport, staged or direct.

use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use refit::planner::RankLayout;
use refit::pool::{Memory, PoolOptions};
use refit::translate::{PostAction, TargetLayout};
use refit::transport::{Transport, TransportPool, TransportRegistrar, draw_incarnation};
use refit::{TargetOptions, allocate};
use refit_service::puller::{Cause, PullFailure, Puller, Reading as Version};
use refit_service::rank::{Direct, Shadow};
use refit_service::reader::{Reader, ReaderOptions, Wanted};
use refit_service::replica::{Replica, ReplicaRank};

use crate::agent::Begin;
use crate::desk::lock;
use crate::engine::{Callbacks, Notes};
use crate::failure::{Failure, Kind};
use crate::home::Home;
use crate::place::{Meeting, Place};
use crate::report::Figures;

/// Whether parameters are read into beside the live ones, or in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Staged,
    Direct,
}

/// The version that is live and whole, for whoever must not wait for a refresh: a callback of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Live(Arc<Mutex<Option<u64>>>);

impl Live {
    pub(super) fn version(&self) -> Option<u64> {
        *lock(&self.0)
    }

    fn set(&self, version: Option<u64>) {
        *lock(&self.0) = version;
    }
}

/// A target.
pub(super) trait Reading: Send + Debug {
    /// Makes a version live.
    fn refresh(&mut self, at_least: u64, deadline: Instant) -> Result<u64, Failure>;

    /// The version and the group of what is on offer.
    fn wait_for(
        &mut self,
        at_least: u64,
        deadline: Instant,
    ) -> Result<Option<(u64, String)>, Failure>;

    fn serving(&mut self) -> Option<u64>;

    /// Whether no other rank has to come along.
    fn is_alone(&self) -> bool;

    fn figures(&self) -> Figures;

    fn leave(self: Box<Self>) -> Result<(), Failure>;
}

/// What makes a target, once there is a transport.
pub(super) struct Join {
    pub(super) place: Place,
    pub(super) home: Home,
    pub(super) params: Vec<(String, Memory)>,
    pub(super) layout: RankLayout,
    pub(super) actions: Vec<PostAction>,
    pub(super) replica: String,
    pub(super) ranks: u32,
    pub(super) mode: Mode,
    pub(super) engine: Callbacks,
    pub(super) options: ReaderOptions,
    pub(super) fresh: Duration,
    pub(super) deadline: Instant,
    pub(super) live: Live,
}

impl Begin for Join {
    type Made = Box<dyn Reading>;

    fn over<T: Transport>(self, transport: Arc<T>) -> Result<Self::Made, Failure> {
        let Self { place, home, params, layout, actions, replica, ranks, live, engine, .. } = self;
        let registrar = TransportRegistrar::new(transport.clone());
        let pool = TransportPool::new(home.clone(), registrar, PoolOptions::default());
        let lowering = TargetOptions::default().with_lower(home.lowering());
        let target = |params, actions: Vec<PostAction>| {
            let mut of = TargetLayout::from(layout.clone());
            of.post_actions = actions;
            let target = refit::Target::new(transport, pool.clone(), of, params, lowering)?;
            home.equip(target)
        };
        let rank = layout.rank();
        let name = format!("{replica}-{rank}");
        let incarnation = draw_incarnation(&name)?;
        let seat = place.seat()?;
        let reader = |name: &str| Reader::new(seat.clone(), name, incarnation, self.options);
        let scout = reader(&format!("{name}-scout"))?;
        let reader = reader(&name)?;
        match self.mode {
            Mode::Direct => {
                let notes = engine.notes.clone();
                let direct = Direct::new(target(params, actions)?, engine);
                Ok(Box::new(InPlace { direct, notes, reader, scout, place, pool, replica, live }))
            }
            Mode::Staged => {
                // Nothing is derived from a shadow.
                let shadow = target(allocate(&layout, &home)?, Vec::new())?;
                let shadow = Shadow::new(shadow, params, actions, engine)?;
                #[cfg(feature = "cuda")]
                let shadow = match &home {
                    Home::Host => shadow,
                    Home::Cuda(device) => shadow.with_device(device.clone()),
                };
                let at = ReplicaRank { replica: replica.clone(), rank, ranks };
                let joined = Replica::join(
                    seat,
                    at,
                    incarnation,
                    reader,
                    shadow,
                    self.fresh,
                    self.deadline,
                )?;
                Ok(Box::new(Staged { joined, scout, pool, replica, ranks, live }))
            }
        }
    }
}

/// What a replica wants: not what it offers itself.
fn wanted(replica: &str, at_least: u64) -> Wanted {
    let mut wanted = Wanted::at_least(at_least);
    wanted.not_from = Some(replica.to_owned());
    wanted
}

fn wait_for(
    scout: &mut Reader<Meeting>,
    replica: &str,
    at_least: u64,
    deadline: Instant,
) -> Result<Option<(u64, String)>, Failure> {
    let offer = scout.wait_for(&wanted(replica, at_least), deadline)?;
    Ok(offer.map(|offer| (offer.version, offer.group)))
}

#[derive(Debug)]
struct InPlace<T: Transport> {
    direct: Direct<T, Callbacks>,
    notes: Notes,
    reader: Reader<Meeting>,
    scout: Reader<Meeting>,
    place: Place,
    pool: TransportPool<T>,
    replica: String,
    live: Live,
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

impl<T: Transport> Reading for InPlace<T> {
    fn refresh(&mut self, at_least: u64, deadline: Instant) -> Result<u64, Failure> {
        let wanted = wanted(&self.replica, at_least);
        let was = self.live.version();
        let mut direct = Prompt { direct: &mut self.direct, notes: &self.notes, live: &self.live };
        let mut read = self.reader.refresh(&mut direct, &wanted, deadline);
        if read.as_ref().is_err_and(|error| error.is_session_ended()) {
            // Nobody else has this rank's place: only readers' leases were kept by the session.
            let seat = self.place.seat()?;
            self.reader.reseat(seat.clone());
            self.scout.reseat(seat);
            read = self.reader.refresh(&mut direct, &wanted, deadline);
        }
        self.live.set(self.direct.version());
        match read {
            Ok(refreshed) => Ok(refreshed.version),
            Err(error) => {
                let failure = Failure::from(error);
                // What was whole before is a mix now, unless nothing was read.
                let mixed = was.is_some() && self.direct.version().is_none();
                Err(if mixed { failure.leaving_a_mix() } else { failure })
            }
        }
    }

    fn wait_for(
        &mut self,
        at_least: u64,
        deadline: Instant,
    ) -> Result<Option<(u64, String)>, Failure> {
        wait_for(&mut self.scout, &self.replica, at_least, deadline)
    }

    fn serving(&mut self) -> Option<u64> {
        self.direct.version()
    }

    fn is_alone(&self) -> bool {
        true
    }

    fn figures(&self) -> Figures {
        let (service, pulls) = (*self.reader.stats(), *self.direct.totals());
        Figures { service, pulls, pool: self.pool.stats() }
    }

    fn leave(self: Box<Self>) -> Result<(), Failure> {
        Ok(())
    }
}

#[derive(Debug)]
struct Staged<T: Transport> {
    joined: Replica<Meeting, Shadow<T, Callbacks>>,
    scout: Reader<Meeting>,
    pool: TransportPool<T>,
    replica: String,
    ranks: u32,
    live: Live,
}

impl<T: Transport> Reading for Staged<T> {
    fn refresh(&mut self, at_least: u64, deadline: Instant) -> Result<u64, Failure> {
        let ready = self.joined.refresh(at_least, deadline);
        let version = ready.map(|ready| ready.version).map_err(Failure::from);
        let invalid = version.as_ref().is_err_and(|error| error.is(Kind::InvalidTarget));
        self.live.set(self.joined.installed().filter(|_| !invalid));
        version
    }

    fn wait_for(
        &mut self,
        at_least: u64,
        deadline: Instant,
    ) -> Result<Option<(u64, String)>, Failure> {
        wait_for(&mut self.scout, &self.replica, at_least, deadline)
    }

    fn serving(&mut self) -> Option<u64> {
        self.joined.serving()
    }

    fn is_alone(&self) -> bool {
        self.ranks == 1
    }

    fn figures(&self) -> Figures {
        let pulls = *self.joined.stage().totals();
        Figures { service: self.joined.stats(), pulls, pool: self.pool.stats() }
    }

    fn leave(self: Box<Self>) -> Result<(), Failure> {
        self.joined.leave().map(drop).map_err(Failure::from)
    }
}
