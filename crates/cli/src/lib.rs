//! The `refit` command: what a person runs to look at a plan, to check real data, to measure a machine.

// This is the one crate that talks to a terminal.
#![allow(clippy::print_stdout, reason = "a command prints its results")]
#![forbid(unsafe_code)]

pub mod case;

mod bands;
mod bench;
mod bench_plan;
mod chart;
mod device;
mod error;
mod live;
mod memory;
mod model;
mod parallel;
mod placement;
mod plan;
mod sizes;
mod transports;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Move RL weights from Megatron-Core ranks into vLLM ranks: plan it, verify it, measure it.
#[derive(Debug, Parser)]
#[command(name = "refit", version, arg_required_else_help = true, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What each does is said where its arguments are.
#[derive(Debug, Subcommand)]
enum Command {
    Plan(plan::Args),
    Bands(bands::Args),
    Verify(verify::Args),
    Bench(bench::Args),
    Serve(Box<live::ServeArgs>),
    Pull(Box<live::PullArgs>),
    BenchPlan(bench_plan::Args),
    /// Draw what benches wrote
    Chart(chart::Args),
    /// One rank of a bench; started by `refit bench`, spoken to over its standard input
    #[command(hide = true)]
    BenchRank(bench::RankArgs),
}

/// Parses the command line, runs the command and says how the process ends: 0, 1 when a check failed, 2 for errors.
#[must_use]
pub fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Plan(args) => plan::run(&args),
        Command::Bands(args) => bands::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Serve(args) => live::run_serve(*args),
        Command::Pull(args) => live::run_pull(*args),
        Command::Bench(args) => bench::run(&args),
        Command::BenchPlan(args) => bench_plan::run(&args),
        Command::Chart(args) => chart::run(&args),
        Command::BenchRank(args) => bench::run_rank(&args),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("refit: {error}");
        ExitCode::from(2)
    })
}
