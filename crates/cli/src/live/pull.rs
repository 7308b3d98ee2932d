//! `refit pull`: a target rank.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use refit::pool::PoolOptions;
use refit::translate::TargetLayout;
use refit::transport::{Transport, TransportPool, TransportRegistrar, draw_incarnation};
use refit::{RefitError, Target, TargetOptions};
use refit_service::rank::{Counted, Direct, Shadow};
use refit_service::reader::{Reader, ReaderOptions, Wanted};
use refit_service::relay::Relay;
use refit_service::rendezvous::{Rendezvous, RendezvousError};
use refit_service::replica::{Replica, ReplicaRank, Stage};
use refit_service::source::{GroupRank, SourceOptions};
use refit_service::worker::Quarantine;
use refit_service::{Reseat, Seat, Seats};

use super::args::{Common, Holding, PullArgs};
use super::cycle::{Alone, Cycle, Missed, Together};
use super::endpoint::Labels;
use super::rank::{Bystander, Holder};
use super::start::{self, Agents, House, Work};
use super::voice::Event;
use super::wakes::Stop;
use crate::error::CliError;

/// How long one look for an offer lasts, after which a stop is noticed.
const LOOK: Duration = Duration::from_millis(200);

/// How long a rank waits before it tries again what failed.
const PAUSE: Duration = Duration::from_millis(500);

/// For how long entries that are refused may be all there is.
const REFUSED: Duration = Duration::from_secs(2);

/// How long a rank that needs no more stays, for the others to see that it has installed what they have.
const LINGER: Duration = Duration::from_millis(500);

pub(crate) fn run(args: PullArgs) -> Result<ExitCode, CliError> {
    let (common, holding) = (args.common.clone(), args.holding());
    start::run(&common, || Ok(Pull { holding: holding?, args }))
}

#[derive(Debug)]
struct Pull {
    args: PullArgs,
    holding: Holding<TargetLayout>,
}

impl Work for Pull {
    fn common(&self) -> &Common {
        &self.args.common
    }

    fn labels(&self) -> Labels {
        let PullArgs { common: Common { job, rank, .. }, replica, .. } = &self.args;
        Labels { side: "target", job: job.clone(), name: replica.clone(), rank: *rank }
    }

    fn model(&self) -> String {
        self.holding.model.clone()
    }

    fn is_read(&self) -> bool {
        self.args.relay
    }

    fn demands(&self) -> (u64, u32) {
        (self.holding.layout.layout.bytes(), 64)
    }

    fn run<R: Rendezvous, T: Transport>(
        self,
        seats: Seats<R>,
        agents: Agents<T>,
        house: House,
    ) -> Result<(), CliError> {
        let Self { args, mut holding } = self;
        let stop = house.wakes.stop().of_ranks();
        holding.values.heed(stop.clone());
        let TargetLayout { layout, post_actions, .. } = holding.layout.clone();
        let staged = !args.paused;
        // A shadow is nobody's to derive from.
        let actions = if staged { Vec::new() } else { post_actions.clone() };
        let mut of_target = TargetLayout::from(layout.clone());
        of_target.post_actions = actions;
        let home = house.home.clone();
        // Each with an agent, a pool and parameters of its own.
        let make = move || {
            let transport = agents()?;
            let registrar = TransportRegistrar::new(transport.clone());
            let pool = TransportPool::new(home.clone(), registrar, PoolOptions::default());
            let options = TargetOptions::default().with_lower(home.lowering());
            let (params, guards) = home.guarded(&of_target.layout)?;
            let target = Target::new(transport, pool, of_target.clone(), params, options)?;
            Ok::<_, CliError>((home.equip(target)?, guards))
        };
        let (target, guards) = make()?;

        let (rank, ranks) = (layout.rank(), holding.ranks);
        let name = format!("{}-{rank}", args.replica);
        let reading = ReaderOptions::default()
            .with_lease(args.lease)
            // One that comes to nothing leaves time for another.
            .with_attempt(args.lease.min(args.common.deadline / 2))
            .with_fanout(args.fanout)
            .with_checks(args.digests.into());
        let incarnation = draw_incarnation(&name).map_err(RefitError::from)?;
        let seat = seats.take()?;
        let scout = Reader::new(seat.clone(), &format!("{name}-scout"), incarnation, reading)?;
        let reader = Reader::new(seat.clone(), &name, incarnation, reading)?;
        let bytes = layout.bytes();
        let pulling =
            Pulling { args, holding, seats, seat, scout, house, verified: 0, version: None };
        let joined = Event::Joined {
            side: "engine",
            name: pulling.args.replica.clone(),
            rank,
            ranks,
            bytes,
        };
        if staged {
            let (live, live_guards) = pulling.house.home.guarded(&layout)?;
            let kept = Quarantine::of_rank(&name, bytes);
            let shadow = Shadow::new(target, live, post_actions, Bystander)?
                .with_failover(kept, move |_| Ok(make()?.0))
                .with_stop(stop);
            #[cfg(feature = "cuda")]
            let shadow = match &pulling.house.home {
                crate::device::Home::Host => shadow,
                crate::device::Home::Cuda(gpu) => shadow.with_device(gpu.device().clone()),
            };
            let check = |pulling: &Pulling<R>| {
                live_guards.check(&pulling.house.home, &pulling.holding.layout.layout)
            };
            if pulling.args.relay {
                let relay = pulling.relay(shadow)?;
                pulling.staged(relay, reader, incarnation, &joined, check)
            } else {
                pulling.staged(shadow, reader, incarnation, &joined, check)
            }
        } else {
            let direct = Direct::new(target, Bystander).with_stop(stop);
            let check = |pulling: &Pulling<R>| {
                guards.check(&pulling.house.home, &pulling.holding.layout.layout)
            };
            if pulling.args.relay {
                let relay = pulling.relay(direct)?;
                pulling.paused(relay, reader, &joined, check)
            } else {
                pulling.paused(direct, reader, &joined, check)
            }
        }
    }
}

