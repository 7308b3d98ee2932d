use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use refit::TargetOptions;
use refit::pool::Memory;
use refit::translate::PostAction;
use refit_service::Point;
use refit_service::rank::{Engine, EngineError, Shadow};
use refit_service::reader::ReaderOptions;
use refit_service::relay::Relay;
use refit_service::rendezvous::InProcess;
use refit_service::replica::{Replica, ReplicaError, ReplicaRank, Stage};
use refit_service::source::{GroupRank, SourceOptions};
use refit_tests::ranks;

use super::fleet::{Fleet, Local, commit, live_is_whole, millis, rows, soon, unique};

/// An engine whose parameters have to stay where they are, and that fails when it is told to.
#[derive(Debug, Default)]
struct Pinned {
    addresses: Vec<u64>,
    paused: bool,
    /// Installs until one fails, counted down; and where.
    fails: Option<(u64, &'static str)>,
    serves: Arc<AtomicU64>,
}

impl Pinned {
    fn fail_at(&mut self, step: &'static str) -> Result<(), EngineError> {
        match &mut self.fails {
            Some((left, at)) if *at == step => match left.checked_sub(1) {
                Some(fewer) => *left = fewer,
                None => return Err(format!("{step} as told").into()),
            },
            _ => {}
        }
        Ok(())
    }
}

impl Engine for Pinned {
    fn pause(&mut self) -> Result<(), EngineError> {
        self.fail_at("pause")?;
        self.serves.store(0, Ordering::SeqCst);
        self.paused = true;
        Ok(())
    }

    fn derive(
        &mut self,
        _: &[PostAction],
        params: &mut dyn Iterator<Item = (&str, &Memory)>,
    ) -> Result<(), EngineError> {
        assert!(self.paused);
        let addresses: Vec<u64> = params.map(|(_, memory)| memory.address()).collect();
        if self.addresses.is_empty() {
            self.addresses.clone_from(&addresses);
        }
        // P15.
        assert_eq!(self.addresses, addresses, "live parameters have moved");
        self.fail_at("derive")
    }

