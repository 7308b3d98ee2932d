//! Processes that are told to end in the middle of something: what waits for others is over at once, what is read is waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use refit::transport::local::LocalOptions;
use refit::{Target, TargetOptions};
use refit_service::message::{Message, ReaderLease};
use refit_service::puller::{Cause, Puller};
use refit_service::rank::{Shadow, Unattended};
use refit_service::reader::{Ended, Reader, ReaderOptions, Wanted};
use refit_service::rendezvous::{InProcess, Key, Life, Rendezvous};
use refit_service::replica::{Replica, ReplicaError, ReplicaRank};
use refit_service::source::{GroupRank, LiveSource, SourceError, SourceOptions};
use refit_service::worker::Quarantine;
use refit_service::{Observer, Point, Seat, Stop};
use refit_tests::ranks;
use refit_tests::silence::{Hushed, Silence};

use super::fleet::{Fleet, Local, commit, live_is_whole, millis, rows, soon, unique, write};

/// What an end may take that waits for nobody, on a machine that does other things as well: far less than any deadline here.
const SOON: Duration = Duration::from_secs(2);

/// Runs it, and has the process told to end once it has passed a point, if one is named, and waits. Gives back what it
/// returns, and how long after that.
fn told<V: Send>(
    at: Option<Point>,
    reads: Duration,
    run: impl FnOnce(Stop, Observer) -> V + Send,
    behind: impl FnOnce(),
) -> (V, Duration) {
    let stop = Stop::default();
    let (passed, passes) = mpsc::channel();
    let observer = move |point| {
        if at == Some(point) {
            let _ = passed.send(());
        }
    };
    thread::scope(|scope| {
        let running = scope.spawn({
            let stop = stop.clone();
            move || {
                let value = run(stop, Arc::new(observer));
                (value, Instant::now())
            }
        });
        if at.is_some() {
            passes.recv_timeout(Duration::from_secs(20)).unwrap();
        }
        thread::sleep(Duration::from_millis(100));
        assert!(!running.is_finished(), "it did not wait");
        let at = Instant::now();
        stop.tell(at + reads);
        // Only the first time counts.
        stop.tell(at + Duration::from_secs(60));
        behind();
        let (value, ended) = running.join().unwrap();
        (value, ended - at)
    })
}

fn reader(seat: Seat<InProcess>, attempt: u64) -> Reader<InProcess> {
    let options = ReaderOptions::default().with_attempt(Duration::from_millis(attempt));
    Reader::new(seat, "engine", unique().into(), options).unwrap()
}

#[test]
fn who_waits_for_an_offer_is_answered() {
    let fleet = Fleet::new();
    let run = |stop: Stop, _| {
        let mut reader = reader(fleet.seat().with_stop(stop.clone()), 10_000);
        let mut direct = fleet.direct(0, 1).with_stop(stop);
        let failed = reader.refresh(&mut direct, &Wanted::at_least(1), soon()).unwrap_err();
        // Nor is anything waited for from then on.
        assert_eq!(reader.wait_for(&Wanted::default(), soon()).unwrap(), None);
        failed
    };
    let (failed, took) = told(None, Duration::ZERO, run, || {});
    assert!(matches!(failed.ended, Ended::Deadline), "{failed}");
    assert!(took < SOON, "{took:?}");
}

fn shadow(fleet: &Fleet, rank: u32, size: u32) -> Shadow<Local, Unattended> {
    let agent = fleet.agent(&format!("shadow-{}", unique()));
    let (target, _, _) = ranks::target(&agent, &rows(rank, size), TargetOptions::default());
    let (live, _) = ranks::memory(&rows(rank, size));
    Shadow::new(target, live, Vec::new(), Unattended).unwrap()
}

fn join(
    fleet: &Fleet,
    seat: Seat<InProcess>,
    rank: u32,
) -> Result<Replica<InProcess, Shadow<Local, Unattended>>, ReplicaError> {
    let place = ReplicaRank { replica: "engine".to_owned(), rank, ranks: 2 };
    let reader = reader(seat.clone(), 10_000);
    let stage = shadow(fleet, rank, 2);
    Replica::join(seat, place, unique().into(), reader, stage, Duration::from_secs(1), soon())
}

