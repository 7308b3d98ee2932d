use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use refit_service::message::{Message, ReaderLease};
use refit_service::reader::{ReaderOptions, Wanted};
use refit_service::rendezvous::{Life, Rendezvous};
use refit_service::source::{SourceError, SourceOptions};

use super::fleet::{Fleet, commit, is_whole, millis, rows, soon, unique};
use refit_tests::ranks;

/// A trainer of two ranks that writes all the time, and two readers that refit `times` each. What is installed is one
/// version, whole; how often readers had to try again is returned.
fn under_fire(options: SourceOptions, times: usize) -> u64 {
    let fleet = Fleet::new().slow(32);
    let mut trainer = fleet.group("trainer", 2, options);
    commit(&mut trainer, 1);
    let (done, reading) = (AtomicBool::new(false), Arc::new(AtomicBool::new(false)));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut version = 1;
            while !done.load(Ordering::Relaxed) {
                version += 1;
                commit(&mut trainer, version);
                // The next change begins while somebody reads, if anybody does.
                let pause = Instant::now() + Duration::from_micros(200 + version * 37 % 600);
                while !reading.load(Ordering::SeqCst) && Instant::now() < pause {
                    std::thread::yield_now();
                }
                if version.is_multiple_of(3) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            version
        });
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut reader = fleet.watched(&reading);
                    let mut direct = fleet.direct(0, 1);
                    let mut last = 0;
                    for _ in 0..times {
                        let wanted = Wanted::at_least(last + 1);
                        let refreshed = reader.refresh(&mut direct, &wanted, soon()).unwrap();
                        assert!(refreshed.version > last);
                        last = refreshed.version;
                        assert_eq!(direct.version(), Some(last));
                        assert!(is_whole(&direct, last), "version {last} is torn");
                    }
                    assert_eq!(reader.stats().refits, times as u64);
                    reader.stats().retries
                })
            })
            .collect();
        let retries: Vec<_> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
        done.store(true, Ordering::Relaxed);
        assert!(writer.join().unwrap() > times as u64);
        for retry in &retries {
            assert_eq!(retry.total(), retry.torn + retry.vanished + retry.stale, "{retry:?}");
        }
        retries.iter().map(|retry| retry.torn).sum()
    })
}

/// P1: a trainer that waits for its readers. Nothing is ever torn, not even noticed as such.
#[test]
fn p1_nothing_is_torn_while_leases_are_honoured() {
    assert_eq!(under_fire(SourceOptions::default(), 500), 0);
}

/// P1: a trainer that waits for nobody, as one does whose readers are thought dead. Readers notice, and read again.
#[test]
fn p1_what_was_torn_is_never_installed() {
    let torn = under_fire(SourceOptions::default().with_most_lease(Duration::ZERO), 500);
    assert!(torn > 0, "the writer never came in between: the test shows nothing");
}

#[test]
fn a_trainer_waits_for_a_reader_and_not_for_a_dead_one() {
    let fleet = Fleet::new();
    let mut trainer = fleet.group("trainer", 1, SourceOptions::default());
    commit(&mut trainer, 1);
    let session = fleet.store.session(Duration::from_secs(1)).unwrap();
    let key = fleet.model.reader("trainer", "dead").unwrap();
    let lease = |millis| ReaderLease { incarnation: 1, version: 1, millis }.encode();

    // Longer than the trainer has time: nothing changes, and the version can be read again.
    fleet.store.put(&key, &lease(60_000), Life::Session(&session)).unwrap();
    let refused = trainer[0].begin_update(millis(100)).unwrap_err();
    assert!(
        matches!(&refused, SourceError::Busy { readers, .. } if *readers == [key.clone()]),
        "{refused}"
    );
    assert_eq!(trainer[0].offered(), Some(1));
    let stats = *trainer[0].stats();
    assert_eq!((stats.waits, stats.waits_late), (1, 1));
    assert_eq!((stats.leases_released, stats.leases_expired), (0, 0));
    assert!(stats.waited >= Duration::from_millis(100), "{stats:?}");
    let mut reader = fleet.reader("engine", ReaderOptions::default());
    let mut direct = fleet.direct(0, 1);
    reader.refresh(&mut direct, &Wanted::at_least(1), soon()).unwrap();

    // No longer than the lease.
    fleet.store.put(&key, &lease(200), Life::Session(&session)).unwrap();
    let began = Instant::now();
    drop(trainer[0].begin_update(soon()).unwrap());
    let waited = began.elapsed();
    assert!(waited >= Duration::from_millis(200), "{waited:?}");
    assert!(waited < Duration::from_millis(700), "{waited:?}");
    assert_eq!(trainer[0].stats().leases_expired, 1);
    let updating = trainer[0].begin_update(soon()).unwrap();
    updating.commit(2).unwrap();

    // No longer than the session.
    fleet.store.put(&key, &lease(60_000), Life::Session(&session)).unwrap();
    let dies = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        drop(session);
    });
    let began = Instant::now();
    trainer[0].begin_update(soon()).unwrap().commit(3).unwrap();
    assert!(began.elapsed() < Duration::from_millis(600));
    dies.join().unwrap();
    // What it waited for, and what ended that.
    let stats = *trainer[0].stats();
    assert_eq!((stats.waits, stats.waits_late), (3, 1));
    assert_eq!((stats.leases_released, stats.leases_expired), (1, 1));
    assert!(stats.waited >= Duration::from_millis(400), "{stats:?}");
    // Where nobody reads, nobody is waited for.
    drop(trainer[0].begin_update(soon()).unwrap());
    assert_eq!((trainer[0].stats().waits, trainer[0].stats().waited), (3, stats.waited));

    // No longer than it allows, whatever the lease says, and what cannot be read counts as long as that.
    let most = SourceOptions::default().with_most_lease(Duration::from_millis(50));
    let mut strict = fleet.group("strict", 1, most);
    commit(&mut strict, 1);
    for value in [lease(60_000), b"garbage".to_vec()] {
        let key = fleet.model.reader("strict", &format!("r{}", unique())).unwrap();
        fleet.store.put(&key, &value, Life::Kept).unwrap();
        let began = Instant::now();
        drop(strict[0].begin_update(soon()).unwrap());
        let waited = began.elapsed();
        let bounds = Duration::from_millis(50)..Duration::from_millis(500);
        assert!(bounds.contains(&waited), "{waited:?}");
        let next = strict[0].stats().commits + 1;
        strict[0].begin_update(soon()).unwrap().commit(next).unwrap();
    }
}