/// A target rank that goes from version to version.
#[derive(Debug)]
struct Pulling<R: Rendezvous> {
    args: PullArgs,
    holding: Holding<TargetLayout>,
    seats: Seats<R>,
    /// With its session everything that this rank is ends at once.
    seat: Seat<R>,
    /// Looks for offers, and reads none.
    scout: Reader<R>,
    house: House,
    verified: u64,
    version: Option<u64>,
}

impl<R: Rendezvous> Pulling<R> {
    fn relay<P>(&self, target: P) -> Result<Relay<R, P>, CliError>
    where
        P: Holder + refit_service::source::SourceRank,
    {
        let (rank, ranks) = (self.holding.layout.layout.rank(), self.holding.ranks);
        let group = GroupRank { group: self.args.replica.clone(), rank, ranks };
        let options = SourceOptions::default()
            .with_most_lease(self.args.lease)
            .with_drain(self.args.common.drain);
        let within = Instant::now() + self.args.common.deadline;
        Ok(Relay::join(self.seat.clone(), group, target, options, within)?)
    }

    fn staged<S: Stage + Holder + Reseat<R>>(
        mut self,
        stage: S,
        reader: Reader<R>,
        incarnation: u128,
        joined: &Event,
        check: impl Fn(&Self) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        let (rank, ranks) = (self.holding.layout.layout.rank(), self.holding.ranks);
        let place = ReplicaRank { replica: self.args.replica.clone(), rank, ranks };
        let Common { deadline, ttl, .. } = self.args.common;
        let seat = self.seat.clone();
        let within = Instant::now() + deadline;
        let replica = Replica::join(seat, place, incarnation, reader, stage, ttl / 2, within)?;
        self.house.voice.say(joined);
        let mut together = Together(replica);
        self.go_on(&mut together, check)?;
        together.0.leave()?;
        self.house.voice.say(&Event::Left { unreleased: 0 });
        Ok(())
    }

    fn paused<P: Holder + Reseat<R>>(
        mut self,
        rank: P,
        reader: Reader<R>,
        joined: &Event,
        check: impl Fn(&Self) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        self.house.voice.say(joined);
        let replica = self.args.replica.clone();
        let mut alone = Alone { rank, reader, replica, version: None };
        self.go_on(&mut alone, check)?;
        drop(alone);
        self.house.voice.say(&Event::Left { unreleased: 0 });
        Ok(())
    }

    /// Goes from version to version until there were enough, or it is told to stop.
    fn go_on<C: Cycle<R>>(
        &mut self,
        cycle: &mut C,
        check: impl Fn(&Self) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        let stop = self.house.wakes.stop();
        let (mut installed, mut newest, mut progress) = (0, None, Instant::now());
        loop {
            let at_least = self.version.map_or(0, |version| version.saturating_add(1));
            let offered = self.await_offer(at_least, &stop, progress, cycle);
            let began = Instant::now();
            let outcome = match offered {
                Ok(true) => {
                    let refreshed = cycle.refresh(at_least, began + self.args.common.deadline);
                    self.count(cycle);
                    refreshed
                }
                Ok(false) => {
                    self.house.voice.say(&Event::Leaving { reason: "told to stop" });
                    return Ok(());
                }
                Err(missed) => Err(missed),
            };
            let version = match outcome {
                // Cut short, or of no use any more: the next look leaves.
                Ok(_) | Err(Missed::Again(_) | Missed::Session) if stop.is_set() => continue,
                Ok(version) => version,
                Err(Missed::Fatal(error)) => return Err(error),
                Err(Missed::Again(error)) => {
                    self.tell(&error, progress)?;
                    continue;
                }
                Err(Missed::Session) => {
                    match self.rejoin(cycle) {
                        Ok(()) => {}
                        // The next look finds that it is not there still.
                        Err(Missed::Session) => thread::sleep(PAUSE),
                        Err(Missed::Again(error)) => self.tell(&error, progress)?,
                        Err(Missed::Fatal(error)) => return Err(error),
                    }
                    continue;
                }
            };
            let before = self.verified;
            match self.compare(version, cycle.holder()) {
                Err(CliError::Stopped) => continue,
                compared => compared?,
            }
            check(self)?;
            (self.version, progress) = (Some(version), Instant::now());
            // One that it had before it lost its session is not another.
            installed += u64::from(newest < Some(version));
            newest = newest.max(Some(version));
            let verified = self.verified;
            self.house.figures.update(|figures| {
                (figures.version, figures.verified_bytes) = (Some(version), verified);
            });
            self.house.voice.say(&Event::Installed {
                version,
                seconds: began.elapsed().as_secs_f64(),
                verified_bytes: verified - before,
            });
            if self.args.versions.is_some_and(|most| installed >= most) {
                self.house.voice.say(&Event::Leaving { reason: "installed all versions" });
                thread::sleep(LINGER);
                return Ok(());
            }
        }
    }