/// A rank that is bound has its round decided first, so that the others are free of it, and has installed nothing.
#[test]
fn a_rank_that_waits_for_others_gets_out_of_its_round() {
    let fleet = Fleet::new();
    let mut trainer = fleet.group("trainer", 1, SourceOptions::default());
    commit(&mut trainer, 1);
    let run = |stop, observer| {
        let seat = fleet.seat().with_stop(stop).with_observer(observer);
        let mut rank = join(&fleet, seat, 0).unwrap();
        let late = rank.refresh(1, soon()).unwrap_err();
        (rank, late)
    };
    let ((mut rank, late), took) = told(Some(Point::Prepared), Duration::ZERO, run, || {});
    assert!(matches!(late, ReplicaError::Deadline { .. }), "{late}");
    assert!(took < SOON, "{took:?}");
    assert_eq!((rank.installed(), rank.serving(), rank.stage().staged()), (None, None, Some(1)));
    // Once more: it begins nothing.
    rank.refresh(1, soon()).unwrap_err();
    drop(rank.leave().unwrap());
    let replica = fleet.model.replica("engine").unwrap();
    let entries = fleet.store.list(&replica).unwrap().entries;
    assert_eq!(entries.len(), 1, "more than a decision: {:?}", entries.keys());
    // Its next life and the other rank cut over.
    let mut ranks = [0, 1].map(|rank| join(&fleet, fleet.seat(), rank).unwrap());
    thread::scope(|scope| {
        let both = ranks
            .each_mut()
            .map(|rank| scope.spawn(|| assert_eq!(rank.refresh(1, soon()).unwrap().version, 1)));
        for rank in both {
            rank.join().unwrap();
        }
    });
    assert!(ranks.iter().all(|rank| live_is_whole(rank.stage(), 1)));
}

/// Another process has it, and lives.
#[test]
fn a_place_that_is_taken_is_not_waited_for() {
    let fleet = Fleet::new();
    let _first = join(&fleet, fleet.seat(), 0).unwrap();
    let run = |stop, _| join(&fleet, fleet.seat().with_stop(stop), 0).unwrap_err();
    let (taken, took) = told(None, Duration::ZERO, run, || {});
    assert!(matches!(taken, ReplicaError::Taken { .. }), "{taken}");
    assert!(took < SOON, "{took:?}");
    let _source = fleet.rank("trainer", 0, 1, SourceOptions::default());
    let run = |stop, _| {
        let source = ranks::source(&fleet.agent("second"), &rows(0, 1));
        let place = GroupRank { group: "trainer".to_owned(), rank: 0, ranks: 1 };
        let seat = fleet.seat().with_stop(stop);
        LiveSource::join(seat, place, source, SourceOptions::default(), soon()).unwrap_err()
    };
    let (taken, took) = told(None, Duration::ZERO, run, || {});
    assert!(matches!(taken, SourceError::Taken { .. }), "{taken}");
    assert!(took < SOON, "{took:?}");
}

fn lease(fleet: &Fleet, millis: u32) -> Key {
    let key = fleet.model.reader("trainer", &format!("r{}", unique())).unwrap();
    let lease = ReaderLease { incarnation: 1, version: 1, millis };
    fleet.store.put(&key, &lease.encode(), Life::Kept).unwrap();
    key
}

/// The version that is read is offered again, and who leaves waits for its readers all the same.
#[test]
fn an_update_that_waits_for_readers_does_not_begin() {
    let fleet = Fleet::new();
    let run = |stop, observer| {
        let agent = fleet.agent("trainer");
        let place = GroupRank { group: "trainer".to_owned(), rank: 0, ranks: 1 };
        let seat = fleet.seat().with_stop(stop).with_observer(observer);
        let source = ranks::source(&agent, &rows(0, 1));
        let mut live =
            LiveSource::join(seat, place, source, SourceOptions::default(), soon()).unwrap();
        let mut updating = live.begin_update(soon()).unwrap();
        write(&mut updating, 1);
        updating.commit(1).unwrap();
        lease(&fleet, 60_000);
        let busy = live.begin_update(soon()).unwrap_err();
        assert!(matches!(busy, SourceError::Busy { .. }), "{busy}");
        live
    };
    let (mut source, took) = told(Some(Point::Closed), Duration::ZERO, run, || {});
    assert!(took < SOON, "{took:?}");
    assert_eq!(source.offered(), Some(1));
    assert!(source.begin_update(soon()).is_err());
    let stats = *source.stats();
    assert_eq!((stats.waits, stats.waits_late), (2, 2));
    let began = Instant::now();
    assert_eq!(source.leave(millis(300)).unwrap().unreleased.len(), 1);
    assert!(began.elapsed() >= Duration::from_millis(300));
}

/// Makes targets whose peers may be silent.
fn targets(fleet: &Fleet, silence: &Silence) -> impl FnMut() -> Target<Hushed> + Send + 'static {
    let (network, silence) = (fleet.network.clone(), silence.clone());
    let options = LocalOptions::default().with_bytes_per_poll(fleet.bytes_per_poll);
    move || {
        let name = format!("shadow-{}", unique());
        let inner = Local::with_options(&network, &name, options).unwrap();
        let agent = Arc::new(Hushed::new(inner, &silence));
        ranks::target(&agent, &rows(0, 1), TargetOptions::default()).0
    }
}

/// A rank of such a target.
fn hushed(fleet: &Fleet, silence: &Silence) -> Shadow<Hushed, Unattended> {
    let (live, _) = ranks::memory(&rows(0, 1));
    Shadow::new(targets(fleet, silence)(), live, Vec::new(), Unattended).unwrap()
}

/// Whose place others take; and how many were made for that.
fn replaced(
    rank: Shadow<Hushed, Unattended>,
    mut targets: impl FnMut() -> Target<Hushed> + Send + 'static,
) -> (Shadow<Hushed, Unattended>, Arc<AtomicU64>) {
    let made = Arc::new(AtomicU64::new(0));
    let counted = made.clone();
    let rank = rank.with_failover(Quarantine::new("engine", u64::MAX), move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        Ok(targets())
    });
    (rank, made)
}

