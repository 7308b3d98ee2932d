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

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what a refit would read: per source and target rank, with its cost and its hash
    Plan(plan::Args),
    /// Print layouts as JSON: a model's, to see the format or to edit it, or those of files
    Bands(bands::Args),
    /// Replay golden cases: real source shards in, every target tensor compared byte for byte
    Verify(verify::Args),
    /// Refit a model between processes and print where the time goes
    Bench(bench::Args),
    /// Plan jobs of the size of clusters and print what planning costs
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
