//! Two models read by two groups of targets of one process: neither gets the other's bytes, or waits for its peers.

use std::time::{Duration, Instant};

use crate::child::now_micros;
use crate::model::Model;
use crate::processes::{Lane, Role};
use crate::report::{Report, millis, percentile};
use crate::source::{self, Pace};
use crate::target::{self, Kind};
use crate::world::{Refit, Sums, World};

/// With this model's source nothing happens; the other's is stopped from time to time.
const CALM: u64 = 1;
const SLOW: u64 = 2;

/// So few refits can be compared.
const ENOUGH: usize = 10;

/// So many times the source of one model is stopped on one lane.
pub(crate) fn run(lane: Lane, rounds: u64, report: &mut Report) {
    let mut sums = Sums::default();
    let mut world = World::new(lane);
    let folder = world.meeting();
    let mut parts = Vec::new();
    let mut sources = Vec::new();
    for salt in [CALM, SLOW] {
        let model = Model::small().salted(salt);
        let (ranks, pace, most_lease) = (1, Pace::Ticks(20_000), 10_000);
        let (folder, group) = (folder.clone(), "source".to_owned());
        let part =
            source::Part { folder: folder.clone(), model, group, rank: 0, ranks, pace, most_lease };
        sources.push(world.add(Role::Source(part)));
        for kind in [Kind::Direct, Kind::Replica(0, 1)] {
            let (patience, times, again, rest) = (400, 0, true, 1_000);
            let folder = folder.clone();
            parts.push(target::Part { folder, model, kind, patience, times, again, rest });
        }
    }
    // Four targets of two models in one process.
    world.add(Role::Targets(parts));
    world.wait_ready(&mut sums, report);
    let (mut before, mut during, mut hit) = (Vec::new(), Vec::new(), 0);
    let calm = |refits: &[Refit], since: u64, until: u64| -> Vec<u64> {
        // Like with like: what reads nothing takes no time, and the mix of both changes when the other model's targets wait.
        let within = |it: &&Refit| {
            it.model == CALM && it.ok && it.reads && it.began >= since && it.ended <= until
        };
        refits.iter().filter(within).map(|it| it.ended - it.began).collect()
    };
    let mut done = 0;
    // A busy machine gets through few refits in a round.
    while done < rounds || (before.len().min(during.len()) < ENOUGH && done < 10 * rounds) {
        done += 1;
        for stopped in [false, true] {
            if stopped {
                world.stop(sources[1]);
            }
            world.take_refits();
            let since = now_micros();
            let half = Instant::now() + Duration::from_millis(600);
            world.listen(half, &mut sums, report, |_| false);
            let until = now_micros();
            let refits = world.take_refits();
            let times = calm(&refits, since, until);
            if stopped {
                world.resume(sources[1]);
                during.extend(times);
                hit += refits.iter().filter(|it| it.model == SLOW && !it.ok).count();
            } else {
                before.extend(times);
            }
        }
        // Until it is there again.
        let back = Instant::now() + Duration::from_millis(600);
        world.listen(back, &mut sums, report, |_| false);
    }
    world.end(&mut sums, report);
    let lane = lane.name();
    eprintln!("neighbours, {lane}: {done} rounds");
    before.sort_unstable();
    during.sort_unstable();
    let (usual, beside) = (percentile(&before, 50), percentile(&during, 50));
    report.number("refits", sums.refits);
    report.number("wrong_bytes", sums.torn);
    report.number("failed_beside_the_stopped", hit as u64);
    report.number(
        "calm_refits",
        serde_json::json!({ "beside_a_running_peer": before.len(), "beside_a_stopped_peer": during.len() }),
    );
    report.times("beside_a_running_peer", &mut before);
    report.times("beside_a_stopped_peer", &mut during);
    let enough = before.len().min(during.len()) >= ENOUGH;
    report.check(enough, || "too few refits to compare".to_owned());
    // A busy machine doubles a median by itself; waiting for a stopped peer would make it a hundred times longer.
    report.check(beside <= 2 * usual + 5_000, || {
        format!(
            "a refit took {} ms, and {} ms beside a stopped peer",
            millis(usual),
            millis(beside)
        )
    });
}
