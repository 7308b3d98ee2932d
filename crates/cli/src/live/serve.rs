//! `refit serve`: a source rank.

use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use refit::planner::RankLayout;
use refit::pool::PoolOptions;
use refit::transport::{Transport, TransportPool, TransportRegistrar};
use refit::{Source, allocate};
use refit_service::Seats;
use refit_service::keys::Model;
use refit_service::message::{Announcement, Decision, Message, Offering};
use refit_service::rendezvous::Rendezvous;
use refit_service::source::{GroupRank, LiveSource, SourceError, SourceOptions};

use super::args::{Common, Holding, ServeArgs};
use super::endpoint::Labels;
use super::start::{self, Agents, House, Work};
use super::voice::Event;
use super::wakes::Wake;
use crate::error::CliError;

/// What is waited for after the store could not be used.
const PAUSE: Duration = Duration::from_millis(500);

pub(crate) fn run(args: ServeArgs) -> Result<ExitCode, CliError> {
    let (common, holding) = (args.common.clone(), args.holding());
    start::run(&common, || Ok(Serve { holding: holding?, args }))
}

#[derive(Debug)]
struct Serve {
    args: ServeArgs,
    holding: Holding<RankLayout>,
}

impl Work for Serve {
    fn common(&self) -> &Common {
        &self.args.common
    }

    fn labels(&self) -> Labels {
        let ServeArgs { common: Common { job, rank, .. }, group, .. } = &self.args;
        Labels { side: "source", job: job.clone(), name: group.clone(), rank: *rank }
    }

    fn model(&self) -> String {
        self.holding.model.clone()
    }

    fn is_read(&self) -> bool {
        true
    }

    fn demands(&self) -> (u64, u32) {
        (self.holding.layout.bytes(), 64)
    }

    fn run<R: Rendezvous, T: Transport>(
        self,
        seats: Seats<R>,
        agents: Agents<T>,
        house: House,
    ) -> Result<(), CliError> {
        let Self { args, mut holding } = self;
        holding.values.heed(house.wakes.stop().of_ranks());
        let transport = agents()?;
        let layout = &holding.layout;
        let (rank, ranks, bytes) = (layout.rank(), holding.ranks, layout.bytes());
        let pool = TransportPool::new(
            house.home.clone(),
            TransportRegistrar::new(transport.clone()),
            PoolOptions::default(),
        );
        let params = allocate(layout, &house.home)?;
        let source =
            house.home.equip_source(Source::new(transport, &pool, layout.clone(), params)?)?;

        let group = args.group.clone();
        let options =
            SourceOptions::default().with_most_lease(args.lease).with_drain(args.common.drain);
        let within = Instant::now() + args.common.deadline;
        let seat = GroupRank { group: group.clone(), rank, ranks };
        let live = LiveSource::join(seats.take()?, seat, source, options, within)?;
        house.voice.say(&Event::Joined {
            side: "trainer",
            name: group.clone(),
            rank,
            ranks,
            bytes,
        });

        house.wakes.watch(seats.store(), seats.model().wishes()?)?;
        house.wakes.watch(seats.store(), seats.model().member(&group, rank)?)?;
        if rank != 0 {
            house.wakes.watch(seats.store(), seats.model().version(&group, 0)?)?;
        }
        let due = match (rank, args.first_version) {
            (0, Some(first)) => Some(first),
            (0, None) => Some(newest(seats.store(), seats.model())?.saturating_add(1)),
            _ => None,
        };
        let mut serving =
            Serving { args, holding, seats, pool, live, house, due, next: None, trouble: None };
        serving.go_on()?;
        serving.leave()
    }
}

/// A source rank that is there.
#[derive(Debug)]
struct Serving<R: Rendezvous, T: Transport> {
    args: ServeArgs,
    holding: Holding<RankLayout>,
    seats: Seats<R>,
    pool: TransportPool<T>,
    live: LiveSource<R, Source<T>>,
    house: House,
    /// The version that is to be published.
    due: Option<u64>,
    /// When the one behind it is, where somebody counts the time.
    next: Option<Instant>,
    /// Since when nothing works.
    trouble: Option<Instant>,
}

impl<R: Rendezvous, T: Transport> Serving<R, T> {
    /// Publishes and answers until it is told to stop, or has published enough.
    fn go_on(&mut self) -> Result<(), CliError> {
        let mut published = 0;
        loop {
            match self.step() {
                Ok(true) => published += 1,
                Ok(false) => {}
                Err(error) => self.bear(error)?,
            }
            self.count();
            let until = match (self.due, self.next) {
                // What could not be done yet is tried again.
                (Some(_), _) => Some(Instant::now() + PAUSE),
                (None, next) => next,
            };
            match self.house.wakes.next(until) {
                Wake::Stop => {
                    self.house.voice.say(&Event::Leaving { reason: "told to stop" });
                    return Ok(());
                }
                Wake::Reload if self.leads() => self.due = self.due.or_else(|| self.following()),
                Wake::Late if self.due.is_none() && self.next.is_some() => {
                    if self.args.versions.is_some_and(|most| published >= most) {
                        self.house.voice.say(&Event::Leaving { reason: "published all versions" });
                        return Ok(());
                    }
                    self.due = self.following();
                }
                Wake::Reload | Wake::Store | Wake::Late => {}
            }
        }
    }

    /// Rank 0 says which version comes next.
    fn leads(&self) -> bool {
        self.holding.layout.rank() == 0
    }

