use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use refit_service::puller::{Cause, PullFailure, Puller, Reading};
use refit_service::reader::{Ended, ReaderOptions, Wanted};
use refit_service::rendezvous::Rendezvous;
use refit_service::source::SourceOptions;

use super::fleet::{Fleet, commit, is_whole, millis, soon};

/// A puller that does what it is told.
#[derive(Debug, Default)]
struct Scripted {
    /// By group: what comes of reading it.
    fails: Vec<(&'static str, Cause)>,
    pulls: Vec<(String, u64)>,
    takes: Duration,
    /// Set once it reads.
    reads: Arc<AtomicBool>,
}

impl Puller for Scripted {
    fn pull(&mut self, reading: &Reading<'_>, deadline: Instant) -> Result<(), PullFailure> {
        assert!(!reading.publications.is_empty());
        assert_eq!(reading.publications.len(), reading.expected.len());
        self.pulls.push((reading.group.to_owned(), reading.version));
        self.reads.store(true, Ordering::SeqCst);
        std::thread::sleep(self.takes.min(deadline.saturating_duration_since(Instant::now())));
        match self.fails.iter().find(|(group, _)| *group == reading.group) {
            Some((_, cause)) => Err(PullFailure::new(*cause, "as told")),
            None => Ok(()),
        }
    }

    fn make_ready(&mut self, _: &str, _: Instant) -> Result<(), PullFailure> {
        Ok(())
    }
}

#[test]
fn what_fails_here_is_read_there() {
    let fleet = Fleet::new();
    for group in ["dp0", "dp1", "dp2"] {
        commit(&mut fleet.group(group, 1, SourceOptions::default()).leak()[..], 3);
    }
    for cause in [
        Cause::Torn,
        Cause::Stale,
        Cause::Vanished,
        Cause::Late,
        Cause::Damaged,
        Cause::Refused,
        Cause::Failed,
    ] {
        let mut reader = fleet.reader("engine", ReaderOptions::default());
        let fails = vec![("dp0", cause), ("dp2", cause)];
        let mut puller = Scripted { fails, ..Scripted::default() };
        let refreshed = reader.refresh(&mut puller, &Wanted::at_least(3), soon()).unwrap();
        assert_eq!((refreshed.group.as_str(), refreshed.version), ("dp1", 3));
        assert!(puller.pulls.len() <= 3, "{:?}", puller.pulls);
        assert_eq!(reader.stats().retries.total(), puller.pulls.len() as u64 - 1);
    }
    assert_eq!(fleet.store.list(&fleet.model.readers("dp0").unwrap()).unwrap().entries.len(), 0);
}

#[test]
fn an_error_lists_every_attempt_and_comes_at_the_deadline() {
    let fleet = Fleet::new();
    let mut old = fleet.group("old", 1, SourceOptions::default());
    commit(&mut old, 2);
    let mut trainer = fleet.group("trainer", 2, SourceOptions::default());
    commit(&mut trainer, 3);
    commit(&mut trainer[..1], 4);
    let mut reader = fleet.reader("engine", ReaderOptions::default());
    let mut puller = Scripted { fails: vec![("old", Cause::Torn)], ..Scripted::default() };
    let began = Instant::now();
    let failed = reader.refresh(&mut puller, &Wanted::at_least(1), millis(300)).unwrap_err();
    let took = began.elapsed();
    assert!((Duration::from_millis(300)..Duration::from_millis(550)).contains(&took), "{took:?}");
    assert!(matches!(failed.ended, Ended::Deadline));
    assert!(failed.attempts.len() > 2);
    assert_eq!(failed.attempts.len() as u64 + failed.omitted, puller.pulls.len() as u64);
    // It pauses between attempts, longer and longer.
    assert!(puller.pulls.len() < 40, "{}", puller.pulls.len());
    let said = failed.to_string();
    for part in [
        "version 2 of group `old`",
        "torn: as told",
        "group `trainer` offered nothing",
        "holds version",
    ] {
        assert!(said.contains(part), "{said}");
    }
    // What cannot be joined is tried once.
    let mut puller = Scripted { fails: vec![("old", Cause::Refused)], ..Scripted::default() };
    let failed = reader.refresh(&mut puller, &Wanted::at_least(1), millis(50)).unwrap_err();
    assert_eq!((failed.attempts.len(), puller.pulls.len()), (1, 1));
    // What was lost ends it at once.
    let mut puller = Scripted { fails: vec![("old", Cause::Lost)], ..Scripted::default() };
    let failed = reader.refresh(&mut puller, &Wanted::at_least(1), soon()).unwrap_err();
    assert!(matches!(failed.ended, Ended::Lost(_)), "{failed}");
}

/// A source whose process is gone while its session is not yet: its reads fail, and its copy is read.
#[test]
fn a_dead_agent_costs_one_attempt() {
    let fleet = Fleet::new();
    let mut dead = fleet.group("dp0", 1, SourceOptions::default());
    commit(&mut dead, 7);
    let mut alive = fleet.group("dp1", 1, SourceOptions::default());
    commit(&mut alive, 7);
    // The entries of dp0 stay; its agent does not.
    let entries = fleet.store.list(&fleet.model.key().clone()).unwrap().entries;
    drop(dead);
    for (key, value) in entries {
        fleet.store.put(&key, &value, refit_service::rendezvous::Life::Kept).unwrap();
    }
    for _ in 0..4 {
        let mut reader = fleet.reader("engine", ReaderOptions::default());
        let mut direct = fleet.direct(0, 1);
        let refreshed = reader.refresh(&mut direct, &Wanted::at_least(7), soon()).unwrap();
        assert_eq!(refreshed.group, "dp1");
        assert!(is_whole(&direct, 7));
        assert!(reader.stats().retries.total() <= 1);
    }
}

/// P10: who leaves is drained first, and those who come later go elsewhere.
#[test]
fn p10_a_source_leaves_when_its_readers_have_left() {
    let fleet = Fleet::new();
    let mut leaving = fleet.group("dp0", 1, SourceOptions::default());
    commit(&mut leaving, 1);
    let mut staying = fleet.group("dp1", 1, SourceOptions::default());
    let reads = Arc::new(AtomicBool::new(false));
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let mut reader = fleet.reader("engine", ReaderOptions::default());
            let takes = Duration::from_millis(200);
            let mut puller = Scripted { takes, reads: reads.clone(), ..Scripted::default() };
            reader.refresh(&mut puller, &Wanted::at_least(1), soon()).unwrap();
            Instant::now()
        });
        while !reads.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        let left = leaving.pop().unwrap().leave(soon()).unwrap();
        assert_eq!(left.unreleased, []);
        let left_at = Instant::now();
        let read_at = reading.join().unwrap();
        assert!(read_at <= left_at + Duration::from_millis(5));
    });
    commit(&mut staying, 2);
    let mut reader = fleet.reader("engine", ReaderOptions::default());
    let refreshed = reader.refresh(&mut fleet.direct(0, 1), &Wanted::at_least(1), soon()).unwrap();
    assert_eq!(refreshed.group, "dp1");
    // Readers that do not give back their leases are named.
    let key = fleet.model.reader("dp1", "dead").unwrap();
    let lease = refit_service::message::ReaderLease { incarnation: 1, version: 2, millis: 50 };
    let value = refit_service::message::Message::encode(&lease);
    fleet.store.put(&key, &value, refit_service::rendezvous::Life::Kept).unwrap();
    let left = staying.pop().unwrap().leave(soon()).unwrap();
    assert_eq!(left.unreleased, [key]);
}

