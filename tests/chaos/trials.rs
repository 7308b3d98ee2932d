//! Processes that are killed, stopped and restarted at random, and at the named points of the protocol.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use refit_service::Point;

use crate::child::now_micros;
use crate::model::Model;
use crate::processes::{Lane, Role};
use crate::random::Random;
use crate::report::{Report, millis, percentile};
use crate::source::{self, Pace};
use crate::target::{self, Kind};
use crate::world::{Sums, World};

/// How long a refit may take, in milliseconds.
pub(crate) const PATIENCE: u64 = 400;

/// Sources commit every so many microseconds.
const TICK: u64 = 60_000;

/// All targets refit again so long after a fault is over, or recovery has failed. The slowest way back is a source's that
/// waits for its former life's entry to vanish, under load.
const RECOVERY: Duration = Duration::from_secs(20);

/// Trials with one set of processes: survivors keep a descriptor or two of every peer that they lost.
const OF_ONE_WORLD: u64 = 40;

/// From here to there a source passes these points in every update.
const OF_SOURCES: [Point; 6] = [
    Point::Closing,
    Point::Closed,
    Point::Drained,
    Point::Writing,
    Point::Committed,
    Point::Opened,
];
const OF_READERS: [Point; 4] = [Point::Leased, Point::Reading, Point::Read, Point::Released];
const OF_RANKS: [Point; 7] = [
    Point::Staged,
    Point::Prepared,
    Point::Deciding,
    Point::Decided,
    Point::Installing,
    Point::Installed,
    Point::Reported,
];

/// What is done to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    Kill,
    KillAt(Point),
    Stop(Duration),
    Leave,
}

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Self::Kill => "killed",
            Self::KillAt(_) => "killed at a named point",
            Self::Stop(_) => "stopped",
            Self::Leave => "left and came back",
        }
    }

    /// One for this process.
    fn draw(random: &mut Random, is_source: bool, replica: bool) -> Self {
        match random.below(10) {
            0..=2 => Self::Kill,
            3..=5 if is_source => Self::KillAt(*random.pick(&OF_SOURCES)),
            3..=5 if replica && random.percent(60) => Self::KillAt(*random.pick(&OF_RANKS)),
            3..=5 => Self::KillAt(*random.pick(&OF_READERS)),
            // Beyond the session's time to live as well: it is as good as dead then, and goes on.
            6 => Self::Stop(random.millis(400, 900)),
            7 | 8 => Self::Stop(random.millis(50, 300)),
            _ => Self::Leave,
        }
    }
}

/// Runs so many trials on one lane.
pub(crate) fn run(lane: Lane, trials: u64, seed: u64, report: &mut Report) {
    let mut sums = Sums::default();
    let mut recoveries = Vec::new();
    let mut faults = BTreeMap::new();
    let (mut done, mut world_number) = (0, 0);
    let began = Instant::now();
    while done < trials {
        let mut random = Random::new(seed ^ world_number << 32 ^ (lane as u64) << 56);
        let (mut world, replicas) = build(lane, &mut random, world_number);
        world.wait_ready(&mut sums, report);
        recovered(&mut world, now_micros(), &mut sums, report);
        for _ in 0..OF_ONE_WORLD.min(trials - done) {
            done += 1;
            let offset = random.millis(0, 80);
            world.listen(Instant::now() + offset, &mut sums, report, |_| false);
            let two = random.percent(25);
            let first = usize::try_from(random.below(world.len() as u64)).unwrap();
            let mut victims = vec![first];
            let second = usize::try_from(random.below(world.len() as u64)).unwrap();
            if two && second != first {
                victims.push(second);
            }
            let drawn: Vec<(usize, Fault)> = victims
                .into_iter()
                .map(|at| {
                    let replica = replicas.contains(&at);
                    (at, Fault::draw(&mut random, world.is_source(at), replica))
                })
                .collect();
            for (_, fault) in &drawn {
                *faults.entry(fault.name()).or_default() += 1;
            }
            inflict(&mut world, &drawn, &mut random, &mut sums, report);
            let lifted = now_micros();
            match recovered(&mut world, lifted, &mut sums, report) {
                Some(at) => recoveries.push(at - lifted),
                None => {
                    report.broken(format!(
                        "seed {seed}, world {world_number}, trial {done}: no refit within {RECOVERY:?} after {drawn:?}"
                    ));
                    break;
                }
            }
        }
        world.end(&mut sums, report);
        world_number += 1;
        eprintln!("trials, {}: {done} of {trials} in {:?}", lane.name(), began.elapsed());
    }
    tell(done, &mut sums, &mut recoveries, &faults, report);
}

