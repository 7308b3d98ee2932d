//! A writer that changes its parameters while they are read, in many schedules.

use std::time::{Duration, Instant};

use crate::model::Model;
use crate::processes::{Lane, Role};
use crate::report::Report;
use crate::source::{self, Pace};
use crate::target::{self, Kind};
use crate::world::{Sums, World};

/// Every this many reads the writer begins another sequence of pauses.
const OF_ONE_WRITER: u64 = 250;

/// So many reads on one lane, in halves: the writer waits for readers, or for nobody.
pub(crate) fn run(lane: Lane, schedules: u64, seed: u64, report: &mut Report) {
    for (waits, most_lease) in [("leases_kept", 10_000), ("leases_ignored", 0)] {
        let mut sums = Sums::default();
        let half = schedules.div_ceil(2);
        let (mut read, mut number) = (0, 0);
        while read < half {
            let times = OF_ONE_WRITER.min(half - read);
            let mut world = World::new(lane);
            let (folder, model) = (world.meeting(), Model::large());
            world.add(Role::Source(source::Part {
                folder: folder.clone(),
                model,
                group: "writer".to_owned(),
                rank: 0,
                ranks: 1,
                // From never between two reads to always within one.
                pace: Pace::Random(1_000 << (number % 5), seed ^ number),
                most_lease,
            }));
            let kind = if number % 2 == 0 { Kind::Direct } else { Kind::Replica(0, 1) };
            let part = target::Part {
                folder,
                model,
                kind,
                patience: 20_000,
                times,
                again: false,
                rest: 500,
            };
            world.add(Role::Targets(vec![part]));
            world.wait_ready(&mut sums, report);
            let until = Instant::now() + Duration::from_secs(180);
            let mut answers = 0;
            while answers < times && Instant::now() < until {
                world.listen(until, &mut sums, report, World::has_refits);
                answers += world.take_refits().len() as u64;
            }
            report.check(answers >= times, || format!("{answers} of {times} reads were answered"));
            world.end(&mut sums, report);
            read += times;
            number += 1;
        }
        let lane = lane.name();
        eprintln!("writer, {lane}, {waits}: {read} schedules");
        for (name, count) in [
            ("schedules", read),
            ("installed", sums.refits),
            ("named_errors", sums.errors),
            ("discarded_and_read_again", sums.retries),
            ("torn_installs", sums.torn),
            ("aborts", sums.aborts),
        ] {
            report.number(format!("{waits}.{name}"), count);
        }
        if !sums.kinds.is_empty() {
            report.number(format!("{waits}.errors"), serde_json::json!(sums.kinds));
        }
        report.check(sums.refits > 0, || "nothing was installed: it shows nothing".to_owned());
        let shows = most_lease > 0 || half < 100 || sums.retries > 0;
        report.check(shows, || "the writer never came in between: it shows nothing".to_owned());
    }
}