/// A reader whose transport crawls holds its own lease, and nobody else up.
#[test]
fn a_slow_peer_does_not_slow_the_others() {
    let fleet = Fleet::new();
    let mut trainer = fleet.group("trainer", 2, SourceOptions::default());
    commit(&mut trainer, 1);
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| {
            let mut reader = fleet.reader("slow", ReaderOptions::default());
            let mut puller = Scripted { takes: Duration::from_millis(400), ..Scripted::default() };
            reader.refresh(&mut puller, &Wanted::at_least(1), soon()).unwrap();
        });
        while fleet.store.list(&fleet.model.readers("trainer").unwrap()).unwrap().entries.is_empty()
        {
            std::thread::yield_now();
        }
        let began = Instant::now();
        for _ in 0..10 {
            let mut reader = fleet.reader("quick", ReaderOptions::default());
            reader.refresh(&mut fleet.direct(0, 1), &Wanted::at_least(1), soon()).unwrap();
        }
        assert!(began.elapsed() < Duration::from_millis(300), "{:?}", began.elapsed());
        slow.join().unwrap();
    });
}

/// Ranks come and go between versions; readers follow.
#[test]
fn a_group_grows_and_shrinks_between_versions() {
    let fleet = Fleet::new();
    let mut reader = fleet.reader("engine", ReaderOptions::default());
    let mut direct = fleet.direct(0, 1);
    for (version, ranks) in [(1, 1), (2, 4), (3, 2), (4, 3)] {
        let mut trainer = fleet.group("trainer", ranks, SourceOptions::default());
        commit(&mut trainer, version);
        let refreshed = reader.refresh(&mut direct, &Wanted::at_least(version), soon()).unwrap();
        assert_eq!(refreshed.version, version);
        assert!(is_whole(&direct, version));
        for source in trainer {
            assert_eq!(source.leave(soon()).unwrap().unreleased, []);
        }
    }
}
