//! Faults in real processes over real NIXL, and whether every promise holds: `cargo xtask chaos`.
//!
//! ```text
//!  supervisor ──starts, stops, kills, restarts──▶ source ranks: commit versions whose every byte is known
//!      ▲                                          target ranks: refit, verify every byte
//!      └──────────────── a line for every answer ─────┘
//! ```

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a panic of a process is a broken promise, and counted as one"
)]

mod child;
mod flat;
mod model;
mod neighbours;
mod options;
mod processes;
mod random;
mod report;
mod source;
mod target;
mod trials;
mod world;
mod writer;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::options::Options;
use crate::processes::{Lane, Role};
use crate::report::Report;

/// A run that takes longer is ended, whatever it waits for. Its processes end with it.
const LIMIT: Duration = Duration::from_secs(3_600);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [first, role] = &args[..]
        && first == "role"
    {
        match serde_json::from_str(role).unwrap() {
            Role::Source(part) => source::run(&part),
            Role::Targets(parts) => target::run(&parts),
        }
        return ExitCode::SUCCESS;
    }
    match Options::parse(args) {
        Ok(Some(options)) => supervise(&options),
        Ok(None) => {
            print!("{}", options::HELP);
            ExitCode::SUCCESS
        }
        Err(hint) => {
            eprintln!("error: {hint}");
            ExitCode::from(2)
        }
    }
}

/// Every part, on one lane.
fn every_part(options: &Options, lane: Lane) -> Vec<Report> {
    let mut reports = Vec::new();
    let mut part = |name, count: u64, run: &dyn Fn(u64, &mut Report)| {
        if count > 0 {
            let (mut report, began) = (Report::new(name, lane), Instant::now());
            run(count, &mut report);
            report.number("seconds", began.elapsed().as_secs());
            reports.push(report);
        }
    };
    // Trials are shared out among the lanes; the rest is done on each.
    let trials = options.trials.div_ceil(options.lanes.len() as u64);
    let seed = options.seed;
    part("trials", trials, &|trials, report| trials::run(lane, trials, seed, report));
    part("writer", options.schedules, &|count, report| writer::run(lane, count, seed, report));
    part("flat", options.flat, &|refits, report| flat::run(lane, refits, report));
    part("neighbours", options.neighbours, &|rounds, report| {
        neighbours::run(lane, rounds, report);
    });
    reports
}

fn supervise(options: &Options) -> ExitCode {
    std::thread::spawn(|| {
        std::thread::sleep(LIMIT);
        eprintln!("chaos: not done within {LIMIT:?}");
        std::process::exit(3);
    });
    let began = Instant::now();
    // A lane is half a machine's work. A process outlives the thread that started it by nothing, so that one waits for it.
    let reports: Vec<Report> = std::thread::scope(|scope| {
        let lanes =
            options.lanes.iter().map(|&lane| scope.spawn(move || every_part(options, lane)));
        let lanes: Vec<_> = lanes.collect();
        lanes.into_iter().flat_map(|lane| lane.join().unwrap()).collect()
    });
    for report in &reports {
        report.print();
    }
    let holds = reports.iter().all(Report::holds);
    let mut all: Map<String, Value> = Map::new();
    for report in &reports {
        let lane = all.entry(report.lane().name()).or_insert_with(|| json!({}));
        lane[report.name()] = report.json();
    }
    let machine = json!({
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "load": std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
        "arch": std::env::consts::ARCH,
    });
    all.insert("machine".to_owned(), machine);
    all.insert("seed".to_owned(), json!(options.seed));
    all.insert("seconds".to_owned(), json!(began.elapsed().as_secs()));
    all.insert("held".to_owned(), json!(holds));
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&Value::Object(all)).unwrap();
        if let Err(error) = std::fs::write(file, text + "\n") {
            eprintln!("error: {file}: {error}");
            return ExitCode::FAILURE;
        }
    }
    println!(
        "\nchaos: {} (seed {})",
        if holds { "every promise held" } else { "BROKEN" },
        options.seed
    );
    if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
