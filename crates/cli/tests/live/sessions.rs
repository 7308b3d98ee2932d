//! Ranks that the rendezvous takes for dead while they live, and ranks that are told to leave twice.

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::lease::Lease;
use crate::process::{Job, PATIENCE, Rank, have_nixl};
use crate::versions::figure;

/// Longer than the time to live of a session, which is a second here.
const TOO_LONG: Duration = Duration::from_millis(2500);

#[test]
fn a_target_that_was_stopped_for_too_long_joins_again() {
    if !have_nixl("a_target_that_was_stopped_for_too_long_joins_again") {
        return;
    }
    let job = Job::new();
    let mut source = job.start("serve --source tp=1 --rank 0");
    let mut targets = [0, 1]
        .map(|rank| job.start(&format!("pull --target tp=2 --rank {rank} --metrics 127.0.0.1:0")));
    let page = targets[1].hear("metrics")["address"].as_str().unwrap().to_owned();
    for target in &mut targets {
        target.hear_version("installed", 1);
    }
    let count = |name: &str| figure(&page, name);
    let before =
        ["refit_pool_registrations_total", "refit_refits_total"].map(|name| (name, count(name)));

    targets[1].signal(Signal::STOP);
    thread::sleep(TOO_LONG);
    targets[1].signal(Signal::CONT);
    targets[1].hear("rejoined");
    // What it had staged becomes live again, and every byte is compared. Nothing was read or registered for it.
    targets[1].hear_version("installed", 1);
    assert_eq!(count("refit_rejoins_total"), 1.0);
    for (name, value) in before {
        assert_eq!(count(name), value, "{name}");
    }
    source.signal(Signal::USR1);
    for target in &mut targets {
        target.hear_version("installed", 2);
    }
    targets.iter_mut().for_each(Rank::leave);
    source.leave();
}

#[test]
fn a_source_that_was_stopped_for_too_long_offers_its_version_again() {
    if !have_nixl("a_source_that_was_stopped_for_too_long_offers_its_version_again") {
        return;
    }
    let job = Job::new();
    let mut source = job.start("serve --source tp=1 --rank 0 --metrics 127.0.0.1:0");
    let page = source.hear("metrics")["address"].as_str().unwrap().to_owned();
    source.hear_version("published", 1);
    // Somebody has to look for the store to notice.
    let mut first = job.start("pull --target tp=1 --rank 0 --replica first");
    first.hear_version("installed", 1);
    source.signal(Signal::STOP);
    thread::sleep(TOO_LONG);
    source.signal(Signal::CONT);
    source.hear("failed");
    source.hear("rejoined");
    let mut second = job.start("pull --target tp=1 --rank 0 --replica second");
    second.hear_version("installed", 1);
    // What is told is counted when the step has ended.
    let until = Instant::now() + PATIENCE;
    while figure(&page, "refit_rejoins_total") < 1.0 {
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(figure(&page, "refit_version"), 1.0);
    first.leave();
    second.leave();
    source.leave();
}

/// It reads into its live parameters, on its own: nobody tells it that its session has ended, before it wants to read.
#[test]
fn a_paused_target_that_was_stopped_for_too_long_reads_the_next_version() {
    if !have_nixl("a_paused_target_that_was_stopped_for_too_long_reads_the_next_version") {
        return;
    }
    let job = Job::new();
    let mut source = job.start("serve --source tp=1 --rank 0");
    for relay in ["", " --relay"] {
        let mut target = job
            .start(&format!("pull --target tp=1 --rank 0 --paused --metrics 127.0.0.1:0{relay}"));
        let page = target.hear("metrics")["address"].as_str().unwrap().to_owned();
        let bytes = target.hear("joined")["bytes"].clone();
        let version = target.hear("installed")["version"].as_u64().unwrap();
        let registered = figure(&page, "refit_pool_registrations_total");
        target.signal(Signal::STOP);
        thread::sleep(TOO_LONG);
        target.signal(Signal::CONT);
        source.signal(Signal::USR1);
        target.hear("rejoined");
        let installed = target.hear_version("installed", version + 1);
        assert_eq!(installed["verified_bytes"], bytes);
        assert_eq!(figure(&page, "refit_rejoins_total"), 1.0);
        assert_eq!(figure(&page, "refit_pool_registrations_total"), registered);
        target.leave();
    }
    source.leave();
}

/// It waits for a reader that never ends, and for as long as it may; told again, it does not.
#[test]
fn a_second_signal_ends_it_where_it_stands() {
    if !have_nixl("a_second_signal_ends_it_where_it_stands") {
        return;
    }
    let job = Job::new();
    let mut source = job.start("serve --source tp=1 --rank 0 --drain 600");
    source.hear_version("published", 1);
    let _lease = Lease::take(&job, 600_000);

    source.signal(Signal::TERM);
    source.hear("leaving");
    thread::sleep(Duration::from_millis(500));
    source.signal(Signal::TERM);
    let told = Instant::now();
    let (status, errors) = source.end();
    assert_eq!(status.code(), Some(1), "{errors}");
    // Not when it has waited.
    assert!(told.elapsed() < Duration::from_secs(25), "{:?}", told.elapsed());
}