    fn following(&self) -> Option<u64> {
        self.live.offered().unwrap_or_default().checked_add(1)
    }

    /// Does what there is to do, and says whether a version was published.
    fn step(&mut self) -> Result<bool, CliError> {
        self.stay()?;
        if !self.leads() {
            self.follow()?;
        }
        let Some(version) = self.due else {
            self.live.answer()?;
            self.trouble = None;
            return Ok(false);
        };
        let published = self.publish(version)?;
        self.trouble = None;
        Ok(published)
    }

    /// Writes what a version is to be and offers it; not while it is read for longer than it is waited for.
    fn publish(&mut self, version: u64) -> Result<bool, CliError> {
        let began = Instant::now();
        let values = self.holding.values.renewed()?;
        let (layout, threads, home) =
            (&self.holding.layout, self.holding.threads, &self.house.home);
        let mut updating = self.live.begin_update(began + self.args.common.deadline)?;
        let mut params = updating.source_mut().begin_update()?;
        values.fill(home, layout, params.params_mut(), version, threads)?;
        drop(params);
        updating.commit(version)?;
        self.due = None;
        // The time counts from here, however long writing took.
        self.next = self.args.every.filter(|_| self.leads()).map(|every| Instant::now() + every);
        let seconds = began.elapsed().as_secs_f64();
        self.house.voice.say(&Event::Published { version, seconds });
        Ok(true)
    }

    /// Takes from rank 0 which version is next.
    fn follow(&mut self) -> Result<(), CliError> {
        let key = self.seats.model().version(&self.args.group, 0)?;
        let found = self.seats.store().list(&key)?;
        let said = found.entries.get(&key).and_then(|value| Announcement::decode(value).ok());
        let open = said.filter(|said| said.offering == Offering::Open).map(|said| said.version);
        match (open, self.live.offered()) {
            (Some(version), Some(ours)) if version < ours => {
                let group = &self.args.group;
                return Err(CliError::Mismatch(format!(
                    "rank 0 of group `{group}` is at version {version}, and this rank at {ours}, which can never be \
                     taken back: give rank 0 a --first-version above it"
                )));
            }
            (Some(version), ours) if ours.is_none_or(|ours| ours < version) => {
                self.due = Some(version);
            }
            _ => {}
        }
        Ok(())
    }

    /// Joins again if the store took this process for dead.
    fn stay(&mut self) -> Result<(), CliError> {
        if self.live.has_vanished()? { self.rejoin() } else { Ok(()) }
    }

    fn rejoin(&mut self) -> Result<(), CliError> {
        let error = "the rendezvous took this rank for dead; joining again".to_owned();
        self.house.voice.say(&Event::Failed { error });
        let began = Instant::now();
        self.live.rejoin(self.seats.take()?, began + self.args.common.deadline)?;
        self.house.voice.say(&Event::Rejoined { seconds: began.elapsed().as_secs_f64() });
        Ok(())
    }

    /// Goes on after what passes by itself, for as long as one step may take.
    fn bear(&mut self, error: CliError) -> Result<(), CliError> {
        let told = self.house.wakes.stop().is_set();
        match &error {
            CliError::Stopped => return Ok(()),
            CliError::Source(source) if source.is_session_ended() && !told => {
                return self.rejoin();
            }
            CliError::Source(source) => match **source {
                SourceError::Busy { .. } => self.trouble = None,
                SourceError::Rendezvous(_) => {}
                _ => return Err(error),
            },
            CliError::Meeting(_) => {}
            // What is published is whole; a folder that is being written will be, too.
            CliError::Read { .. } | CliError::Usage(_) if self.live.offered().is_some() => {
                self.due = None;
            }
            _ => return Err(error),
        }
        if told {
            return Ok(());
        }
        let since = *self.trouble.get_or_insert_with(Instant::now);
        if since.elapsed() > self.args.common.deadline {
            return Err(error);
        }
        self.house.figures.update(|figures| figures.failures += 1);
        self.house.voice.say(&Event::Failed { error: error.to_string() });
        thread::sleep(PAUSE);
        Ok(())
    }

    fn count(&self) {
        let (version, service, pool) = (self.live.offered(), *self.live.stats(), self.pool.stats());
        self.house.figures.update(|figures| {
            (figures.version, figures.service, figures.pool) = (version, service, pool);
            figures.parameter_bytes = self.holding.layout.bytes();
        });
    }

    fn leave(self) -> Result<(), CliError> {
        let drain = self.args.common.drain;
        let left = self.live.leave(Instant::now() + drain)?;
        let readers = left.unreleased.len();
        self.house.voice.say(&Event::Left { unreleased: readers });
        if readers > 0 {
            // Somebody may read this memory still; it goes with the process, and not before.
            std::mem::forget(left.source);
            return Err(CliError::Unreleased { readers, drain });
        }
        Ok(())
    }
}

/// The newest version that anybody at this rendezvous knows of.
fn newest<R: Rendezvous>(store: &Arc<R>, model: &Model) -> Result<u64, CliError> {
    let groups = store.list(&model.groups()?)?;
    let announced = groups.entries.values().filter_map(|it| Announcement::decode(it).ok());
    let announced = announced.map(|it| it.version).max();
    let decided = store.list(&model.key().join("replica")?)?;
    let decided = decided.entries.values().filter_map(|it| Decision::decode(it).ok()?.standing());
    let decided = decided.map(|it| it.version).max();
    Ok(announced.max(decided).unwrap_or_default())
}
