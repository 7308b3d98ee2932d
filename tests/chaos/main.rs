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
use crate::processes::Role;
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

fn supervise(options: &Options) -> ExitCode {
    std::thread::spawn(|| {
        std::thread::sleep(LIMIT);
        eprintln!("chaos: not done within {LIMIT:?}");
        std::process::exit(3);
    });
    let began = Instant::now();
    let mut reports = Vec::new();
    let mut part = |name, count: u64, run: &dyn Fn(_, u64, &mut Report)| {
        if count == 0 {
            return;
        }
        let (mut report, began) = (Report::new(name), Instant::now());
        let lanes = options.lanes.len() as u64;
        for &lane in &options.lanes {
            run(lane, count, &mut report);
        }
        report.number("lanes", lanes);
        report.number("seconds", began.elapsed().as_secs());
        report.print();
        reports.push(report);
    };
    // Trials are shared out among the lanes; the rest is done on each.
    let lanes = options.lanes.len() as u64;
    part("trials", options.trials, &|lane, trials, report| {
        trials::run(lane, trials.div_ceil(lanes), options.seed, report);
    });
    part("writer", options.schedules, &|lane, schedules, report| {
        writer::run(lane, schedules, options.seed, report);
    });
    part("flat", options.flat, &|lane, refits, report| flat::run(lane, refits, report));
    part("neighbours", options.neighbours, &|lane, rounds, report| {
        neighbours::run(lane, rounds, report);
    });
    let holds = reports.iter().all(Report::holds);
    let mut all: Map<String, Value> = reports.iter().map(Report::json).collect();
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
