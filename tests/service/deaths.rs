//! Processes that die at every named point of the protocol: what they had written under their session vanishes, and nothing
//! that they would have done next is done. P11, and what P1, P7 and P10 say of crashes.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use refit::planner::{Band, Dtype, LayoutBuilder, Param, RankLayout};
use refit::transport::local::{LocalTransport, Network};
use refit::{Source, TargetOptions};
use refit_service::keys::Model;
use refit_service::rank::{Direct, Shadow, Unattended};
use refit_service::reader::{Reader, ReaderOptions, RefreshError, Wanted};
use refit_service::relay::Relay;
use refit_service::rendezvous::{
    Created, InProcess, InProcessSession, Key, Life, Rendezvous, RendezvousError, Revision,
    Snapshot,
};
use refit_service::replica::{Replica, ReplicaError, ReplicaRank};
use refit_service::source::{GroupRank, LiveSource, SourceError, SourceOptions};
use refit_service::{Point, Reseat, Seat};
use refit_tests::ranks;

/// One process's way to the store. Dead, it has none.
#[derive(Debug)]
struct Mortal {
    store: InProcess,
    dead: AtomicBool,
    sessions: Mutex<Vec<Arc<MortalSession>>>,
}

type MortalSession = Mutex<Option<InProcessSession>>;

impl Mortal {
    fn alive(&self) -> Result<(), RendezvousError> {
        if self.dead.load(Ordering::SeqCst) { Err(RendezvousError::SessionEnded) } else { Ok(()) }
    }

    fn die(&self) {
        self.dead.store(true, Ordering::SeqCst);
        self.lose();
    }

    /// The store takes this process for dead, and the process finds out by what it does next.
    fn lose(&self) {
        for session in self.sessions.lock().iter() {
            drop(session.lock().take());
        }
    }

    fn under<V>(
        &self,
        life: Life<'_, Arc<MortalSession>>,
        write: impl FnOnce(Life<'_, InProcessSession>) -> Result<V, RendezvousError>,
    ) -> Result<V, RendezvousError> {
        self.alive()?;
        match life {
            Life::Session(session) => {
                let held = session.lock();
                write(Life::Session(held.as_ref().ok_or(RendezvousError::SessionEnded)?))
            }
            _ => write(Life::Kept),
        }
    }
}

impl Rendezvous for Mortal {
    type Session = Arc<MortalSession>;

    fn store(&self) -> &'static str {
        "mortal"
    }

    fn session(&self, ttl: Duration) -> Result<Self::Session, RendezvousError> {
        let session = Arc::new(Mutex::new(Some(self.store.session(ttl)?)));
        self.sessions.lock().push(session.clone());
        Ok(session)
    }

    fn put(
        &self,
        key: &Key,
        value: &[u8],
        life: Life<'_, Self::Session>,
    ) -> Result<(), RendezvousError> {
        self.under(life, |life| self.store.put(key, value, life))
    }

    fn create(
        &self,
        key: &Key,
        value: &[u8],
        life: Life<'_, Self::Session>,
    ) -> Result<Created, RendezvousError> {
        self.under(life, |life| self.store.create(key, value, life))
    }

    fn remove(&self, key: &Key) -> Result<(), RendezvousError> {
        self.alive()?;
        self.store.remove(key)
    }

    fn list(&self, prefix: &Key) -> Result<Snapshot, RendezvousError> {
        self.alive()?;
        self.store.list(prefix)
    }

    fn changed(
        &self,
        prefix: &Key,
        since: Revision,
        deadline: Instant,
    ) -> Result<Option<Snapshot>, RendezvousError> {
        self.alive()?;
        self.store.changed(prefix, since, deadline)
    }
}

/// One process, which dies when it passes a point.
#[derive(Clone)]
struct Process {
    store: Arc<Mortal>,
    dies_at: Arc<Mutex<Option<Point>>>,
    /// Loses its session there, once.
    loses_at: Arc<Mutex<Option<Point>>>,
}

impl Process {
    fn new(store: &InProcess) -> Self {
        let mortal = Mortal {
            store: store.clone(),
            dead: AtomicBool::new(false),
            sessions: Mutex::default(),
        };
        Self { store: Arc::new(mortal), dies_at: Arc::default(), loses_at: Arc::default() }
    }

