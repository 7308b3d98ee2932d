//! `refit bench-plan`: what planning costs at the sizes of clusters, without moving anything.

mod measure;
mod sides;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;
use serde::Serialize;

use self::measure::{Measured, measure};
use self::sides::Sides;
use crate::error::CliError;
use crate::sizes::bytes;

/// Target ranks of the growth table.
const CURVE: [u32; 5] = [16, 64, 256, 1024, 4096];

/// Plan every target rank of a large job, on one core, and print time, memory and what the plans hold.
///
/// `index` is joining the layouts of all source ranks, `plan` planning all target ranks, `lower` turning their plans
/// into reads for the transport that `refit plan` assumes. Making the layouts is not counted. `peak` is the memory of
/// the whole process. `hottest` is what the source rank that is asked most is asked for, over the mean.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What is planned
    #[arg(long, value_enum, default_value_t = Preset::KimiK2)]
    preset: Preset,
    /// Rounds; times are medians over them
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    rounds: u32,
    /// Print a table for 16 to 4,096 target ranks of the preset, twice as many on the source; for models with experts a
    /// round takes two minutes
    #[arg(long)]
    curve: bool,
    /// Write every number to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the layouts to a folder, as JSON, for other planners to be measured on; measure nothing
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["curve", "json", "rounds"])]
    layouts: Option<PathBuf>,
}

/// A job by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Preset {
    /// 61 layers (1 dense), 384 experts, latent attention: 256 ranks to 128, TP8 EP32 on both sides
    #[value(name = "kimi-k2-256x128")]
    KimiK2,
    /// 61 layers (3 dense), 256 experts, latent attention: 256 ranks to 128, TP8 EP32 on both sides
    #[value(name = "deepseek-v3-256x128")]
    DeepseekV3,
    /// Llama-3.1-70B, TP8 to TP4
    #[value(name = "llama-70b-8to4")]
    Llama70b,
    /// Qwen3-4B, TP4 to TP2
    #[value(name = "qwen3-4b")]
    Qwen3,
}

#[derive(Serialize)]
struct Output {
    schema: u32,
    preset: String,
    machine: serde_json::Value,
    rounds: u32,
    rows: Vec<Measured>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode, CliError> {
    let sides = Sides::of(args.preset)?;
    let name =
        args.preset.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned());
    println!("{name}: {sides}");
    if let Some(folder) = &args.layouts {
        sides.write(folder)?;
        return Ok(ExitCode::SUCCESS);
    }
    print_head();
    let mut rows = Vec::new();
    let mut add = |sides: &Sides| -> Result<(), CliError> {
        let measured = measure(sides, args.rounds)?;
        print_row(&measured);
        rows.push(measured);
        Ok(())
    };
    if args.curve {
        CURVE.iter().try_for_each(|&ranks| add(&sides.with_target_ranks(ranks)?))?;
    } else {
        add(&sides)?;
    }
    if let Some(path) = &args.json {
        let machine = crate::bench::machine();
        let output = Output { schema: 1, preset: name, machine, rounds: args.rounds, rows };
        let text = serde_json::to_string_pretty(&output).unwrap_or_default() + "\n";
        std::fs::write(path, text)
            .map_err(|source| CliError::Write { path: path.clone(), source })?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print_head() {
    println!(
        "{:>6} {:>6} {:>9} {:>9} {:>8} {:>8} {:>8} {:>9} {:>8} {:>8} {:>9} {:>9} {:>10} {:>7}",
        "source",
        "target",
        "params",
        "index s",
        "plan s",
        "both s",
        "lower s",
        "ms a rank",
        "ns/param",
        "peak MB",
        "segments",
        "reads",
        "wire",
        "hottest",
    );
}

fn print_row(row: &Measured) {
    println!(
        "{:>6} {:>6} {:>9} {:>9.4} {:>8.4} {:>8.4} {:>8.4} {:>9.3} {:>8.0} {:>8} {:>9} {:>9} {:>10} {:>6.2}x",
        row.source_ranks,
        row.target_ranks,
        row.params,
        row.index_s,
        row.plan_s,
        row.index_s + row.plan_s,
        row.lower_s,
        row.plan_s_per_rank * 1e3,
        row.ns_per_param,
        row.peak_bytes / 1_000_000,
        row.segments,
        row.reads,
        bytes(row.wire_bytes),
        row.most_asked_of_mean,
    );
}
