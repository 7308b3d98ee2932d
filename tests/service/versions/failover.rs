//! Peers that fall silent in the middle of a read: what is read instead, in which memory, and what becomes of the first.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use refit::transport::local::{LocalOptions, LocalTransport};
use refit::{Target, TargetOptions};
use refit_service::puller::Puller;
use refit_service::rank::{Direct, Shadow, Unattended};
use refit_service::reader::{Ended, ReaderOptions, Wanted};
use refit_service::replica::Stage;
use refit_service::source::SourceOptions;
use refit_service::worker::{GRACE, Quarantine, WorkerError, reaper};
use refit_tests::ranks;
use refit_tests::silence::{Hushed, Silence};

use super::fleet::{Fleet, LocalSource, byte, commit, millis, rows, soon, unique};

type Rank = Shadow<Hushed, Unattended>;

/// Two groups, the first of which has the newer version; an agent that can be hushed, and what it made so far.
struct World {
    fleet: Fleet,
    groups: Vec<Vec<LocalSource>>,
    silence: Silence,
    agents: Arc<Mutex<Vec<Weak<Hushed>>>>,
}

impl World {
    /// Groups `dp0`, `dp1`, ... with these versions.
    fn new(versions: &[u64]) -> Self {
        let fleet = Fleet::new().slow(64);
        let groups = versions.iter().enumerate().map(|(number, version)| {
            let mut group = fleet.group(&format!("dp{number}"), 1, SourceOptions::default());
            commit(&mut group, *version);
            group
        });
        let groups = groups.collect();
        Self { fleet, groups, silence: Silence::default(), agents: Arc::default() }
    }

    /// Makes targets of agents of this world.
    fn targets(&self) -> impl FnMut() -> Target<Hushed> + Send + 'static {
        let (network, silence, agents) =
            (self.fleet.network.clone(), self.silence.clone(), self.agents.clone());
        let options = LocalOptions::default().with_bytes_per_poll(self.fleet.bytes_per_poll);
        move || {
            let name = format!("shadow-{}", unique());
            let inner = LocalTransport::with_options(&network, &name, options).unwrap();
            let agent = Arc::new(Hushed::new(inner, &silence));
            agents.lock().push(Arc::downgrade(&agent));
            ranks::target(&agent, &rows(0, 1), TargetOptions::default()).0
        }
    }

    fn shadow(&self, quarantine: &Quarantine) -> Rank {
        let mut targets = self.targets();
        let (live, _) = ranks::memory(&rows(0, 1));
        let shadow = Shadow::new(targets(), live, Vec::new(), Unattended).unwrap();
        shadow.with_failover(quarantine.clone(), move |_| Ok(targets()))
    }

    /// Agents that are not destroyed.
    fn alive(&self) -> Vec<bool> {
        self.agents.lock().iter().map(|agent| agent.strong_count() > 0).collect()
    }
}

fn options(attempt: u64) -> ReaderOptions {
    ReaderOptions::default().with_attempt(Duration::from_millis(attempt))
}

fn installs(rank: &mut Rank, version: u64) {
    rank.install(version).unwrap();
    let mut bytes = rank.params().flat_map(|(_, memory)| memory.host_bytes().unwrap());
    assert!(bytes.all(|&found| found == byte(version)), "not version {version}");
}