#[test]
fn versions_only_go_up_and_an_abandoned_update_offers_nothing() {
    let fleet = Fleet::new();
    let mut trainer = fleet.group("trainer", 1, SourceOptions::default());
    let mut reader = fleet.reader("engine", ReaderOptions::default());
    assert_eq!(reader.wait_for(&Wanted::default(), millis(20)).unwrap(), None);
    commit(&mut trainer, 5);
    assert_eq!(reader.wait_for(&Wanted::default(), soon()).unwrap().unwrap().version, 5);
    for version in [0, 4, 5] {
        let refused = trainer[0].begin_update(soon()).unwrap().commit(version).unwrap_err();
        assert!(matches!(refused, SourceError::NotNewer { last: 5, .. }), "{refused}");
        assert_eq!(trainer[0].offered(), None);
        assert_eq!(reader.wait_for(&Wanted::default(), millis(20)).unwrap(), None);
    }
    commit(&mut trainer, 6);
    assert_eq!(reader.wait_for(&Wanted::default(), soon()).unwrap().unwrap().version, 6);
}

/// Waiting for a version is being woken, not polling.
#[test]
fn who_waits_is_woken_by_the_commit() {
    let fleet = Fleet::new();
    let mut trainer = fleet.group("trainer", 2, SourceOptions::default());
    commit(&mut trainer, 1);
    let waits = fleet.clone();
    let waiter = std::thread::spawn(move || {
        let mut reader = waits.reader("engine", ReaderOptions::default());
        let offer = reader.wait_for(&Wanted::at_least(2), soon()).unwrap().unwrap();
        (offer.version, Instant::now())
    });
    std::thread::sleep(Duration::from_millis(50));
    commit(&mut trainer, 2);
    let committed = Instant::now();
    let (version, woken) = waiter.join().unwrap();
    assert_eq!(version, 2);
    assert!(woken.saturating_duration_since(committed) < Duration::from_millis(200));
}

/// P7: a rank that is there is never taken over, and what its former life said is never read as this one's.
#[test]
fn p7_two_lives_of_a_rank_do_not_mix() {
    let fleet = Fleet::new();
    let mut old = fleet.group("trainer", 1, SourceOptions::default());
    commit(&mut old, 1);
    let impostor = || {
        let agent = fleet.agent(&format!("impostor-{}", unique()));
        let place =
            refit_service::source::GroupRank { group: "trainer".to_owned(), rank: 0, ranks: 1 };
        (place, ranks::source(&agent, &rows(0, 1)))
    };
    let (place, source) = impostor();
    let join = refit_service::source::LiveSource::join;
    let refused =
        join(fleet.seat(), place, source, SourceOptions::default(), millis(50)).unwrap_err();
    assert!(matches!(refused, SourceError::Taken { holder: Some(_), .. }), "{refused}");

    let mut reader = fleet.reader("engine", ReaderOptions::default());
    let before = reader.wait_for(&Wanted::default(), soon()).unwrap().unwrap();
    let dies = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        drop(old);
    });
    let (place, source) = impostor();
    let restarted = join(fleet.seat(), place, source, SourceOptions::default(), soon()).unwrap();
    dies.join().unwrap();
    // It holds nothing until it has committed, whatever the former life held.
    assert_eq!(reader.wait_for(&Wanted::default(), millis(20)).unwrap(), None);
    let mut restarted = [restarted];
    commit(&mut restarted, 2);
    let after = reader.wait_for(&Wanted::default(), soon()).unwrap().unwrap();
    assert_ne!(before.ranks[0].member.incarnation, after.ranks[0].member.incarnation);
    let mut direct = fleet.direct(0, 1);
    reader.refresh(&mut direct, &Wanted::default(), soon()).unwrap();
    assert!(is_whole(&direct, 2));
}

#[test]
fn two_models_and_two_fleets_in_one_process_do_not_cross() {
    let first = Fleet::new().slow(700);
    let second = first.model("other");
    std::thread::scope(|scope| {
        for (fleet, offset) in [(&first, 0), (&second, 100)] {
            scope.spawn(move || {
                let mut trainer = fleet.group("trainer", 2, SourceOptions::default());
                let mut engines: Vec<_> = (0..2)
                    .map(|rank| {
                        let reader = fleet.reader("engine", ReaderOptions::default());
                        (reader, fleet.direct(rank, 2))
                    })
                    .collect();
                for version in offset + 1..offset + 40 {
                    commit(&mut trainer, version);
                    for (reader, direct) in &mut engines {
                        let refreshed =
                            reader.refresh(direct, &Wanted::at_least(version), soon()).unwrap();
                        assert_eq!(refreshed.version, version);
                        assert!(is_whole(direct, version));
                    }
                }
            });
        }
    });
}