/// Reads that are under way are waited for, under their lease, until they have settled or as long as is said.
#[test]
fn what_is_read_is_waited_for() {
    for settles in [true, false] {
        let fleet = Fleet::new().slow(64);
        let mut trainer = fleet.group("trainer", 1, SourceOptions::default());
        commit(&mut trainer, 1);
        let silence = Silence::default();
        silence.fall("trainer-", 5);
        let (rank, made) = replaced(hushed(&fleet, &silence), targets(&fleet, &silence));
        let leases = || {
            let readers = fleet.model.readers("trainer").unwrap();
            fleet.store.list(&readers).unwrap().entries.len()
        };
        let reads = Duration::from_millis(if settles { 20_000 } else { 600 });
        let run = |stop: Stop, observer| {
            let mut reader =
                reader(fleet.seat().with_stop(stop.clone()).with_observer(observer), 20_000);
            let mut rank = rank.with_stop(stop);
            let refreshed = reader.refresh(&mut rank, &Wanted::at_least(1), soon());
            (refreshed, rank)
        };
        let behind = || {
            thread::sleep(Duration::from_millis(300));
            assert_eq!(leases(), 1, "a lease was given back before its reads had settled");
            if settles {
                silence.end();
            }
        };
        let ((refreshed, rank), took) = told(Some(Point::Reading), reads, run, behind);
        match refreshed {
            Ok(refreshed) => assert!(settles && refreshed.version == 1, "{refreshed:?}"),
            Err(failed) => {
                assert!(!settles && matches!(failed.ended, Ended::Deadline), "{failed}");
                assert!(failed.to_string().contains("late"), "{failed}");
            }
        }
        let least = Duration::from_millis(if settles { 300 } else { 600 });
        assert!(took >= least && took < least + SOON, "{took:?}");
        assert_eq!((leases(), made.load(Ordering::SeqCst)), (0, 0));
        silence.end();
        drop(rank);
    }
}

/// A rank that has given up reads of `trainer`, which is silent. Nothing takes over from it yet.
fn given_up(fleet: &Fleet, silence: &Silence) -> Shadow<Hushed, Unattended> {
    silence.fall("trainer-", 5);
    let (mut rank, until) = (hushed(fleet, silence), soon());
    // A busy machine may not begin them in time.
    while !silence.has_fallen() {
        assert!(Instant::now() < until, "nothing is read");
        let mut reader = reader(fleet.seat(), 200);
        reader.refresh(&mut rank, &Wanted::at_least(1), millis(200)).unwrap_err();
    }
    rank
}

/// Nobody waits for reads that were given up, and nothing takes over from them.
#[test]
fn nothing_takes_over_in_a_process_that_is_to_end() {
    let fleet = Fleet::new().slow(64);
    let mut trainer = fleet.group("trainer", 1, SourceOptions::default());
    commit(&mut trainer, 1);
    let silence = Silence::default();
    let (rank, made) = replaced(given_up(&fleet, &silence), targets(&fleet, &silence));
    let run = |stop, _| {
        let mut rank = rank.with_stop(stop);
        let failure = rank.make_ready("trainer", soon()).unwrap_err();
        // Of another group neither.
        rank.make_ready("other", soon()).unwrap_err();
        (rank, failure)
    };
    let ((rank, failure), took) = told(None, Duration::ZERO, run, || {});
    assert!(matches!(failure.cause, Cause::Late), "{failure}");
    assert!(took < SOON, "{took:?}");
    assert_eq!(made.load(Ordering::SeqCst), 0);
    silence.end();
    drop(rank);
}

/// An agent that is long in the making is not waited for, then or later.
#[test]
fn an_agent_in_the_making_is_not_waited_for() {
    let fleet = Fleet::new().slow(64);
    let mut trainer = fleet.group("trainer", 1, SourceOptions::default());
    commit(&mut trainer, 1);
    let silence = Silence::default();
    let ((begun, begins), (go_on, wait)) = (mpsc::channel(), mpsc::channel());
    let mut targets = targets(&fleet, &silence);
    let (rank, made) = replaced(given_up(&fleet, &silence), move || {
        begun.send(()).unwrap();
        wait.recv().unwrap();
        targets()
    });
    let run = |stop, _| {
        let mut rank = rank.with_stop(stop);
        let failure = rank.make_ready("other", soon()).unwrap_err();
        rank.make_ready("other", soon()).unwrap_err();
        (rank, failure)
    };
    let ((rank, failure), took) = told(None, Duration::ZERO, run, || {});
    let text = failure.to_string();
    assert!(failure.cause == Cause::Late && text.contains("in the making"), "{text}");
    assert!(took < SOON, "{took:?}");
    begins.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!(made.load(Ordering::SeqCst), 1);
    go_on.send(()).unwrap();
    silence.end();
    drop(rank);
}