fn settles(quarantine: &Quarantine) {
    let until = soon();
    while quarantine.agents() > 0 {
        assert!(Instant::now() < until, "{quarantine:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(quarantine.bytes(), 0);
}

fn bytes() -> u64 {
    rows(0, 1).bytes()
}

#[test]
fn a_silent_peer_costs_one_attempt_and_fresh_memory_takes_over() {
    let world = World::new(&[2, 1]);
    let quarantine = Quarantine::new("engine", 2 * bytes());
    let mut rank = world.shadow(&quarantine);
    // Longer than anybody waits, and then not.
    let mut reader = world.fleet.reader("engine", options(3_600_000));
    reader.set_attempt(Duration::from_millis(200));
    world.silence.fall("dp0-", 5);
    let refreshed = reader.refresh(&mut rank, &Wanted::at_least(1), soon()).unwrap();
    assert_eq!((refreshed.group.as_str(), refreshed.version), ("dp1", 1));
    assert_eq!((reader.stats().retries.late, reader.stats().retries.total()), (1, 1));
    // The first one's memory is kept, agent and all.
    assert_eq!(world.alive(), [true, true]);
    assert_eq!(quarantine.agents(), 1);
    assert!(quarantine.bytes() >= bytes(), "{quarantine:?}");
    assert_eq!(reader.stats().quarantined_bytes, quarantine.bytes());
    installs(&mut rank, 1);
    // The silent one goes on, and writes where nobody looks.
    world.silence.end();
    settles(&quarantine);
    assert_eq!((world.alive(), rank.quarantined_bytes()), (vec![false, true], 0));
    installs(&mut rank, 1);
    // From now on it is a peer like any other.
    let refreshed = reader.refresh(&mut rank, &Wanted::at_least(2), soon()).unwrap();
    assert_eq!((refreshed.group.as_str(), reader.stats().quarantined_bytes), ("dp0", 0));
    installs(&mut rank, 2);
    assert_eq!(world.alive(), [false, true]);
}

#[test]
fn what_is_kept_away_has_a_limit_with_a_name() {
    let world = World::new(&[3, 2, 1]);
    let quarantine = Quarantine::new("engine", bytes() * 3 / 2);
    let mut rank = world.shadow(&quarantine);
    let mut reader = world.fleet.reader("engine", options(100));
    world.silence.fall("dp0-", 5);
    world.silence.fall("dp1-", 5);
    let failed = reader.refresh(&mut rank, &Wanted::at_least(1), soon()).unwrap_err();
    let Ended::Quarantined(failure) = &failed.ended else { panic!("{failed}") };
    let full = failure.reason.downcast_ref::<WorkerError>();
    let Some(WorkerError::Quarantine { bytes: kept, limit, .. }) = full else { panic!("{failed}") };
    assert!(*kept >= 2 * bytes() && *limit == bytes() * 3 / 2, "{failed}");
    let said = failed.to_string();
    assert!(said.contains("end the silent peer") && said.contains("`engine`"), "{said}");
    assert_eq!(failed.attempts.len(), 2);
    assert_eq!(quarantine.agents(), 1);
    assert_eq!(reader.stats().quarantined_bytes, *kept);
    // Nothing was replaced beyond it; what settles makes room, and the same rank goes on.
    assert_eq!(world.alive(), [true, true]);
    world.silence.end();
    settles(&quarantine);
    rank.make_ready("dp1", soon()).unwrap();
    let refreshed = reader.refresh(&mut rank, &Wanted::at_least(1), soon()).unwrap();
    assert_eq!(refreshed.version, 3);
    installs(&mut rank, 3);
    assert_eq!(world.alive(), [false, true]);
}

/// No memory is spent on a peer that nobody can be read instead of, as long as an attempt may take.
#[test]
fn the_only_peer_is_waited_for() {
    let world = World::new(&[1]);
    let quarantine = Quarantine::new("engine", u64::MAX);
    let mut rank = world.shadow(&quarantine);
    let mut reader = world.fleet.reader("engine", options(3_000));
    world.silence.fall("dp0-", 5);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(3_300));
            world.silence.end();
        });
        reader.refresh(&mut rank, &Wanted::at_least(1), soon()).unwrap();
    });
    assert_eq!((reader.stats().retries.late, quarantine.agents()), (1, 0));
    assert_eq!(world.alive(), [true]);
    installs(&mut rank, 1);
}

/// Live parameters cannot be replaced: a silent peer uses the deadline up, and the error says what to do.
#[test]
fn live_memory_waits_for_the_silent_peer() {
    let world = World::new(&[2, 1]);
    let mut rank = Direct::new(world.targets()(), Unattended);
    let mut reader = world.fleet.reader("engine", options(100));
    world.silence.fall("dp0-", 5);
    let deadline = millis(500);
    let failed = reader.refresh(&mut rank, &Wanted::at_least(1), deadline).unwrap_err();
    assert!(Instant::now() >= deadline);
    let Ended::Unsettled(failure) = &failed.ended else { panic!("{failed}") };
    let said = failure.to_string();
    assert!(said.contains("`dp0`") && said.contains("end the silent peer"), "{said}");
    assert!(reader.stats().quarantined_bytes >= bytes());
    assert!(rank.params().is_none());
    world.silence.end();
    assert_eq!(reader.refresh(&mut rank, &Wanted::at_least(2), soon()).unwrap().group, "dp0");
    assert_eq!(reader.stats().quarantined_bytes, 0);
    assert_eq!(world.alive(), [true]);
}

