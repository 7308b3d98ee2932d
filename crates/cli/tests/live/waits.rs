//! What the metrics of a source say of its readers.

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::lease::Lease;
use crate::process::{Job, PATIENCE, have_nixl};
use crate::versions::figure;

/// Waits, those that came to nothing, and leases that were given back and that ran out.
fn counts(page: &str) -> [f64; 4] {
    ["reader_waits", "reader_waits_late", "leases_released", "leases_expired"]
        .map(|name| figure(page, &format!("refit_{name}_total")))
}

/// What is told is counted when the step has ended.
fn comes_to(page: &str, wanted: impl Fn([f64; 4]) -> bool) {
    let until = Instant::now() + PATIENCE;
    while !wanted(counts(page)) {
        assert!(Instant::now() < until, "{:?}", counts(page));
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_a_source_waited_for_is_counted() {
    if !have_nixl("what_a_source_waited_for_is_counted") {
        return;
    }
    let job = Job::new();
    let mut source = job.start("serve --source tp=1 --rank 0 --metrics 127.0.0.1:0");
    let page = source.hear("metrics")["address"].as_str().unwrap().to_owned();
    source.hear_version("published", 1);
    comes_to(&page, |counts| counts == [0.0; 4]);
    assert_eq!(figure(&page, "refit_reader_wait_seconds_total"), 0.0);

    let lease = Lease::take(&job, 600_000);
    source.signal(Signal::USR1);
    lease.is_waited_for();
    thread::sleep(Duration::from_millis(300));
    lease.give_back();
    source.hear_version("published", 2);
    comes_to(&page, |counts| counts == [1.0, 0.0, 1.0, 0.0]);
    let waited = figure(&page, "refit_reader_wait_seconds_total");
    assert!(waited >= 0.3, "{waited}");

    // A reader that hangs.
    let lease = Lease::take(&job, 500);
    source.signal(Signal::USR1);
    source.hear_version("published", 3);
    comes_to(&page, |counts| counts == [2.0, 0.0, 1.0, 1.0]);
    assert!(figure(&page, "refit_reader_wait_seconds_total") >= waited + 0.4);
    lease.give_back();
    source.leave();
}

#[test]
fn a_wait_that_came_to_nothing_is_counted() {
    if !have_nixl("a_wait_that_came_to_nothing_is_counted") {
        return;
    }
    let job = Job::new();
    let serve = "serve --source tp=1 --rank 0 --deadline 0.5 --metrics 127.0.0.1:0 --lease 600";
    let mut source = job.start(serve);
    let page = source.hear("metrics")["address"].as_str().unwrap().to_owned();
    source.hear_version("published", 1);
    let lease = Lease::take(&job, 600_000);
    source.signal(Signal::USR1);
    let failed = source.hear("failed");
    assert!(failed["error"].as_str().unwrap().contains("is still read under"), "{failed}");
    comes_to(&page, |[waits, late, released, expired]| {
        waits >= 1.0 && late >= 1.0 && [released, expired] == [0.0; 2]
    });
    lease.give_back();
    source.hear_version("published", 2);
    source.leave();
}
