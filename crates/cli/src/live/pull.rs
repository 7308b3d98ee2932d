//! `refit pull`: a target rank.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use refit::pool::PoolOptions;
use refit::translate::TargetLayout;
use refit::transport::{Transport, TransportPool, TransportRegistrar, draw_incarnation};
use refit::{RefitError, Target, TargetOptions};
use refit_service::puller::Cause;
use refit_service::rank::{Direct, Shadow};
use refit_service::reader::{Ended, Reader, ReaderOptions, RefreshError, Wanted};
use refit_service::relay::Relay;
use refit_service::rendezvous::{Rendezvous, RendezvousError};
use refit_service::replica::{Replica, ReplicaError, ReplicaRank, Stage};
use refit_service::source::{GroupRank, SourceOptions};
use refit_service::worker::Quarantine;
use refit_service::{Seat, ServiceStats};

use super::args::{Common, Holding, PullArgs};
use super::endpoint::Labels;
use super::place::Place;
use super::rank::{Bystander, Holder};
use super::start::{self, Agents, House, Work};
use super::voice::Event;
use super::wakes::Stop;
use crate::error::CliError;

/// How long one look for an offer lasts, after which a stop is noticed.
const LOOK: Duration = Duration::from_millis(200);

/// For how long entries that are refused may be all there is.
const REFUSED: Duration = Duration::from_secs(2);