/// What an answer may take beyond its deadline.
const LATE: Duration = Duration::from_millis(250);

/// A transport that does not return from connecting costs an attempt, as one does whose reads do not settle.
#[test]
fn p03_a_connection_that_blocks_costs_one_attempt() {
    blocked(None);
}

/// And so does one that does not return from posting.
#[test]
fn p03_a_post_that_blocks_costs_one_attempt() {
    blocked(Some(2));
}

/// The first peer blocks, after the rank has read this version from it.
fn blocked(before: Option<u64>) {
    let mut world = World::new(&[2, 1]);
    let quarantine = Quarantine::new("engine", 2 * bytes());
    let mut rank = world.shadow(&quarantine);
    let mut reader = world.fleet.reader("engine", options(200));
    if let Some(version) = before {
        let refreshed = reader.refresh(&mut rank, &Wanted::at_least(version), soon()).unwrap();
        assert_eq!(refreshed.version, version);
        commit(&mut world.groups[0], 3);
    }
    world.silence.block("dp0-");
    let refreshed = reader.refresh(&mut rank, &Wanted::at_least(1), soon()).unwrap();
    assert_eq!((refreshed.group.as_str(), refreshed.version), ("dp1", 1));
    assert_eq!((reader.stats().retries.late, reader.stats().retries.total()), (1, 1));
    assert_eq!((world.alive(), quarantine.agents()), (vec![true, true], 1));
    assert!(quarantine.bytes() >= bytes(), "{quarantine:?}");
    assert_eq!(reader.stats().quarantined_bytes, quarantine.bytes());
    installs(&mut rank, 1);
    // The call returns where nobody waits for it, and the agent goes with all that it had.
    world.silence.end();
    settles(&quarantine);
    assert_eq!((world.alive(), rank.quarantined_bytes()), (vec![false, true], 0));
    installs(&mut rank, 1);
    assert_eq!(reader.refresh(&mut rank, &Wanted::at_least(2), soon()).unwrap().group, "dp0");
}

/// An agent that takes long to make keeps nobody beyond the deadline, and is taken by who asks next.
#[test]
fn p03_an_agent_that_is_long_in_the_making_keeps_nobody() {
    let world = World::new(&[2, 1]);
    let quarantine = Quarantine::new("engine", 4 * bytes());
    let (go_on, wait) = std::sync::mpsc::channel::<()>();
    let mut targets = world.targets();
    let (live, _) = ranks::memory(&rows(0, 1));
    let shadow = Shadow::new(targets(), live, Vec::new(), Unattended).unwrap();
    let mut rank = shadow.with_failover(quarantine.clone(), move |_| {
        wait.recv()?;
        Ok(targets())
    });
    let mut reader = world.fleet.reader("engine", options(100));
    world.silence.fall("dp0-", 5);
    for round in 0..2 {
        let deadline = millis(400);
        let failed = reader.refresh(&mut rank, &Wanted::at_least(1), deadline).unwrap_err();
        let late = Instant::now().saturating_duration_since(deadline);
        assert!(late <= LATE, "{late:?} late in round {round}: {failed}");
        assert!(failed.to_string().contains("in the making"), "{failed}");
        assert_eq!((world.alive(), quarantine.agents()), (vec![true], 0));
    }
    // It takes over, and finds the peer as silent; so does the next.
    (0..2).for_each(|_| go_on.send(()).unwrap());
    let refreshed = reader.refresh(&mut rank, &Wanted::at_least(1), soon()).unwrap();
    assert_eq!((refreshed.group.as_str(), refreshed.version), ("dp1", 1));
    assert_eq!((world.alive(), quarantine.agents()), (vec![true, true, true], 2));
    installs(&mut rank, 1);
    world.silence.end();
    settles(&quarantine);
}

