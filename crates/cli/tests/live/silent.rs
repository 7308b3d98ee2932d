//! A source that is there and never takes a connection.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::process::{EMULATED, Job, ONE_SIDED, have_nixl};

/// What an answer may take beyond its deadline, and what a machine that does other things as well makes of that.
const LATE: Duration = Duration::from_secs(1);

/// The pull is answered at its deadline with an error that says which call does not return, again and again, and ends when it has had
/// enough.
fn never_accepts(lane: &[(&str, &str)]) {
    let job = Job::new();
    let mut source = job.start_on(lane, "serve --source tp=1 --rank 0 --ttl 300");
    source.hear_version("published", 1);
    source.signal(Signal::STOP);
    let pull = "pull --target tp=1 --rank 0 --deadline 2 --wait 3 --drain 1";
    let mut target = job.start_on(lane, pull);
    target.hear("joined");
    let joined = Instant::now();
    let heard = target.hear_any(&["failed", "installed"]);
    let answered = joined.elapsed();
    if heard["event"] == "installed" {
        // One-sided reads may need no answer.
        assert!(lane.is_empty(), "a stopped source answered: {heard}");
        target.leave();
    } else {
        let error = heard["error"].as_str().unwrap();
        assert!(answered >= Duration::from_millis(1900), "{answered:?}: {error}");
        assert!(answered <= Duration::from_secs(2) + LATE, "{answered:?}: {error}");
        for part in ["`engine`", "`trainer`", "does not return", "end the silent peer"] {
            assert!(error.contains(part), "`{part}` is not in: {error}");
        }
        let (status, errors) = target.end();
        assert_eq!(status.code(), Some(1), "{errors}");
        assert!(errors.contains("(--wait)"), "{errors}");
        // A second step at most, half a second between them, and what ending takes.
        assert!(joined.elapsed() < Duration::from_secs(15), "{:?}", joined.elapsed());
    }
    source.signal(Signal::CONT);
    source.leave();
}

#[test]
fn a_source_that_never_accepts_costs_a_deadline_one_sided() {
    if have_nixl("a_source_that_never_accepts_costs_a_deadline_one_sided") {
        never_accepts(ONE_SIDED);
    }
}

#[test]
fn a_source_that_never_accepts_costs_a_deadline_emulated() {
    if have_nixl("a_source_that_never_accepts_costs_a_deadline_emulated") {
        never_accepts(EMULATED);
    }
}
