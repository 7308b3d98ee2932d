//! Ranks of the service whose peers, in processes of their own, stop and die while they are read. Promises P2, P3 and P10.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use refit::planner::{Band, Dtype, LayoutBuilder, Param, RankLayout};
use refit::pool::{HostAllocator, PoolOptions};
use refit::{Target, TargetOptions};
use refit_service::keys::Model;
use refit_service::rank::{Direct, Shadow, Unattended};
use refit_service::reader::{Ended, Reader, ReaderOptions, RefreshError, Refreshed, Wanted};
use refit_service::rendezvous::{Directory, Key, Rendezvous};
use refit_service::replica::Stage;
use refit_service::source::{GroupRank, LiveSource, SourceOptions};
use refit_service::worker::{GRACE, Quarantine, reaper};
use refit_service::{Point, Seat};
use refit_tests::link::answer;
use refit_tests::ranks::{self, Canaries};
use refit_transport::conformance::Harness;
use refit_transport::nixl::{NixlOptions, NixlTransport};
use refit_transport::{TransportPool, TransportRegistrar};

use crate::isolated::{isolated, library};
use crate::peer::Remote;
use crate::{EMULATED, Nixl, ONE_SIDED};

const ROLE: &str = "REFIT_NIXL_MEMBER";
const BYTES: u64 = 64 << 20;

/// Longer than any test: what a stopped source offers stays there.
const TTL: Duration = Duration::from_secs(300);
/// What an answer may take beyond its deadline: what the service takes, and a busy machine.
const LATE: Duration = GRACE.saturating_add(Duration::from_millis(150));
/// What an attempt may take at least.
const ATTEMPT: Duration = Duration::from_millis(400);

fn layout() -> RankLayout {
    let mut layout = LayoutBuilder::new(0);
    let tensor = layout.tensor("w", BYTES, 1).unwrap();
    let band = Band::new(tensor, 0..BYTES, 0..1);
    layout.param(Param::new("w", Dtype::U8, BYTES, 1).band(band)).unwrap();
    layout.build()
}

/// What every byte of a version is.
fn byte(version: u64) -> u8 {
    u8::try_from(version * 37 % 251).unwrap()
}

fn seat(folder: &str) -> Seat<Directory> {
    let store = Arc::new(Directory::new(folder).unwrap());
    let session = Arc::new(store.session(TTL).unwrap());
    Seat::new(store, session, Model::new(Key::new(["job", "model"]).unwrap()))
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// In the process of a source, commits the versions that it is told until its input ends. Elsewhere does nothing.
fn serves() -> bool {
    let Ok(role) = std::env::var(ROLE) else { return false };
    let (group, folder) = role.split_once(' ').unwrap();
    let transport = Arc::new(Nixl.agent(group).unwrap());
    let source = ranks::source(&transport, &layout());
    let place = GroupRank { group: group.to_owned(), rank: 0, ranks: 1 };
    // A reader that is gone, or was taken for it, is not waited for.
    let options = SourceOptions::default().with_most_lease(Duration::from_secs(1));
    let mut live = LiveSource::join(seat(folder), place, source, options, soon()).unwrap();
    for line in std::io::stdin().lines() {
        let version = line.unwrap().trim().parse().unwrap();
        let mut updating = live.begin_update(soon()).unwrap();
        let mut changing = updating.source_mut().begin_update().unwrap();
        for (_, memory) in changing.params_mut() {
            memory.host_bytes_mut().unwrap().fill(byte(version));
        }
        updating.commit(version).unwrap();
        answer("committed");
    }
    true
}

/// Groups of one source each, and what reads them.
struct World {
    folder: tempfile::TempDir,
    sources: Vec<Remote>,
    /// Those of every target that was made.
    canaries: Receiver<Canaries>,
    targets: mpsc::Sender<Canaries>,
}

impl World {
    /// Groups `dp0`, `dp1`, ... with these versions.
    fn new(versions: &[u64]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let sources = versions.iter().enumerate().map(|(number, version)| {
            let role = format!("dp{number} {}", folder.path().to_str().unwrap());
            let mut remote = Remote::of((ROLE, &role));
            assert_eq!(remote.ask(&version.to_string()), "committed");
            remote
        });
        let sources = sources.collect();
        let (targets, canaries) = mpsc::channel();
        Self { folder, sources, canaries, targets }
    }

    fn seat(&self) -> Seat<Directory> {
        seat(self.folder.path().to_str().unwrap())
    }

    /// What an agent, its memory and a whole read take while nobody stops: longer on a machine that others keep busy.
    fn calm(&self) -> Duration {
        let began = Instant::now();
        let mut rank = Direct::new(self.makes(16 * BYTES)(), Unattended);
        let mut reader = self.reader(Duration::from_secs(30));
        reader.refresh(&mut rank, &Wanted::at_least(1), soon()).unwrap();
        began.elapsed()
    }

    /// What an attempt may take here, so that one succeeds where nobody stops.
    fn attempt(&self) -> Duration {
        ATTEMPT.max(2 * self.calm())
    }

    fn reader(&self, attempt: Duration) -> Reader<Directory> {
        let options = ReaderOptions::default().with_attempt(attempt);
        Reader::new(self.seat(), "engine", 1, options).unwrap()
    }

    /// Makes targets with agents, pools and memory of their own.
    fn makes(&self, budget: u64) -> impl FnMut() -> Target<NixlTransport> + Send + 'static {
        let targets = self.targets.clone();
        move || {
            let transport = NixlTransport::new(library(), NixlOptions::new("engine")).unwrap();
            let transport = Arc::new(transport);
            let registrar = TransportRegistrar::new(transport.clone());
            let options = PoolOptions { budget_bytes: budget, ..PoolOptions::default() };
            let pool = TransportPool::new(HostAllocator, registrar, options);
            let (params, canaries) = ranks::memory(&layout());
            targets.send(canaries).unwrap();
            Target::new(transport, pool, layout(), params, TargetOptions::default()).unwrap()
        }
    }

    /// A rank with a quarter of this budget for what is kept away.
    fn shadow(&self, budget: u64) -> (Shadow<NixlTransport, Unattended>, Quarantine) {
        let quarantine = Quarantine::new("engine", budget / 4);
        let mut makes = self.makes(budget);
        let (live, canaries) = ranks::memory(&layout());
        self.targets.send(canaries).unwrap();
        let shadow = Shadow::new(makes(), live, Vec::new(), Unattended).unwrap();
        (shadow.with_failover(quarantine.clone(), move |_| Ok(makes())), quarantine)
    }

    /// Nothing was written beside any parameter.
    fn check(&self) {
        self.canaries.try_iter().for_each(|canaries| canaries.check());
    }
}