    /// Takes this rank's place again, under a session of its own.
    fn rejoin(&mut self, cycle: &mut impl Cycle<R>) -> Result<(), Missed> {
        let began = Instant::now();
        let seat = self.seats.take().map_err(|error| Missed::Again(error.into()))?;
        let version = cycle.rejoin(&seat, began + self.args.common.deadline)?;
        self.scout.reseat(seat.clone());
        (self.seat, self.version) = (seat, version);
        self.house.figures.update(|figures| figures.version = version);
        self.count(cycle);
        self.house.voice.say(&Event::Rejoined { seconds: began.elapsed().as_secs_f64() });
        Ok(())
    }

    /// Waits until something new is offered. `false`: told to stop.
    fn await_offer(
        &mut self,
        at_least: u64,
        stop: &Stop,
        progress: Instant,
        cycle: &mut impl Cycle<R>,
    ) -> Result<bool, Missed> {
        let wanted = Wanted::at_least(at_least).but_not_from(&self.args.replica);
        let began = Instant::now();
        loop {
            if stop.is_set() {
                return Ok(false);
            }
            if cycle.has_vanished() {
                return Err(Missed::Session);
            }
            let found = self.scout.wait_for(&wanted, Instant::now() + LOOK);
            if found.map_err(|error| Missed::Again(error.into()))?.is_some() {
                return Ok(true);
            }
            let late = progress.elapsed() > self.args.wait;
            if late || (at_least == 0 && began.elapsed() > REFUSED) {
                self.explain(late)?;
            }
        }
    }

    /// Says why nothing is offered: at once where it will not change by itself.
    fn explain(&mut self, late: bool) -> Result<(), Missed> {
        let again = |error: RendezvousError| Missed::Again(error.into());
        let groups = self.seats.model().groups().map_err(again)?;
        let listed = self.seats.store().list(&groups).map_err(again)?;
        if let Some((key, source)) = listed.refused.first_key_value()
            && listed.entries.is_empty()
        {
            let refused = listed.refused.len();
            return Err(Missed::Fatal(CliError::Mismatch(format!(
                "nothing that is offered can be trusted: {refused} entries are refused, `{key}` because {source}"
            ))));
        }
        if !late {
            return Ok(());
        }
        let census = self.scout.look().map_err(again)?;
        let why: Vec<String> = census
            .withheld
            .iter()
            .filter(|(group, _)| **group != self.args.replica)
            .map(|(group, why)| format!("group `{group}` offers nothing: {why}"))
            .collect();
        let why =
            if why.is_empty() { "nobody offers anything new".to_owned() } else { why.join("; ") };
        let wait = self.args.wait;
        Err(Missed::Fatal(CliError::Mismatch(format!(
            "nothing new could be read for {wait:?} (--wait): {why}"
        ))))
    }

    /// Takes in what an attempt came to.
    fn count(&self, cycle: &impl Cycle<R>) {
        let (holder, service, pool) = (cycle.holder(), cycle.stats(), cycle.holder().pool_stats());
        let (pulls, relay) = (holder.totals(), holder.offering());
        self.house.figures.update(|figures| {
            (figures.service, figures.relay) = (service, relay);
            (figures.pulls, figures.pool) = (pulls, pool);
            figures.parameter_bytes = self.holding.layout.layout.bytes();
        });
    }

    /// Compares every byte with what this version is to be.
    fn compare(&mut self, version: u64, holder: &impl Holder) -> Result<(), CliError> {
        if self.args.no_verify {
            return Ok(());
        }
        let live = holder.live();
        let live = live.ok_or_else(|| CliError::Mismatch("the parameters are a mix".to_owned()))?;
        let (home, layout) = (&self.house.home, &self.holding.layout.layout);
        let threads = self.holding.threads;
        let values = self.holding.values.renewed()?;
        self.verified += values.verify(home, layout, live, version, threads)?;
        Ok(())
    }

    /// Tells a failure, unless it has lasted for too long, and waits a little.
    fn tell(&self, error: &CliError, progress: Instant) -> Result<(), CliError> {
        self.house.figures.update(|figures| figures.failures += 1);
        if progress.elapsed() > self.args.wait {
            let wait = self.args.wait;
            return Err(CliError::Mismatch(format!(
                "nothing new could be read for {wait:?} (--wait); the last time: {error}"
            )));
        }
        self.house.voice.say(&Event::Failed { error: error.to_string() });
        thread::sleep(PAUSE);
        Ok(())
    }
}