/// Where nothing can take over, whoever asked is answered in time all the same, and the same rank goes on afterwards.
#[test]
fn p03_a_call_that_blocks_keeps_nobody() {
    let world = World::new(&[1]);
    let mut rank = Direct::new(world.targets()(), Unattended);
    let mut reader = world.fleet.reader("engine", options(10_000));
    world.silence.block("dp0-");
    for round in 0..2 {
        let deadline = millis(400);
        let failed = reader.refresh(&mut rank, &Wanted::at_least(1), deadline).unwrap_err();
        let late = Instant::now().saturating_duration_since(deadline);
        assert!(late <= GRACE + LATE, "{late:?} late in round {round}: {failed}");
        let said = failed.to_string();
        assert!(said.contains("does not return") && said.contains("`dp0`"), "{said}");
        assert!(rank.params().is_none() && rank.quarantined_bytes() >= bytes());
    }
    world.silence.end();
    assert_eq!(reader.refresh(&mut rank, &Wanted::at_least(1), soon()).unwrap().version, 1);
    assert_eq!((rank.quarantined_bytes(), world.alive()), (0, vec![true]));
}

/// An agent that cannot watch its reads is replaced; what it keeps is gone, and counts as kept for good.
#[test]
fn an_agent_that_lost_its_reads_is_replaced() {
    let world = World::new(&[2, 1]);
    let quarantine = Quarantine::new("engine", bytes() * 3 / 2);
    let mut rank = world.shadow(&quarantine);
    let mut reader = world.fleet.reader("engine", options(200));
    let lost = reaper::stats().lost;
    world.silence.lose("dp0-");
    let refreshed = reader.refresh(&mut rank, &Wanted::at_least(1), soon()).unwrap();
    assert_eq!((refreshed.group.as_str(), refreshed.version), ("dp1", 1));
    assert_eq!((reader.stats().retries.failed, reader.stats().retries.total()), (1, 1));
    installs(&mut rank, 1);
    let until = soon();
    while reaper::stats().lost == lost {
        assert!(Instant::now() < until, "{:?}", reaper::stats());
        std::thread::sleep(Duration::from_millis(1));
    }
    // Never destroyed, and never given back.
    assert_eq!((world.alive(), quarantine.agents()), (vec![true, true], 1));
    assert!(quarantine.bytes() >= bytes(), "{quarantine:?}");
    // It does not go on like that: the next one would be beyond the limit.
    world.silence.lose("dp1-");
    let failed = reader.refresh(&mut rank, &Wanted::at_least(1), soon()).unwrap_err();
    assert!(matches!(failed.ended, Ended::Quarantined(_)), "{failed}");
    // A rank to which nothing is given instead says so at once.
    let mut rank = Direct::new(world.targets()(), Unattended);
    let failed = reader.refresh(&mut rank, &Wanted::at_least(1), soon()).unwrap_err();
    assert!(matches!(failed.ended, Ended::Lost(_)), "{failed}");
    assert_eq!(failed.attempts.len(), 0);
}

/// A rank that is dropped while its peer is silent is not destroyed before its reads have settled, and whoever ends the process
/// can wait for that.
#[test]
fn a_rank_that_is_dropped_is_kept_until_its_reads_have_settled() {
    for blocks in [false, true] {
        let world = World::new(&[1]);
        let mut rank = Direct::new(world.targets()(), Unattended);
        let mut reader = world.fleet.reader("engine", options(100));
        if blocks {
            world.silence.block("dp0-");
        } else {
            world.silence.fall("dp0-", 5);
        }
        reader.refresh(&mut rank, &Wanted::at_least(1), millis(100)).unwrap_err();
        drop(rank);
        assert_eq!(world.alive(), [true]);
        let deadline = millis(100);
        assert!(!reaper::wait(deadline));
        assert!(Instant::now() <= deadline + LATE);
        assert_eq!(world.alive(), [true]);
        world.silence.end();
        assert!(reaper::wait(soon()));
        assert_eq!(world.alive(), [false]);
    }
}
