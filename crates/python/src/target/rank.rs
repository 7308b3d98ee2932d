//! A target rank over whichever transport, staged or direct, that offers what it has read or does not.

mod in_place;
mod staged;

use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use refit::pool::{Memory, PoolOptions};
use refit::translate::{PostAction, TargetLayout};
use refit::transport::{Transport, TransportPool, TransportRegistrar, draw_incarnation};
use refit::{TargetOptions, allocate};
use refit_service::groups::Offer;
use refit_service::rank::{Direct, Shadow};
use refit_service::reader::{Reader, ReaderOptions, Refreshed};
use refit_service::relay::Relay;
use refit_service::rendezvous::RendezvousError;
use refit_service::source::{GroupRank, SourceOptions};
use refit_service::worker::Quarantine;

use crate::agent::{Agents, Begin};
use crate::desk::lock;
use crate::engine::Callbacks;
use crate::entry::Entered;
use crate::failure::Failure;
#[cfg(feature = "cuda")]
use crate::home::Home;
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
    /// Makes a version live, and joins again first where its session has ended.
    fn refresh(&mut self, at_least: u64, deadline: Instant) -> Result<u64, Failure>;

    /// For how long one attempt to read may go on from now on.
    fn set_attempt(&mut self, attempt: Duration);

    /// What was read last.
    fn read(&self) -> Option<&Refreshed>;

    /// What others offer.
    fn wait_for(
        &mut self,
        at_least: u64,
        deadline: Instant,
    ) -> Result<Option<Offer>, RendezvousError>;

    fn serving(&mut self) -> Option<u64>;

    /// Whether a refresh to what is live has nothing to do: this rank may answer for it, and no other has to come along.
    fn has_settled(&mut self) -> bool;

    fn figures(&self) -> Figures;

    fn leave(self: Box<Self>) -> Result<(), Failure>;
}

/// What makes a target, once there is a transport.
pub(super) struct Join {
    pub(super) entered: Entered,
    pub(super) actions: Vec<PostAction>,
    pub(super) mode: Mode,
    pub(super) engine: Callbacks,
    pub(super) options: ReaderOptions,
    /// How it treats those who read what it has read, if others may.
    pub(super) relay: Option<SourceOptions>,
    pub(super) live: Live,
}

impl Begin for Join {
    type Made = Box<dyn Reading>;

    fn over<T: Transport>(self, agents: Agents<T>) -> Result<Self::Made, Failure> {
        let Self { entered, actions, mode, engine, options, relay, live } = self;
        let Entered { seats, home, params, layout, group, ranks, ttl, within } = entered;
        let make = {
            let (home, layout) = (home.clone(), layout.clone());
            move |params: Vec<(String, Memory)>, actions: Vec<PostAction>| {
                let transport = agents()?;
                let registrar = TransportRegistrar::new(transport.clone());
                let pool = TransportPool::new(home.clone(), registrar, PoolOptions::default());
                let mut of = TargetLayout::from(layout.clone());
                of.post_actions = actions;
                let options = TargetOptions::default().with_lower(home.lowering());
                home.equip(refit::Target::new(transport, pool, of, params, options)?)
            }
        };
        let at = GroupRank { group, rank: layout.rank(), ranks };
        let name = format!("{}-{}", at.group, at.rank);
        let incarnation = draw_incarnation(&name)?;
        let seat = seats.take()?;
        let reader = Reader::new(seat.clone(), &name, incarnation, options)?;
        let deadline = Instant::now() + within;
        match mode {
            Mode::Direct => {
                let notes = engine.notes.clone();
                let direct = Direct::new(make(params, actions)?, engine);
                let join = in_place::Join { notes, reader, seats, replica: at.group.clone(), live };
                Ok(match relay {
                    None => join.with(direct),
                    Some(options) => join.with(Relay::join(seat, at, direct, options, deadline)?),
                })
            }
            Mode::Staged => {
                // A second set of parameters, from which nothing is derived, and another whenever a peer may still write it.
                let fresh = {
                    let (home, layout) = (home.clone(), layout.clone());
                    move || make(allocate(&layout, &home)?, Vec::new())
                };
                let kept = Quarantine::of_rank(&name, layout.bytes());
                let shadow = Shadow::new(fresh()?, params, actions, engine)?
                    .with_failover(kept, move |_| fresh().map_err(|it| it.to_string().into()));
                #[cfg(feature = "cuda")]
                let shadow = match &home {
                    Home::Host => shadow,
                    Home::Cuda(device) => shadow.with_device(device.clone()),
                };
                let join = staged::Join {
                    seat: seat.clone(),
                    seats,
                    at: at.clone(),
                    incarnation,
                    reader,
                    fresh: ttl / 2,
                    deadline,
                    live,
                };
                match relay {
                    None => join.with(shadow),
                    Some(options) => join.with(Relay::join(seat, at, shadow, options, deadline)?),
                }
            }
        }
    }
}

/// Does something that needs a session, and where that has ended, joins again and does it once more. It is tried again behind
/// the first time it joined, even at the deadline: a session may have ended long ago.
fn rejoining<S, O, E: Into<Failure>>(
    rank: &mut S,
    deadline: Instant,
    act: impl Fn(&mut S) -> Result<O, E>,
    is_session_ended: impl Fn(&E) -> bool,
    rejoin: impl Fn(&mut S) -> Result<(), Failure>,
) -> Result<O, Failure> {
    let mut rejoined = false;
    loop {
        let error = match act(rank) {
            Ok(output) => return Ok(output),
            Err(error) => error,
        };
        if !is_session_ended(&error) || (rejoined && Instant::now() >= deadline) {
            return Err(error.into());
        }
        rejoin(rank)?;
        rejoined = true;
    }
}