    fn resume(&mut self, version: u64) {
        assert!(self.paused);
        self.paused = false;
        self.serves.store(version, Ordering::SeqCst);
    }
}

type Rank = Replica<InProcess, Shadow<Local, Pinned>>;

fn shadow(fleet: &Fleet, rank: u32, size: u32, engine: Pinned) -> Shadow<Local, Pinned> {
    let agent = fleet.agent(&format!("shadow-{}", unique()));
    let (target, _, _) = ranks::target(&agent, &rows(rank, size), TargetOptions::default());
    let (live, _) = ranks::memory(&rows(rank, size));
    Shadow::new(target, live, Vec::new(), engine).unwrap()
}

fn join<S: Stage>(fleet: &Fleet, rank: u32, size: u32, stage: S) -> Replica<InProcess, S> {
    let place = ReplicaRank { replica: "engine".to_owned(), rank, ranks: size };
    let reader = fleet.reader("engine", ReaderOptions::default());
    let (life, fresh) = (unique().into(), Duration::from_secs(1));
    Replica::join(fleet.seat(), place, life, reader, stage, fresh, soon()).unwrap()
}

fn ranks_of(fleet: &Fleet, size: u32) -> Vec<Rank> {
    (0..size)
        .map(|rank| join(fleet, rank, size, shadow(fleet, rank, size, Pinned::default())))
        .collect()
}

/// Has all ranks refresh at once, and gives back what each said.
fn refresh<S: Stage + Send>(
    ranks: &mut [Replica<InProcess, S>],
    version: u64,
    patience: u64,
) -> Vec<Result<u64, ReplicaError>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .iter_mut()
            .map(|rank| {
                scope.spawn(move || {
                    rank.refresh(version, millis(patience)).map(|ready| ready.version)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn all_ranks_cut_over_together_a_thousand_times() {
    let fleet = Fleet::new();
    let mut trainer = fleet.group("trainer", 1, SourceOptions::default());
    let mut ranks = ranks_of(&fleet, 2);
    assert!(ranks.iter_mut().all(|rank| rank.serving().is_none()));
    for version in 1..=500 {
        commit(&mut trainer, version);
        for ready in refresh(&mut ranks, version, 20_000) {
            assert_eq!(ready.unwrap(), version);
        }
        for rank in &mut ranks {
            assert_eq!(rank.installed(), Some(version));
            assert_eq!(rank.stage().engine().serves.load(Ordering::SeqCst), version);
            assert!(live_is_whole(rank.stage(), version));
        }
    }
    for rank in &mut ranks {
        std::thread::sleep(Duration::from_millis(400));
        assert_eq!(rank.serving(), Some(500));
        assert_eq!(rank.stats().installs, 500);
    }
    // What was decided long ago is not kept.
    let replica = fleet.model.replica("engine").unwrap();
    let entries =
        refit_service::rendezvous::Rendezvous::list(&*fleet.store, &replica).unwrap().entries;
    assert!(entries.len() <= 5, "{:?}", entries.keys());
}

#[test]
fn without_one_rank_all_keep_the_old_version() {
    let fleet = Fleet::new();
    let mut trainer = fleet.group("trainer", 1, SourceOptions::default());
    let mut ranks = ranks_of(&fleet, 3);
    commit(&mut trainer, 1);
    assert!(refresh(&mut ranks, 1, 20_000).into_iter().all(|ready| ready.unwrap() == 1));
    commit(&mut trainer, 2);
    // Rank 2 is not told.
    for late in refresh(&mut ranks[..2], 2, 200) {
        let late = late.unwrap_err();
        assert!(
            matches!(&late, ReplicaError::Deadline { behind, .. } if behind == &[0, 1, 2]),
            "{late}"
        );
    }
    for rank in &mut ranks {
        assert_eq!((rank.installed(), rank.serving()), (Some(1), Some(1)));
        assert!(live_is_whole(rank.stage(), 1));
    }
    // Nor can it stage what is not there.
    for late in refresh(&mut ranks, 3, 200) {
        let late = late.unwrap_err();
        assert!(matches!(late, ReplicaError::Staging { .. }), "{late}");
    }
    assert!(refresh(&mut ranks, 2, 20_000).into_iter().all(|ready| ready.unwrap() == 2));
    assert!(ranks.iter().all(|rank| live_is_whole(rank.stage(), 2)));
}

/// P11, P15: whatever fails during an install, the replica serves no more until that rank has started anew.
#[test]
fn a_failed_install_stops_the_replica() {
    for step in ["pause", "derive"] {
        let fleet = Fleet::new();
        let mut trainer = fleet.group("trainer", 1, SourceOptions::default());
        let fails = Pinned { fails: Some((1, step)), ..Pinned::default() };
        let mut ranks = vec![
            join(&fleet, 0, 2, shadow(&fleet, 0, 2, Pinned::default())),
            join(&fleet, 1, 2, shadow(&fleet, 1, 2, fails)),
        ];
        commit(&mut trainer, 1);
        assert!(refresh(&mut ranks, 1, 20_000).into_iter().all(|ready| ready.unwrap() == 1));
        commit(&mut trainer, 2);
        let said = refresh(&mut ranks, 2, 300);
        assert!(
            matches!(&said[0], Err(ReplicaError::Deadline { behind, .. }) if behind == &[1]),
            "{said:?}"
        );
        assert!(
            matches!(&said[1], Err(ReplicaError::Invalid { reason, .. }) if reason.contains(step)),
            "{said:?}"
        );
        std::thread::sleep(Duration::from_millis(400));
        assert!(ranks.iter_mut().all(|rank| rank.serving().is_none()));
        assert_eq!(ranks[0].stage().engine().serves.load(Ordering::SeqCst), 0);
        // It stays so, whatever is tried.
        let said = refresh(&mut ranks, 2, 200);
        assert!(matches!(&said[1], Err(ReplicaError::Invalid { .. })), "{said:?}");
        // Its engine starts anew, and catches up with what was committed.
        drop(ranks.pop().unwrap().leave().unwrap());
        ranks.push(join(&fleet, 1, 2, shadow(&fleet, 1, 2, Pinned::default())));
        assert!(ranks.iter_mut().all(|rank| rank.serving().is_none()));
        assert!(refresh(&mut ranks, 2, 20_000).into_iter().all(|ready| ready.unwrap() == 2));
        assert!(ranks.iter().all(|rank| live_is_whole(rank.stage(), 2)));
        assert_eq!(ranks[0].stats().installs, 2, "a rank that was whole has not installed again");
    }
}

/// The staged set is offered to others while the replica serves.
#[test]
fn a_replica_relays_what_it_has_staged() {
    let fleet = Fleet::new();
    let mut trainer = fleet.group("trainer", 1, SourceOptions::default());
    let mut ranks: Vec<_> = (0..2)
        .map(|rank| {
            let agent = fleet.agent(&format!("relay-{}", unique()));
            let (target, _, _) = ranks::target(&agent, &rows(rank, 2), TargetOptions::default());
            let (live, _) = ranks::memory(&rows(rank, 2));
            let shadow = Shadow::new(target, live, Vec::new(), Pinned::default()).unwrap();
            let place = GroupRank { group: "engine".to_owned(), rank, ranks: 2 };
            let relay = Relay::join(fleet.seat(), place, shadow, SourceOptions::default(), soon());
            join(&fleet, rank, 2, relay.unwrap())
        })
        .collect();
    for version in 1..=20 {
        commit(&mut trainer, version);
        assert!(
            refresh(&mut ranks, version, 20_000).into_iter().all(|ready| ready.unwrap() == version)
        );
        let read = ranks[0].read().unwrap();
        assert_eq!((read.version, read.group.as_str()), (version, "trainer"));
    }
    // What it offers itself it does not wait for.
    assert_eq!(ranks[0].wait_for(20, soon()).unwrap().unwrap().group, "trainer");
    for source in trainer {
        source.leave(soon()).unwrap();
    }
    assert!(ranks[0].wait_for(20, millis(20)).unwrap().is_none());
    let mut direct = fleet.direct(0, 1);
    let mut reader = fleet.reader("late", ReaderOptions::default());
    let wanted = refit_service::reader::Wanted::at_least(20);
    assert_eq!(reader.refresh(&mut direct, &wanted, soon()).unwrap().group, "engine");
    assert!(super::fleet::is_whole(&direct, 20));
}

/// Every point of the protocol is passed, so that tests can end a process at each.
#[test]
fn every_point_is_passed() {
    let fleet = Fleet::new();
    let passed = Arc::new(std::sync::Mutex::new(std::collections::BTreeSet::new()));
    let seat = || {
        let passed = passed.clone();
        let tell = move |point: Point| {
            passed.lock().unwrap().insert(point);
        };
        fleet.seat().with_observer(Arc::new(tell))
    };
    let source = ranks::source(&fleet.agent("trainer"), &rows(0, 1));
    let place = GroupRank { group: "trainer".to_owned(), rank: 0, ranks: 1 };
    let options = SourceOptions::default();
    let mut trainer =
        [refit_service::source::LiveSource::join(seat(), place, source, options, soon()).unwrap()];
    let reader =
        refit_service::reader::Reader::new(seat(), "engine", 1, ReaderOptions::default()).unwrap();
    let place = ReplicaRank { replica: "engine".to_owned(), rank: 0, ranks: 1 };
    let stage = shadow(&fleet, 0, 1, Pinned::default());
    let mut rank =
        Replica::join(seat(), place, 2, reader, stage, Duration::from_secs(1), soon()).unwrap();
    for version in [1, 2] {
        commit(&mut trainer, version);
        rank.refresh(version, soon()).unwrap();
    }
    drop(trainer);
    let passed = passed.lock().unwrap();
    let missed: Vec<_> = Point::ALL.into_iter().filter(|point| !passed.contains(point)).collect();
    assert_eq!(missed, []);
}
