//! Ranks that are told to leave in the middle of something.

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::lease::Lease;
use crate::process::{EMULATED, Job, ONE_SIDED, Rank, have_nixl};

/// What leaving may take that waits for nobody, on a machine that does other things as well: far less than any deadline here.
const SOON: Duration = Duration::from_secs(10);

/// For which processes are in the middle of something by then.
const BEGUN: Duration = Duration::from_millis(1500);

/// Told to leave, it does so well and at once.
fn leaves_soon(rank: &mut Rank) {
    let told = Instant::now();
    rank.leave();
    assert!(told.elapsed() < SOON, "{:?}", told.elapsed());
}

/// It has staged a version and waits for the other rank: the round is aborted, the place is given up, and nothing of it is
/// left for who comes next.
#[test]
fn a_target_that_waits_for_others_leaves_when_it_is_told_to() {
    if !have_nixl("a_target_that_waits_for_others_leaves_when_it_is_told_to") {
        return;
    }
    let job = Job::new();
    let mut source = job.start("serve --source tp=1 --rank 0 --ttl 300");
    let start = |rank: u32| {
        job.start(&format!(
            "pull --target tp=2 --rank {rank} --deadline 60 --drain 30 --ttl 300 --metrics 127.0.0.1:0"
        ))
    };
    let mut alone = start(0);
    alone.hear("joined");
    thread::sleep(BEGUN);
    leaves_soon(&mut alone);
    assert!(!alone.heard("installed") && !alone.heard("failed"));
    // Its session would have lived for minutes.
    let began = Instant::now();
    let mut both = [start(0), start(1)];
    both.iter_mut().for_each(|rank| drop(rank.hear_version("installed", 1)));
    assert!(began.elapsed() < 2 * SOON, "{:?}", began.elapsed());
    both.iter_mut().for_each(leaves_soon);
    leaves_soon(&mut source);
}

/// It waits for a former life of its own, which is another process that lives.
#[test]
fn who_waits_for_its_place_leaves_when_it_is_told_to() {
    if !have_nixl("who_waits_for_its_place_leaves_when_it_is_told_to") {
        return;
    }
    let job = Job::new();
    for what in ["serve --source tp=1", "pull --target tp=1", "pull --target tp=1 --relay"] {
        let start = || job.start(&format!("{what} --rank 0 --deadline 60 --drain 30"));
        let mut first = start();
        first.hear("joined");
        let mut second = start();
        second.hear("preflight");
        thread::sleep(BEGUN);
        leaves_soon(&mut second);
        assert!(!second.heard("joined"));
        leaves_soon(&mut first);
    }
}

/// It waits for a reader before it writes the next version: that is not written, and the reader may still give back its lease.
#[test]
fn a_source_that_waits_for_a_reader_leaves_when_it_is_told_to() {
    if !have_nixl("a_source_that_waits_for_a_reader_leaves_when_it_is_told_to") {
        return;
    }
    let job = Job::new();
    let mut source = job.start("serve --source tp=1 --rank 0 --deadline 60 --drain 30 --lease 600");
    source.hear_version("published", 1);
    let lease = Lease::take(&job, 600_000);
    source.signal(Signal::USR1);
    lease.is_waited_for();
    source.signal(Signal::TERM);
    let told = Instant::now();
    source.hear("leaving");
    assert!(told.elapsed() < SOON, "{:?}", told.elapsed());
    thread::sleep(Duration::from_millis(300));
    assert!(!source.heard("left"), "it did not wait for its reader");
    lease.give_back();
    let (status, errors) = source.end();
    assert_eq!(status.code(), Some(0), "{errors}");
    assert!(source.heard("left") && !source.heard("failed"));
}

/// A reader that keeps its lease is waited for as long as --drain says, and what ends it is said.
#[test]
fn a_source_that_is_read_still_says_so() {
    if !have_nixl("a_source_that_is_read_still_says_so") {
        return;
    }
    let job = Job::new();
    let mut source = job.start("serve --source tp=1 --rank 0 --drain 1 --lease 600");
    source.hear_version("published", 1);
    let _lease = Lease::take(&job, 600_000);
    source.signal(Signal::TERM);
    let told = Instant::now();
    let left = source.hear("left");
    assert_eq!(left["unreleased"], 1);
    let (status, errors) = source.end();
    assert!(told.elapsed() >= Duration::from_secs(1) && told.elapsed() < SOON);
    assert_eq!(status.code(), Some(1), "{errors}");
    assert!(errors.contains("1 readers did not give their leases back"), "{errors}");
}

/// When a stopped source goes on: longer than a target that is dropped waits by itself, and sooner than --drain.
const GOES_ON: Duration = Duration::from_secs(3);

/// Told to leave while it reads from a source that is stopped, it waits for its reads, at most for --drain. Says whether it was
/// reading: one-sided reads may need no answer.
fn leaves_a_stopped_source(lane: &[(&str, &str)], goes_on: bool) -> bool {
    let job = Job::new();
    let mut source = job.start_on(lane, "serve --source tp=1 --rank 0 --ttl 300");
    let drain = if goes_on { 30 } else { 4 };
    let pull = format!("pull --target tp=1 --rank 0 --deadline 120 --drain {drain} --ttl 300");
    let mut target = job.start_on(lane, &pull);
    // Connected, so that it is the reads that are under way.
    target.hear_version("installed", 1);
    source.signal(Signal::USR1);
    source.hear_version("published", 2);
    source.signal(Signal::STOP);
    thread::sleep(BEGUN);
    let reads = !target.heard_version("installed", 2);
    target.signal(Signal::TERM);
    let told = Instant::now();
    if goes_on {
        thread::sleep(GOES_ON);
        source.signal(Signal::CONT);
    }
    let (status, errors) = target.end();
    let took = told.elapsed();
    assert!(took < 2 * SOON, "{took:?}");
    let (code, least) = match (reads, goes_on) {
        (false, _) => (0, Duration::ZERO),
        (true, true) => (0, GOES_ON),
        (true, false) => (1, Duration::from_secs(4)),
    };
    assert_eq!(status.code(), Some(code), "{errors}");
    assert!(took >= least, "{took:?}");
    assert_eq!(errors.contains("--drain"), code == 1, "{errors}");
    // Its place was given up first, though its session would have lived for minutes.
    assert!(target.heard("left"), "{errors}");
    source.signal(Signal::CONT);
    if code == 1 {
        // What becomes of a source whose reader has gone in the middle nobody can say.
        return reads;
    }
    source.signal(Signal::USR1);
    source.hear_version("published", 3);
    let mut next = job.start_on(lane, "pull --target tp=1 --rank 0 --versions 1");
    next.hear_version("installed", 3);
    assert_eq!(next.end().0.code(), Some(0));
    leaves_soon(&mut source);
    reads
}

#[test]
fn p10_a_target_waits_for_its_reads_before_it_ends_one_sided() {
    if have_nixl("p10_a_target_waits_for_its_reads_before_it_ends_one_sided") {
        leaves_a_stopped_source(ONE_SIDED, true);
        leaves_a_stopped_source(ONE_SIDED, false);
    }
}

#[test]
fn p10_a_target_waits_for_its_reads_before_it_ends_emulated() {
    if have_nixl("p10_a_target_waits_for_its_reads_before_it_ends_emulated") {
        // It may have read before the source stopped, and mostly has not.
        let read = |goes_on| (0..5).any(|_| leaves_a_stopped_source(EMULATED, goes_on));
        assert!(read(true) && read(false), "a stopped source answered");
    }
}