    fn dies_at(&self, point: Point) {
        *self.dies_at.lock() = Some(point);
    }

    fn seat(&self) -> Seat<Mortal> {
        let session = Arc::new(self.store.session(Duration::from_secs(1)).unwrap());
        let model = Model::new(Key::new(["model"]).unwrap());
        let (store, dies_at) = (self.store.clone(), self.dies_at.clone());
        let loses_at = self.loses_at.clone();
        Seat::new(self.store.clone(), session, model).with_observer(Arc::new(move |point| {
            if loses_at.lock().take_if(|it| *it == point).is_some() {
                store.lose();
            }
            if *dies_at.lock() == Some(point) {
                store.die();
                // Without a word: this is not a failure.
                resume_unwind(Box::new(Died));
            }
        }))
    }
}

#[derive(Debug)]
struct Died;

/// What comes of it, unless the process dies on the way.
fn unless_it_dies<V>(work: impl FnOnce() -> V) -> Option<V> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(value) => Some(value),
        Err(panic) if panic.is::<Died>() => None,
        Err(panic) => resume_unwind(panic),
    }
}

fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn rows(rank: u32, ranks: u32) -> RankLayout {
    let mut layout = LayoutBuilder::new(rank);
    let tensor = layout.tensor("w", 60, 32).unwrap();
    let share = 60 / u64::from(ranks);
    let own = u64::from(rank) * share..(u64::from(rank) + 1) * share;
    let band = Band::new(tensor, own, 0..32);
    layout.param(Param::new("w", Dtype::Bf16, share, 32).band(band)).unwrap();
    layout.build()
}