/// How many times its parameters silent peers may keep from a rank that reads beside its live ones.
const KEPT: u64 = 4;

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
        place: Place<R>,
        agents: Agents<T>,
        house: House,
    ) -> Result<(), CliError> {
        let Self { args, holding } = self;
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
        let seat = place.seat()?;
        let scout = Reader::new(seat.clone(), &format!("{name}-scout"), incarnation, reading)?;
        let reader = Reader::new(seat.clone(), &name, incarnation, reading)?;
        let bytes = layout.bytes();
        let pulling =
            Pulling { args, holding, place, seat, scout, house, verified: 0, version: None };
        let joined = Event::Joined {
            side: "engine",
            name: pulling.args.replica.clone(),
            rank,
            ranks,
            bytes,
        };
        if staged {
            let (live, live_guards) = pulling.house.home.guarded(&layout)?;
            let kept = Quarantine::new(&name, bytes.saturating_mul(KEPT));
            let shadow = Shadow::new(target, live, post_actions, Bystander)?
                .with_failover(kept, move |_| Ok(make()?.0));
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
            let direct = Direct::new(target, Bystander);
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
    place: Place<R>,
    /// With its session everything that this rank is ends at once.
    seat: Seat<R>,
    /// Looks for offers, and reads none.
    scout: Reader<R>,
    house: House,
    verified: u64,
    version: Option<u64>,
}

/// Why a version was not installed.
enum Missed {
    /// Trying again may help.
    Again(CliError),
    Fatal(CliError),
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

    fn staged<S: Stage + Holder>(
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
        let mut replica = Replica::join(seat, place, incarnation, reader, stage, ttl / 2, within)?;
        self.house.voice.say(joined);
        self.go_on(|pulling, at_least| {
            let outcome = replica.refresh(at_least, Instant::now() + deadline);
            let version = match outcome {
                Ok(ready) => Ok(ready.version),
                Err(error) => match replica.installed() {
                    // Others were waited for, who may have left meanwhile.
                    Some(version)
                        if version >= at_least
                            && matches!(error, ReplicaError::Deadline { .. }) =>
                    {
                        Ok(version)
                    }
                    _ => Err(of_replica(error)),
                },
            };
            let stage = replica.stage();
            pulling.ended(version, stage, replica.stats())?.map_or(Ok(None), |version| {
                pulling
                    .compare(version, stage)
                    .and_then(|()| check(pulling))
                    .map_err(Missed::Fatal)?;
                Ok(Some(version))
            })
        })?;
        replica.leave()?;
        self.house.voice.say(&Event::Left { unreleased: 0 });
        Ok(())
    }

    fn paused<P: Holder>(
        mut self,
        mut direct: P,
        mut reader: Reader<R>,
        joined: &Event,
        check: impl Fn(&Self) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        self.house.voice.say(joined);
        let deadline = self.args.common.deadline;
        self.go_on(|pulling, at_least| {
            let not_from = Some(pulling.args.replica.clone());
            let wanted = Wanted { not_from, ..Wanted::at_least(at_least) };
            let outcome = reader.refresh(&mut direct, &wanted, Instant::now() + deadline);
            let version = outcome.map(|it| it.version).map_err(of_refresh);
            let stats = *reader.stats();
            pulling.ended(version, &direct, stats)?.map_or(Ok(None), |version| {
                pulling
                    .compare(version, &direct)
                    .and_then(|()| check(pulling))
                    .map_err(Missed::Fatal)?;
                Ok(Some(version))
            })
        })?;
        drop(direct);
        self.house.voice.say(&Event::Left { unreleased: 0 });
        Ok(())
    }

    /// Goes from version to version until there were enough, or it is told to stop.
    fn go_on(
        &mut self,
        mut refresh: impl FnMut(&mut Self, u64) -> Result<Option<u64>, Missed>,
    ) -> Result<(), CliError> {
        let stop = self.house.wakes.stop();
        let (mut installed, mut progress) = (0, Instant::now());
        loop {
            let at_least = self.version.map_or(0, |version| version.saturating_add(1));
            let found = match self.await_offer(at_least, &stop, progress) {
                Ok(found) => found,
                Err(Missed::Fatal(error)) => return Err(error),
                Err(Missed::Again(error)) => {
                    self.tell(&error, progress, error_pause)?;
                    continue;
                }
            };
            if !found {
                self.house.voice.say(&Event::Leaving { reason: "told to stop" });
                return Ok(());
            }
            let began = Instant::now();
            let before = self.verified;
            match refresh(self, at_least) {
                Ok(Some(version)) => {
                    (self.version, progress) = (Some(version), Instant::now());
                    installed += 1;
                    let verified = self.verified;
                    self.house.figures.update(|figures| {
                        (figures.version, figures.verified_bytes) = (Some(version), verified);
                    });
                    self.house.voice.say(&Event::Installed {
                        version,
                        seconds: began.elapsed().as_secs_f64(),
                        verified_bytes: verified - before,
                    });
                }
                Ok(None) => {}
                Err(Missed::Again(error)) => self.tell(&error, progress, || ())?,
                Err(Missed::Fatal(error)) => return Err(error),
            }
            if self.args.versions.is_some_and(|most| installed >= most) {
                self.house.voice.say(&Event::Leaving { reason: "installed all versions" });
                thread::sleep(LINGER);
                return Ok(());
            }
        }
    }

    /// Waits until something new is offered. `false`: told to stop.
    fn await_offer(
        &mut self,
        at_least: u64,
        stop: &Stop,
        progress: Instant,
    ) -> Result<bool, Missed> {
        let wanted =
            Wanted { not_from: Some(self.args.replica.clone()), ..Wanted::at_least(at_least) };
        let began = Instant::now();
        loop {
            if stop.is_set() {
                return Ok(false);
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
        let groups = self.place.model().groups().map_err(again)?;
        let listed = self.place.store().list(&groups).map_err(again)?;
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
    fn ended(
        &mut self,
        version: Result<u64, Missed>,
        holder: &impl Holder,
        service: ServiceStats,
    ) -> Result<Option<u64>, Missed> {
        let (pulls, relay, pool) = (holder.totals(), holder.offering(), holder.pool());
        self.house.figures.update(|figures| {
            (figures.service, figures.relay) = (service, relay);
            (figures.pulls, figures.pool) = (pulls, pool);
            figures.parameter_bytes = self.holding.layout.layout.bytes();
        });
        version.map(Some)
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

    /// Tells a failure, unless it has lasted for too long.
    fn tell(
        &self,
        error: &CliError,
        progress: Instant,
        pause: impl FnOnce(),
    ) -> Result<(), CliError> {
        self.house.figures.update(|figures| figures.failures += 1);
        if progress.elapsed() > self.args.wait {
            let wait = self.args.wait;
            return Err(CliError::Mismatch(format!(
                "nothing new could be read for {wait:?} (--wait); the last time: {error}"
            )));
        }
        self.house.voice.say(&Event::Failed { error: error.to_string() });
        pause();
        Ok(())
    }
}

fn error_pause() {
    thread::sleep(Duration::from_millis(500));
}

fn of_replica(error: ReplicaError) -> Missed {
    match error {
        ReplicaError::Staging { ref source, .. } if hopeless(source) => Missed::Fatal(error.into()),
        ReplicaError::Staging { .. } | ReplicaError::Deadline { .. } => Missed::Again(error.into()),
        // Also when the session has ended: this rank's place may be another's by now, and another life begins clean.
        _ => Missed::Fatal(error.into()),
    }
}

fn of_refresh(error: Box<RefreshError>) -> Missed {
    if hopeless(&error) { Missed::Fatal(error.into()) } else { Missed::Again(error.into()) }
}

/// Whether trying again is of no use: the session has ended, reads cannot be watched any more, or whatever was tried cannot be joined.
fn hopeless(error: &RefreshError) -> bool {
    let refused =
        |attempt: &refit_service::reader::Attempt| attempt.failure.cause == Cause::Refused;
    matches!(error.ended, Ended::Lost(_) | Ended::Store(RendezvousError::SessionEnded))
        || (!error.attempts.is_empty() && error.attempts.iter().all(refused))
}
