//! Refits without end: what a process holds does not grow.

use std::time::{Duration, Instant};

use crate::model::Model;
use crate::processes::{Lane, Role};
use crate::report::Report;
use crate::source::{self, Pace};
use crate::target::{self, Kind};
use crate::world::{Sums, World};

/// How often files are counted, and how long after one another.
const LOOKS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(2);

/// What a process holds at one moment.
#[derive(Clone, Copy, Debug, Default)]
struct Holds {
    rss_kib: u64,
    files: u64,
    threads: u64,
    registrations: u64,
}

impl Holds {
    fn of(id: u32, registrations: u64, store: &str) -> Self {
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
        };
        // What is opened and closed again at once does not grow: of several looks the one that saw the fewest counts.
        let looks = (0..LOOKS).map(|look| {
            std::thread::sleep(if look == 0 { Duration::ZERO } else { PAUSE });
            files(id, store)
        });
        let files = looks.min().unwrap_or(0);
        let (rss_kib, threads) = (field("VmRSS:"), field("Threads:"));
        Self { rss_kib, files, threads, registrations }
    }

    /// The most of both.
    fn most(self, other: Self) -> Self {
        Self {
            rss_kib: self.rss_kib.max(other.rss_kib),
            files: self.files.max(other.files),
            threads: self.threads.max(other.threads),
            registrations: self.registrations.max(other.registrations),
        }
    }
}

/// The files that a process has open now, but for those of the store.
fn files(id: u32, store: &str) -> u64 {
    let held = |file: &std::io::Result<std::fs::DirEntry>| {
        let to = file.as_ref().ok().and_then(|file| std::fs::read_link(file.path()).ok());
        to.is_some_and(|to| !to.starts_with(store))
    };
    let files = std::fs::read_dir(format!("/proc/{id}/fd"));
    files.map_or(0, |files| files.filter(held).count() as u64)
}

/// So many warm refits of one target on one lane, from a source that commits meanwhile. Both are watched.
pub(crate) fn run(lane: Lane, refits: u64, report: &mut Report) {
    let warm = 500.min(refits / 4);
    let mut sums = Sums::default();
    let mut world = World::new(lane);
    let (folder, store, model) = (world.meeting(), world.meeting(), Model::small());
    let source = world.add(Role::Source(source::Part {
        folder: folder.clone(),
        model,
        group: "source".to_owned(),
        rank: 0,
        ranks: 1,
        pace: Pace::Ticks(20_000),
        most_lease: 10_000,
    }));
    let (kind, patience, rest) = (Kind::Direct, 20_000, 0);
    let part = target::Part { folder, model, kind, patience, times: refits, again: true, rest };
    let target = world.add(Role::Targets(vec![part]));
    world.wait_ready(&mut sums, report);
    let until = Instant::now() + Duration::from_secs(540);
    let (mut seen, mut next) = (0, warm);
    let mut first: Option<[Holds; 2]> = None;
    let mut most = [Holds::default(); 2];
    while seen < refits && Instant::now() < until {
        world.listen(until, &mut sums, report, World::has_refits);
        let answers = world.take_refits();
        seen += answers.len() as u64;
        let registrations = answers.last().map_or(0, |last| last.registrations);
        if seen >= next {
            let holds = [
                Holds::of(world.process(target).id(), registrations, &store),
                Holds::of(world.process(source).id(), 0, &store),
            ];
            first.get_or_insert(holds);
            most = [most[0].most(holds[0]), most[1].most(holds[1])];
            next = seen + (refits / 100).max(10);
        }
    }
    world.end(&mut sums, report);
    let lane = lane.name();
    eprintln!("flat, {lane}: {seen} refits");
    report.check(seen >= refits && sums.errors == 0, || {
        format!("{seen} of {refits} were answered, {} by an error", sums.errors)
    });
    report.number("refits", sums.refits);
    let first = first.unwrap_or_default();
    for (who, first, most) in [("target", first[0], most[0]), ("source", first[1], most[1])] {
        let grown = [
            ("rss_kib", first.rss_kib, most.rss_kib, 1024),
            ("files", first.files, most.files, 0),
            ("threads", first.threads, most.threads, 0),
            ("registrations", first.registrations, most.registrations, 0),
        ];
        for (what, first, most, allowed) in grown {
            if who == "source" && what == "registrations" {
                continue;
            }
            report.check(first > 0, || format!("{who}: no {what} were seen"));
            let grown = most.saturating_sub(first);
            report.number(
                format!("{who}.{what}"),
                serde_json::json!({ "warm": first, "grown": grown }),
            );
            report.check(grown <= allowed, || format!("{who}: {what} grew from {first} to {most}"));
        }
    }
}