fn tell(
    done: u64,
    sums: &mut Sums,
    recoveries: &mut [u64],
    faults: &BTreeMap<&str, u64>,
    report: &mut Report,
) {
    report.number("trials", done);
    report.number("faults", serde_json::json!(faults));
    for (name, count) in [
        ("refits", sums.refits),
        ("named_errors", sums.errors),
        ("sessions_ended", sums.sessions),
        ("retries", sums.retries),
        ("serving_looks", sums.served),
        ("asked_to_start_anew", sums.anew),
        ("torn_installs", sums.torn),
        ("mixed_serving", sums.mixed),
        ("hangs", sums.hangs),
        ("aborts_of_survivors", sums.aborts),
    ] {
        report.number(name, count);
    }
    // Refits that met no fault would hide those that did.
    sums.met.sort_unstable();
    let p99 = percentile(&sums.met, 99);
    report.times("past_deadline_of_those_that_met_a_fault", &mut sums.met);
    report.times("past_deadline", &mut sums.lates);
    report.times("recovery", recoveries);
    report.check(p99 <= 1_000_000, || {
        format!("1 of 100 answers came {} ms behind its deadline", millis(p99))
    });
    report.check(sums.refits > done, || format!("{} refits are too few", sums.refits));
    report.number("latest", sums.latest.1.clone());
    report.number("errors", serde_json::json!(sums.kinds));
}

/// A trainer of two ranks, another copy of it of one, a replica of two ranks, one of one, and a target that reads in place.
fn build(lane: Lane, random: &mut Random, number: u64) -> (World, Vec<usize>) {
    let mut world = World::new(lane);
    let (folder, model) = (world.meeting(), Model::small());
    // In one of four worlds sources wait for nobody: readers are overwritten, and have to notice.
    let most_lease = if number % 4 == 3 { 0 } else { random.below(200) + 200 };
    for (group, rank, ranks) in [("a", 0, 2), ("a", 1, 2), ("b", 0, 1)] {
        let (folder, group, pace) = (folder.clone(), group.to_owned(), Pace::Ticks(TICK));
        world.add(Role::Source(source::Part {
            folder,
            model,
            group,
            rank,
            ranks,
            pace,
            most_lease,
        }));
    }
    let mut replicas = Vec::new();
    for kind in [Kind::Replica(0, 2), Kind::Replica(1, 2), Kind::Replica(0, 1), Kind::Direct] {
        let (folder, patience) = (folder.clone(), PATIENCE);
        let (times, again, rest) = (0, false, 5_000);
        let part = target::Part { folder, model, kind, patience, times, again, rest };
        let at = world.add(Role::Targets(vec![part]));
        if kind != Kind::Direct {
            replicas.push(at);
        }
    }
    (world, replicas)
}

/// Does all of it, and returns when every process runs again.
fn inflict(
    world: &mut World,
    faults: &[(usize, Fault)],
    random: &mut Random,
    sums: &mut Sums,
    report: &mut Report,
) {
    for &(at, fault) in faults {
        match fault {
            Fault::Kill => {
                world.doom(at);
                world.process(at).kill();
            }
            Fault::KillAt(point) => {
                world.doom(at);
                world.process(at).tell(&format!("{point:?}"));
            }
            Fault::Stop(_) => world.stop(at),
            Fault::Leave => {
                world.doom(at);
                world.process(at).end();
            }
        }
    }
    for &(at, fault) in faults {
        match fault {
            Fault::Stop(long) => {
                world.listen(Instant::now() + long, sums, report, |_| false);
                world.resume(at);
            }
            Fault::Kill => {
                gone(world, at, Duration::from_secs(10), sums, report);
            }
            Fault::KillAt(_) => {
                // Where the point is not passed in time, it dies here.
                if !gone(world, at, Duration::from_millis(500), sums, report) {
                    world.process(at).kill();
                    gone(world, at, Duration::from_secs(10), sums, report);
                }
            }
            Fault::Leave => {
                // While it waits for a peer that is stopped, it is let.
                if !gone(world, at, Duration::from_secs(10), sums, report) {
                    report.broken(format!("process {at} was asked to end, and did not"));
                    world.process(at).kill();
                    gone(world, at, Duration::from_secs(10), sums, report);
                } else if !world.ended_in_order(at) {
                    sums.aborts += 1;
                    report
                        .broken(format!("process {at} was asked to end: {}", world.last_words(at)));
                }
            }
        }
        if !matches!(fault, Fault::Stop(_)) {
            let down = random.millis(0, 200);
            world.listen(Instant::now() + down, sums, report, |_| false);
            world.restart(at);
        }
    }
}

fn gone(
    world: &mut World,
    at: usize,
    patience: Duration,
    sums: &mut Sums,
    report: &mut Report,
) -> bool {
    world.listen(Instant::now() + patience, sums, report, |world| world.is_gone(at))
}

/// When the last target had a refit that began after `since`.
fn recovered(world: &mut World, since: u64, sums: &mut Sums, report: &mut Report) -> Option<u64> {
    let mut missing = world.targets();
    let mut last = since;
    let until = Instant::now() + RECOVERY;
    while !missing.is_empty() {
        for refit in world.take_refits() {
            if refit.ok && refit.began >= since && missing.contains(&refit.process) {
                missing.retain(|at| *at != refit.process);
                last = last.max(refit.ended);
            }
        }
        if missing.is_empty() {
            break;
        }
        if Instant::now() >= until {
            return None;
        }
        world.listen(until, sums, report, World::has_refits);
    }
    Some(last)
}