fn byte(version: u64) -> u8 {
    u8::try_from(version * 37 % 251).unwrap()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn millis(millis: u64) -> Instant {
    Instant::now() + Duration::from_millis(millis)
}

type Trainer = LiveSource<Mortal, Source<LocalTransport>>;
type Rank = Replica<Mortal, Shadow<LocalTransport, Unattended>>;

/// A target of one rank that reads in place, and offers what it has read.
struct Alone {
    relay: Relay<Mortal, Direct<LocalTransport, Unattended>>,
    reader: Reader<Mortal>,
}

impl Alone {
    fn reads(&mut self, version: u64) -> Result<(), Box<RefreshError>> {
        let wanted = Wanted::exactly(version).but_not_from("alone");
        self.reader.refresh(&mut self.relay, &wanted, millis(500)).map(drop)
    }
}

struct World {
    store: InProcess,
    network: Network,
}

impl World {
    fn trainer(&self, process: &Process, group: &str) -> Trainer {
        let agent = ranks::agent(&self.network, &format!("trainer-{}", unique()));
        let place = GroupRank { group: group.to_owned(), rank: 0, ranks: 1 };
        let source = ranks::source(&agent, &rows(0, 1));
        LiveSource::join(process.seat(), place, source, SourceOptions::default(), soon()).unwrap()
    }

    fn relay(&self, process: &Process) -> Alone {
        let agent = ranks::agent(&self.network, &format!("alone-{}", unique()));
        let (target, _, _) = ranks::target(&agent, &rows(0, 1), TargetOptions::default());
        let (seat, direct) = (process.seat(), Direct::new(target, Unattended));
        let life = u128::from(unique());
        let reader = Reader::new(seat.clone(), "alone", life, ReaderOptions::default()).unwrap();
        let place = GroupRank { group: "alone".to_owned(), rank: 0, ranks: 1 };
        let options = SourceOptions::default();
        Alone { relay: Relay::join(seat, place, direct, options, soon()).unwrap(), reader }
    }

    fn rank(&self, process: &Process, rank: u32) -> Rank {
        let agent = ranks::agent(&self.network, &format!("engine-{}", unique()));
        let (target, _, _) = ranks::target(&agent, &rows(rank, 2), TargetOptions::default());
        let (live, _) = ranks::memory(&rows(rank, 2));
        let shadow = Shadow::new(target, live, Vec::new(), Unattended).unwrap();
        let seat = process.seat();
        let life = u128::from(unique());
        let reader = Reader::new(seat.clone(), "engine", life, ReaderOptions::default()).unwrap();
        let place = ReplicaRank { replica: "engine".to_owned(), rank, ranks: 2 };
        let fresh = Duration::from_millis(30);
        Replica::join(seat, place, life, reader, shadow, fresh, soon()).unwrap()
    }
}

fn commit(trainer: &mut Trainer, version: u64) {
    try_commit(trainer, version).unwrap();
}

fn try_commit(trainer: &mut Trainer, version: u64) -> Result<(), SourceError> {
    let mut updating = trainer.begin_update(soon())?;
    let mut changing = updating.source_mut().begin_update().unwrap();
    for (_, memory) in changing.params_mut() {
        memory.host_bytes_mut().unwrap().fill(byte(version));
    }
    updating.commit(version)
}

/// What a rank's live parameters are whole of.
fn whole(rank: &Rank) -> Option<u64> {
    let version = rank.installed()?;
    for (_, memory) in rank.stage().params() {
        let bytes = memory.host_bytes().unwrap();
        assert!(bytes.iter().all(|&found| found == byte(version)), "version {version} is a mix");
    }
    Some(version)
}

/// Has both ranks refresh at once. A rank that dies is gone.
fn refresh(ranks: [Option<Rank>; 2], version: u64, patience: u64) -> [(Option<Rank>, bool); 2] {
    let threads = ranks.map(|rank| {
        std::thread::spawn(move || {
            let Some(mut rank) = rank else { return (None, false) };
            let done = unless_it_dies(move || {
                let reached = rank.refresh(version, millis(patience));
                (rank, reached.is_ok())
            });
            done.map_or((None, false), |(rank, reached)| (Some(rank), reached))
        })
    });
    threads.map(|thread| thread.join().unwrap())
}

/// The same for so long that the second of them passes a point, which `passed` tells, however busy the machine is.
fn refresh_until(
    mut ranks: [Option<Rank>; 2],
    version: u64,
    passed: impl Fn(&Option<Rank>) -> bool,
) -> [(Option<Rank>, bool); 2] {
    let mut patience = 250;
    loop {
        let began = Instant::now();
        let said = refresh(ranks, version, patience);
        assert!(began.elapsed() < Duration::from_millis(patience + 500));
        // Where both are there already, another refresh passes nothing.
        if passed(&said[1].0) || said.iter().all(|(_, reached)| *reached) || patience > 8_000 {
            return said;
        }
        ranks = said.map(|(rank, _)| rank);
        patience *= 2;
    }
}

/// What the ranks that are there serve at this moment: one version at most.
fn serving(ranks: &mut [Option<Rank>; 2]) -> Option<u64> {
    std::thread::sleep(Duration::from_millis(40));
    let mut served: Vec<u64> = ranks.iter_mut().flatten().filter_map(Rank::serving).collect();
    served.dedup();
    assert!(served.len() <= 1, "{served:?} are served at once");
    served.pop()
}

fn of_sources(point: Point) -> bool {
    point <= Point::Withdrawn
}

#[test]
fn a_trainer_may_die_anywhere() {
    let points = Point::ALL.into_iter().filter(|point| of_sources(*point));
    let mut deaths = 0;
    for point in points {
        let world = World { store: InProcess::new(), network: Network::new() };
        let process = Process::new(&world.store);
        let mut trainer = world.trainer(&process, "trainer");
        commit(&mut trainer, 1);
        let mut ranks = [0, 1].map(|rank| Some(world.rank(&Process::new(&world.store), rank)));
        ranks = refresh(ranks, 1, 20_000).map(|(rank, reached)| rank.filter(|_| reached));
        assert_eq!(serving(&mut ranks), Some(1));

        process.dies_at(point);
        let lives = unless_it_dies(move || match point {
            Point::Joined => drop(world_trainer(&world, &process, trainer)),
            Point::Withdrawn => drop(trainer.leave(soon()).unwrap()),
            _ => commit(&mut trainer, 2),
        });
        deaths += usize::from(lives.is_none());
        assert!(lives.is_none(), "{point:?} was not passed");
        // Nothing of what it was about to do can be read.
        let said = refresh(ranks, 2, 150);
        assert!(said.iter().all(|(_, reached)| !reached), "{point:?}");
        let mut ranks = said.map(|(rank, _)| rank);
        assert!(ranks.iter().flatten().all(|rank| whole(rank) == Some(1)), "{point:?}");
        assert_eq!(serving(&mut ranks), Some(1), "{point:?}");
    }
    assert_eq!(deaths, 8);
}

/// Another rank of the same process, which dies when it joins.
fn world_trainer(world: &World, process: &Process, first: Trainer) -> (Trainer, Trainer) {
    (first, world.trainer(process, "another"))
}

#[test]
fn a_rank_may_die_anywhere_and_comes_back() {
    for point in Point::ALL.into_iter().filter(|point| !of_sources(*point)) {
        let world = World { store: InProcess::new(), network: Network::new() };
        let mut trainer = world.trainer(&Process::new(&world.store), "trainer");
        commit(&mut trainer, 1);
        let victim = Process::new(&world.store);
        let processes = [Process::new(&world.store), victim.clone()];
        let mut ranks = [0, 1].map(|rank| Some(world.rank(&processes[rank as usize], rank)));
        ranks = refresh(ranks, 1, 20_000).map(|(rank, reached)| rank.filter(|_| reached));
        assert_eq!(serving(&mut ranks), Some(1));

        commit(&mut trainer, 2);
        victim.dies_at(point);
        if point == Point::RankJoined {
            ranks[1].take().unwrap().leave().unwrap();
            assert!(unless_it_dies(|| world.rank(&victim, 1)).is_none());
        }
        let [(survivor, reached), (dead, _)] = refresh_until(ranks, 2, Option::is_none);
        // The decision may be the survivor's; every other point is the victim's to pass.
        assert!(dead.is_none() || matches!(point, Point::Deciding | Point::Decided), "{point:?}");
        let survived = survivor.as_ref().and_then(whole);
        assert!(matches!(survived, Some(1 | 2)), "{point:?}: {survived:?}");
        let mut ranks = [survivor, dead];
        let alone = ranks[1].is_none();
        assert!(!(alone && reached) || point == Point::Reported, "{point:?}");
        assert!(!alone || serving(&mut ranks).is_none(), "{point:?}: half a replica serves");

        // Its next life catches up with the other, and both go on.
        ranks[1] = Some(match ranks[1].take() {
            Some(alive) => alive,
            None => world.rank(&Process::new(&world.store), 1),
        });
        victim.dies_at.lock().take();
        commit(&mut trainer, 3);
        let said = refresh(ranks, 3, 20_000);
        assert!(said.iter().all(|(_, reached)| *reached), "{point:?}");
        let mut ranks = said.map(|(rank, _)| rank);
        assert!(ranks.iter().flatten().all(|rank| whole(rank) == Some(3)));
        assert_eq!(serving(&mut ranks), Some(3), "{point:?}");
    }
}

/// A rank that was taken for dead at any point, and lives: it serves nothing, joins again with its memory and its agent, and
/// both go on. What it had staged need not be read again.
#[test]
fn a_rank_may_lose_its_session_anywhere_and_joins_again() {
    for point in Point::ALL.into_iter().filter(|point| !of_sources(*point)) {
        let world = World { store: InProcess::new(), network: Network::new() };
        let mut trainer = world.trainer(&Process::new(&world.store), "trainer");
        commit(&mut trainer, 1);
        let loser = Process::new(&world.store);
        let processes = [Process::new(&world.store), loser.clone()];
        let mut ranks = [0, 1].map(|rank| Some(world.rank(&processes[rank as usize], rank)));
        ranks = refresh(ranks, 1, 20_000).map(|(rank, reached)| rank.filter(|_| reached));
        assert_eq!(serving(&mut ranks), Some(1));

        commit(&mut trainer, 2);
        *loser.loses_at.lock() = Some(point);
        if point == Point::RankJoined {
            // Between two refreshes.
            loser.loses_at.lock().take();
            loser.store.lose();
        }
        let said = refresh_until(ranks, 2, |_| loser.loses_at.lock().is_none());
        let mut ranks = said.map(|(rank, _)| rank);
        // The other may have passed the point first; then this rank has lost nothing.
        let lost = loser.loses_at.lock().take().is_none();
        assert!(lost || matches!(point, Point::Deciding | Point::Decided), "{point:?}");
        if lost {
            assert_eq!(serving(&mut ranks), None, "{point:?}: half a replica serves");
            let rank = ranks[1].as_mut().unwrap();
            assert!(rank.has_vanished(), "{point:?}");
            let error = rank.refresh(2, millis(50)).unwrap_err();
            assert!(error.is_session_ended(), "{point:?}: {error}");

            let (pulls, staged) = (rank.stage().totals().pulls, rank.stage().staged());
            rank.rejoin(loser.seat(), unique().into(), soon()).unwrap();
            assert!(!rank.has_vanished(), "{point:?}");
            assert_eq!((rank.installed(), rank.serving()), (None, None), "{point:?}");
            assert_eq!(rank.stats().rejoins, 1);
            let committed = ranks[0].as_ref().unwrap().installed().unwrap();
            let said = refresh(ranks, committed, 20_000);
            assert!(said.iter().all(|(_, reached)| *reached), "{point:?}");
            ranks = said.map(|(rank, _)| rank);
            let rank = ranks[1].as_ref().unwrap();
            if staged == Some(committed) && whole(rank) == Some(committed) {
                assert_eq!(rank.stage().totals().pulls, pulls, "{point:?}: read again");
            }
        }
        commit(&mut trainer, 3);
        let said = refresh(ranks, 3, 20_000);
        assert!(said.iter().all(|(_, reached)| *reached), "{point:?}");
        let mut ranks = said.map(|(rank, _)| rank);
        assert!(ranks.iter().flatten().all(|rank| whole(rank) == Some(3)));
        assert_eq!(serving(&mut ranks), Some(3), "{point:?}");
    }
}

/// One that comes back too late finds another process in its place, and neither serves nor joins.
#[test]
fn a_place_that_another_took_is_not_taken_back() {
    let world = World { store: InProcess::new(), network: Network::new() };
    let process = Process::new(&world.store);
    let mut rank = world.rank(&process, 0);
    process.store.lose();
    let mut next = world.rank(&Process::new(&world.store), 0);
    assert!(!rank.has_vanished(), "somebody is there");
    let error = rank.refresh(1, millis(50)).unwrap_err();
    assert!(matches!(error, ReplicaError::Superseded { .. }), "{error}");
    let error = rank.rejoin(process.seat(), unique().into(), millis(50)).unwrap_err();
    assert!(matches!(error, ReplicaError::Taken { .. }), "{error}");
    assert_eq!(rank.serving(), None);
    // It is not there before it has joined again, however often that is tried, and does not write over the other.
    assert!(rank.has_vanished());
    let error = rank.refresh(1, millis(50)).unwrap_err();
    assert!(error.is_session_ended(), "{error}");
    // Nor does it take the other along when it leaves.
    rank.leave().unwrap();
    assert!(!next.has_vanished());
}

/// The same of a source, which withdraws what it offered when it goes.
#[test]
fn a_trainer_leaves_the_place_to_who_took_it() {
    for leaves in [false, true] {
        let world = World { store: InProcess::new(), network: Network::new() };
        let process = Process::new(&world.store);
        let mut trainer = world.trainer(&process, "trainer");
        commit(&mut trainer, 1);
        assert!(!trainer.has_vanished().unwrap());
        process.store.lose();
        assert!(trainer.has_vanished().unwrap());
        let mut next = world.trainer(&Process::new(&world.store), "trainer");
        commit(&mut next, 2);
        let error = trainer.rejoin(process.seat(), millis(50)).unwrap_err();
        assert!(matches!(error, SourceError::Taken { .. }), "{error}");
        if leaves {
            assert_eq!(trainer.leave(soon()).unwrap().unreleased, []);
        } else {
            drop(trainer);
        }
        let ranks = [0, 1].map(|rank| Some(world.rank(&Process::new(&world.store), rank)));
        let said = refresh(ranks, 2, 20_000);
        assert!(said.iter().all(|(_, reached)| *reached), "what the next life offers is gone");
    }
}

/// A target that reads in place finds out by what it does next, and offers what it holds again where it is a relay.
#[test]
fn a_relay_that_lost_its_session_says_so_and_offers_again() {
    let world = World { store: InProcess::new(), network: Network::new() };
    let mut trainer = world.trainer(&Process::new(&world.store), "trainer");
    commit(&mut trainer, 1);
    let process = Process::new(&world.store);
    let mut alone = world.relay(&process);
    alone.reads(1).unwrap();
    assert_eq!(alone.relay.offered(), Some(1));

    process.store.lose();
    commit(&mut trainer, 2);
    let error = alone.reads(2).unwrap_err();
    assert!(error.is_session_ended(), "{error}");
    let seat = process.seat();
    alone.relay.reseat(&seat, soon()).unwrap();
    assert_eq!((alone.relay.offered(), alone.relay.stats().rejoins), (Some(1), 1));
    alone.reader.reseat(seat);
    alone.reads(2).unwrap();
    assert_eq!(alone.relay.offered(), Some(2));
}

/// A trainer that was taken for dead at any point, and lives, offers what is whole again, from where it was. What it had
/// begun to write it does not offer.
#[test]
fn a_trainer_may_lose_its_session_anywhere_and_offers_what_is_whole() {
    let mut losses = 0;
    for point in Point::ALL.into_iter().filter(|point| of_sources(*point)) {
        if matches!(point, Point::Joined | Point::Withdrawn) {
            continue;
        }
        let world = World { store: InProcess::new(), network: Network::new() };
        let process = Process::new(&world.store);
        let mut trainer = world.trainer(&process, "trainer");
        commit(&mut trainer, 1);
        let before = trainer.source().unwrap().publication().unwrap();

        *process.loses_at.lock() = Some(point);
        let committed = try_commit(&mut trainer, 2);
        assert!(process.loses_at.lock().is_none(), "{point:?} was not passed");
        losses += 1;
        let ended = SourceError::Rendezvous(RendezvousError::SessionEnded).to_string();
        match committed {
            Ok(()) => assert_eq!(point, Point::Opened),
            Err(error) => assert_eq!(error.to_string(), ended, "{point:?}"),
        }
        trainer.rejoin(process.seat(), soon()).unwrap();
        assert_eq!(trainer.stats().rejoins, 1);
        // Before it had closed the first version it could not write.
        let whole_now = if point == Point::Closing { 1 } else { 2 };
        assert_eq!(trainer.offered(), Some(whole_now), "{point:?}");
        // The same memory under the same registrations.
        let after = trainer.source().unwrap().publication().unwrap();
        assert_eq!(before.digest(), after.digest(), "{point:?}");
        let ranks = [0, 1].map(|rank| Some(world.rank(&Process::new(&world.store), rank)));
        let said = refresh(ranks, whole_now, 20_000);
        assert!(said.iter().all(|(_, reached)| *reached), "{point:?}");
        let ranks = said.map(|(rank, _)| rank);
        assert!(ranks.iter().flatten().all(|rank| whole(rank) == Some(whole_now)));

        // In the middle of a write.
        drop(trainer.begin_update(soon()).unwrap());
        process.store.lose();
        trainer.rejoin(process.seat(), soon()).unwrap();
        assert_eq!(trainer.offered(), None, "{point:?}");
        let said = refresh(ranks, whole_now + 1, 150);
        assert!(said.iter().all(|(_, reached)| !reached), "{point:?}");
        commit(&mut trainer, 3);
        let said = refresh(said.map(|(rank, _)| rank), 3, 20_000);
        assert!(said.iter().all(|(_, reached)| *reached), "{point:?}");
        assert!(said.iter().all(|(rank, _)| whole(rank.as_ref().unwrap()) == Some(3)));
        // So does whoever has not read from it before, and knows nothing that it published.
        world.relay(&Process::new(&world.store)).reads(3).unwrap();
    }
    assert_eq!(losses, 6);
}