fn installs(rank: &mut Shadow<NixlTransport, Unattended>, version: u64) {
    rank.install(version).unwrap();
    let mut bytes = rank.params().flat_map(|(_, memory)| memory.host_bytes().unwrap());
    assert!(bytes.all(|&found| found == byte(version)), "not version {version}");
}

fn settles(quarantine: &Quarantine) {
    let until = soon();
    while quarantine.agents() > 0 {
        assert!(Instant::now() < until, "{quarantine:?}");
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!((quarantine.bytes(), reaper::stats().lost), (0, 0));
}

fn emulated() -> bool {
    std::env::var("UCX_TLS").is_ok_and(|lanes| lanes == "tcp")
}

/// A refresh that is answered in time, as each of its attempts is, whatever comes of them; and the bytes that it kept.
fn answered(
    seat: Seat<Directory>,
    rank: &mut Shadow<NixlTransport, Unattended>,
    [limit, attempt]: [Duration; 2],
    began: mpsc::Sender<()>,
) -> (Result<Refreshed, Box<RefreshError>>, u64) {
    let (moment, moments) = mpsc::channel();
    let observer = move |point| match point {
        Point::Reading => {
            moment.send(Instant::now()).unwrap();
            // Only the first attempt is waited for, if any is.
            let _ = began.send(());
        }
        Point::Read => moment.send(Instant::now()).unwrap(),
        _ => {}
    };
    let seat = seat.with_observer(Arc::new(observer));
    let options = ReaderOptions::default().with_attempt(attempt);
    let mut reader = Reader::new(seat, "engine", 1, options).unwrap();
    let deadline = Instant::now() + limit;
    let outcome = reader.refresh(rank, &Wanted::at_least(1), deadline);
    let late = Instant::now().saturating_duration_since(deadline);
    assert!(late <= LATE, "{late:?} beyond the deadline: {outcome:?}");
    let attempts = Vec::from_iter(moments.try_iter());
    assert!(!attempts.is_empty() && attempts.len().is_multiple_of(2), "{outcome:?}");
    for ends in attempts.chunks(2) {
        let took = ends[1] - ends[0];
        assert!(took <= attempt + LATE, "an attempt took {took:?}: {outcome:?}");
    }
    (outcome, reader.stats().quarantined_bytes)
}

/// The same while `meanwhile` happens `after` its reads begin.
fn refresh(
    world: &mut World,
    rank: &mut Shadow<NixlTransport, Unattended>,
    attempt: Duration,
    after: Duration,
    meanwhile: impl FnOnce(&mut Vec<Remote>) + Send,
) -> (Result<Refreshed, Box<RefreshError>>, u64) {
    let (began, begins) = mpsc::channel();
    let seat = world.seat();
    let sources = &mut world.sources;
    thread::scope(|scope| {
        scope.spawn(move || {
            begins.recv().unwrap();
            thread::sleep(after);
            meanwhile(sources);
        });
        answered(seat, rank, [12 * attempt, attempt], began)
    })
}

/// A source stops before it is read, while it is, and dies like that: another is read within the deadline, and what the
/// first one still writes is written where nobody looks.
fn stopped() {
    if serves() {
        return;
    }
    let mut world = World::new(&[2, 1]);
    let attempt = world.attempt();
    let (mut rank, quarantine) = world.shadow(16 * BYTES);
    let mut taken_over = 0;
    // When it stops, in milliseconds after the reads began; the first time it has stopped before.
    for (round, after) in [0, 2, 8, 15].into_iter().enumerate() {
        let newest = 10 + u64::try_from(round).unwrap();
        assert_eq!(world.sources[0].ask(&newest.to_string()), "committed");
        if round > 0 {
            // Connected, so that it stops in the middle of reads and not of a connection.
            world
                .reader(ATTEMPT * 10)
                .refresh(&mut rank, &Wanted::at_least(newest), soon())
                .unwrap();
        }
        if after == 0 {
            world.sources[0].pause();
        }
        let began = Instant::now();
        let after = Duration::from_millis(after);
        let (outcome, kept) =
            refresh(&mut world, &mut rank, attempt, after, |sources| sources[0].pause());
        let refreshed = outcome.unwrap();
        println!("round {round}: {refreshed:?} after {:?}, {kept} bytes kept", began.elapsed());
        if refreshed.group == "dp1" {
            taken_over += 1;
            assert_eq!(refreshed.version, 1);
            assert!(quarantine.agents() > 0, "{quarantine:?}");
            assert!(kept >= BYTES && kept == quarantine.bytes(), "{kept}, {quarantine:?}");
        } else {
            // One-sided reads need no answer, and some have arrived before.
            assert_eq!((refreshed.version, quarantine.agents(), kept), (newest, 0, 0));
        }
        installs(&mut rank, refreshed.version);
        // What is under way arrives now, or never.
        let ended = Instant::now();
        if round == 3 {
            world.sources[0].kill();
        } else {
            world.sources[0].resume();
        }
        settles(&quarantine);
        println!("  settled {:?} after that", ended.elapsed());
        // Neither live parameters nor the shadow are what it wrote.
        installs(&mut rank, refreshed.version);
    }
    println!("{taken_over} times another was read");
    assert!(taken_over > 0 || !emulated(), "a stopped source answered");
    drop(rank);
    world.check();
}

#[test]
fn p02_a_stopped_source_is_left_for_another_one_sided() {
    isolated("failover::p02_a_stopped_source_is_left_for_another_one_sided", ONE_SIDED, stopped);
}

#[test]
fn p02_a_stopped_source_is_left_for_another_emulated() {
    isolated("failover::p02_a_stopped_source_is_left_for_another_emulated", EMULATED, stopped);
}

/// A source that dies, before it is read and while it is, costs less than a second, where a machine is not so busy that
/// nothing else does.
fn killed() {
    if serves() {
        return;
    }
    let mut within = Vec::new();
    for after in [0, 2, 8] {
        let mut world = World::new(&[2, 1]);
        let calm = world.calm();
        let (mut rank, quarantine) = world.shadow(16 * BYTES);
        world.reader(ATTEMPT * 10).refresh(&mut rank, &Wanted::at_least(2), soon()).unwrap();
        let (kill, killed) = mpsc::channel();
        let (outcome, _) = refresh(
            &mut world,
            &mut rank,
            ATTEMPT.max(2 * calm),
            Duration::from_millis(after),
            |sources| {
                kill.send(Instant::now()).unwrap();
                sources[0].kill();
            },
        );
        let ended = Instant::now();
        let (refreshed, took) = (outcome.unwrap(), ended - killed.recv().unwrap());
        println!("killed {after} ms after reads began: {refreshed:?} {took:?} later");
        within.push(took < Duration::from_secs(1).max(3 * calm));
        installs(&mut rank, refreshed.version);
        settles(&quarantine);
        drop(rank);
        world.check();
    }
    // What else a machine begins in that second may cost one of them its turn.
    let kept = within.iter().filter(|kept| **kept).count();
    assert!(kept * 2 > within.len(), "{kept} of {} were there in time", within.len());
}

#[test]
fn p10_a_killed_source_costs_less_than_a_second_one_sided() {
    isolated("failover::p10_a_killed_source_costs_less_than_a_second_one_sided", ONE_SIDED, killed);
}

#[test]
fn p10_a_killed_source_costs_less_than_a_second_emulated() {
    isolated("failover::p10_a_killed_source_costs_less_than_a_second_emulated", EMULATED, killed);
}

/// Two of three sources stop, and a quarter of the budget has room for what one of them keeps away.
fn full() {
    if serves() {
        return;
    }
    let mut world = World::new(&[3, 2, 1]);
    let attempt = world.attempt();
    let (mut rank, quarantine) = world.shadow(6 * BYTES);
    world.sources[..2].iter_mut().for_each(Remote::pause);
    let (outcome, kept) =
        answered(world.seat(), &mut rank, [20 * attempt, attempt], mpsc::channel().0);
    println!("{outcome:?}, {quarantine:?}");
    match outcome {
        Err(failed) => {
            assert!(matches!(failed.ended, Ended::Quarantined(_)), "{failed}");
            assert!(failed.to_string().contains("end the silent peer"), "{failed}");
            assert_eq!(quarantine.agents(), 1);
            assert!(kept >= 2 * BYTES, "{kept}");
        }
        // One-sided reads may need no answer.
        Ok(refreshed) => assert!(!emulated(), "{refreshed:?}"),
    }
    // What settles makes room, and the same rank goes on.
    world.sources[..2].iter_mut().for_each(Remote::resume);
    settles(&quarantine);
    let refreshed = world.reader(ATTEMPT * 10).refresh(&mut rank, &Wanted::at_least(3), soon());
    assert_eq!(refreshed.unwrap().group, "dp0");
    installs(&mut rank, 3);
    assert_eq!(quarantine.agents(), 0);
    drop(rank);
    world.check();
}

#[test]
fn p02_a_full_quarantine_ends_a_refresh_one_sided() {
    isolated("failover::p02_a_full_quarantine_ends_a_refresh_one_sided", ONE_SIDED, full);
}

#[test]
fn p02_a_full_quarantine_ends_a_refresh_emulated() {
    isolated("failover::p02_a_full_quarantine_ends_a_refresh_emulated", EMULATED, full);
}

/// A source that published and takes no connection, where there is no other: whoever asked is answered by the deadline, long
/// before the transport gives the connection up.
fn never_accepting() {
    if serves() {
        return;
    }
    let mut world = World::new(&[1]);
    let mut rank = Direct::new(world.makes(16 * BYTES)(), Unattended);
    world.sources[0].pause();
    let mut reader = world.reader(Duration::from_secs(20));
    for limit in [300, 1_000] {
        let deadline = Instant::now() + Duration::from_millis(limit);
        let outcome = reader.refresh(&mut rank, &Wanted::at_least(1), deadline);
        let late = Instant::now().saturating_duration_since(deadline);
        println!("{limit} ms: {late:?} late: {outcome:?}");
        assert!(late <= LATE, "{late:?} beyond the deadline: {outcome:?}");
        assert!(outcome.is_err() || !emulated(), "a stopped source answered");
    }
    world.sources[0].resume();
    let refreshed = reader.refresh(&mut rank, &Wanted::at_least(1), soon()).unwrap();
    assert_eq!((refreshed.version, reader.stats().quarantined_bytes), (1, 0));
    let mut params = rank.params().unwrap();
    assert!(params.all(|(_, memory)| memory.host_bytes().unwrap().iter().all(|&it| it == byte(1))));
}

#[test]
fn p03_no_rank_waits_for_a_connection_one_sided() {
    isolated("failover::p03_no_rank_waits_for_a_connection_one_sided", ONE_SIDED, never_accepting);
}

#[test]
fn p03_no_rank_waits_for_a_connection_emulated() {
    isolated("failover::p03_no_rank_waits_for_a_connection_emulated", EMULATED, never_accepting);
}
