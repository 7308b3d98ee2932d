//! `refit plan`: what a refit would read, without moving anything.

mod packing;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

use clap::ValueEnum;
use refit::RefitError;
use refit::planner::{
    Capabilities, LowerOptions, Method, Mode, Plan, PlanOptions, Policy, Program, lower, plan,
};
use refit::translate::bands::Side;
use refit::translate::{PostAction, TargetLayout};
use serde::Serialize;

use crate::bands::{self, Files};
use crate::error::CliError;
use crate::model;
use crate::sizes::{SourceSizes, TargetSizes};

use packing::Slots;

/// Plan a model's refit and print reads, bytes, amplification and hashes for every target rank.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[arg(long, help = format!("{} [default: {}]", model::help(), model::DEFAULT))]
    config: Option<String>,
    /// Trainer sizes; what is not said is 1, etp too, although Megatron's own default for it is tp
    #[arg(long, default_value = "tp=4,pp=1", value_name = SourceSizes::SHAPE)]
    source: SourceSizes,
    /// Engine sizes
    #[arg(long, default_value = "tp=2", value_name = TargetSizes::SHAPE)]
    target: TargetSizes,
    /// Only this engine rank (default: all)
    #[arg(long)]
    rank: Option<u32>,
    #[command(flatten)]
    bands: Files,
    /// Only move bytes that are needed, even where reading more would be faster
    #[arg(long)]
    exact_wire: bool,
    /// When live parameters may be written
    #[arg(long, value_enum, default_value_t = ModeName::Direct)]
    mode: ModeName,
    /// What the transport moves, in bytes per microsecond (2000 is 2 GB/s)
    #[arg(long, default_value_t = 2_000, value_name = "BYTES_PER_US")]
    rate: u64,
    /// What one more read costs, in nanoseconds
    #[arg(long, default_value_t = 5_000, value_name = "NS")]
    read_cost: u64,
    /// The transport executes strided reads (a gather kernel, say)
    #[arg(long)]
    strided_reads: bool,
    /// Plan as if sources had packed what every engine rank asks them to: dense copies of what would be read row by row, or
    /// with bytes that nobody needs
    #[arg(long)]
    pack: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// When live parameters may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ModeName {
    /// The engine is paused
    Direct,
    /// The engine serves on until everything has arrived
    Staged,
}

#[derive(Serialize)]
struct Output {
    source: String,
    target: String,
    /// With `--pack`: of the source ranks that would have any.
    #[serde(skip_serializing_if = "Option::is_none")]
    packed: Option<Vec<Slots>>,
    ranks: Vec<Rank>,
}

#[derive(Serialize)]
struct Rank {
    rank: u32,
    params: usize,
    target_bytes: u64,
    segments: usize,
    reads: usize,
    direct_reads: u64,
    staged_reads: u64,
    wire_bytes: u64,
    needed_bytes: u64,
    amplification: f64,
    staging_bytes: u64,
    waves: usize,
    filled_bytes: u64,
    bytes_by_source: Vec<FromSource>,
    plan_s: f64,
    lower_s: f64,
    plan_hash: String,
    program_hash: String,
    post_actions: Vec<Action>,
}

/// What the engine must do once all bytes are in place.
#[derive(Serialize)]
struct Action {
    action: String,
    params: Vec<String>,
}

#[derive(Serialize)]
struct FromSource {
    source: u32,
    needed_bytes: u64,
    wire_bytes: u64,
}

impl Action {
    fn new(action: &PostAction) -> Self {
        let params = action.params().iter().map(ToString::to_string).collect();
        Self { action: action.to_string(), params }
    }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode, CliError> {
    let config = || model::config(args.config.as_deref().unwrap_or(model::DEFAULT));
    args.bands.check(args.config.is_some())?;
    let (source_name, mut source) = match args.bands.source_bands.as_slice() {
        [] => (args.source.to_string(), model::source(&config()?, args.source)?),
        files => (bands::name(files), bands::layouts(files, Side::Source)?),
    };
    let (target_name, mut targets) = match args.bands.target_bands.as_slice() {
        [] => (args.target.to_string(), model::target(&config()?, args.target)?),
        files => {
            let layouts = bands::layouts(files, Side::Target)?;
            (bands::name(files), layouts.into_iter().map(TargetLayout::from).collect())
        }
    };
    let capabilities = Capabilities {
        strided_reads: args.strided_reads,
        ..Capabilities::plain(args.rate, args.read_cost)
    };
    let policy = if args.exact_wire { Policy::ExactWire } else { Policy::Cheapest };
    let mode = match args.mode {
        ModeName::Direct => Mode::Direct,
        ModeName::Staged => Mode::Staged,
    };
    let options = LowerOptions::default().with_policy(policy).with_mode(mode);
    let mut slots = None;
    if args.pack {
        let (layouts, held) = packing::packed(&source, &targets, &capabilities, &options)?;
        (source, slots) = (layouts, Some(held));
    }
    let source = model::joined(source)?;

    if let Some(rank) = args.rank {
        let last = targets.iter().map(|target| target.layout.rank()).max();
        targets.retain(|target| target.layout.rank() == rank);
        if targets.is_empty() {
            let end = last.map_or(0, |last| last.saturating_add(1));
            return Err(CliError::Usage(format!("--rank {rank}: the engine has ranks 0..{end}")));
        }
    }
    let mut ranks = Vec::new();
    for TargetLayout { layout: target, post_actions, .. } in targets {
        let started = Instant::now();
        let plan = plan(&source, &target, &PlanOptions::default()).map_err(RefitError::from)?;
        let plan_s = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let program = lower(&plan, &capabilities, &options).map_err(RefitError::from)?;
        let lower_s = started.elapsed().as_secs_f64();
        ranks.push(describe(&plan, &program, &post_actions, plan_s, lower_s));
    }
    let output = Output { source: source_name, target: target_name, packed: slots, ranks };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&output).unwrap_or_default());
    } else {
        print(&output);
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(
    plan: &Plan,
    program: &Program,
    post_actions: &[PostAction],
    plan_s: f64,
    lower_s: f64,
) -> Rank {
    let reads = |direct: bool| {
        let choices =
            program.choices().iter().filter(|choice| (choice.method == Method::Direct) == direct);
        choices.map(|choice| choice.reads).sum()
    };
    let mut wire = BTreeMap::<u32, u64>::new();
    for read in program.reads() {
        *wire.entry(program.sources()[read.source as usize].rank).or_default() += read.bytes();
    }
    let bytes_by_source =
        plan.bytes_by_source().into_iter().map(|(source, needed_bytes)| FromSource {
            source,
            needed_bytes,
            wire_bytes: wire.get(&source).copied().unwrap_or_default(),
        });
    Rank {
        rank: plan.target_rank(),
        params: plan.targets().len(),
        target_bytes: plan.coverage().target_bytes,
        segments: plan.segments().len(),
        reads: program.reads().len(),
        direct_reads: reads(true),
        staged_reads: reads(false),
        wire_bytes: program.wire_bytes(),
        needed_bytes: program.needed_bytes(),
        amplification: amplification(program.wire_bytes(), program.needed_bytes()),
        staging_bytes: program.staging_bytes(),
        waves: program.waves().len(),
        filled_bytes: plan.coverage().filled_bytes,
        bytes_by_source: bytes_by_source.collect(),
        plan_s,
        lower_s,
        plan_hash: plan.hash().to_string(),
        program_hash: program.hash().to_string(),
        post_actions: post_actions.iter().map(Action::new).collect(),
    }
}

/// Bytes on the wire for every byte needed.
#[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
pub(crate) fn amplification(wire: u64, needed: u64) -> f64 {
    if needed == 0 { 1.0 } else { wire as f64 / needed as f64 }
}

#[allow(clippy::cast_precision_loss, reason = "sizes for people")]
fn print(output: &Output) {
    println!("{} -> {}", output.source, output.target);
    println!(
        "{:>6} {:>7} {:>9} {:>9} {:>8} {:>8} {:>6} {:>10} {:>6} {:>8}  {:<8}",
        "target",
        "params",
        "needed MB",
        "wire MB",
        "ampl",
        "reads",
        "staged",
        "staging MB",
        "waves",
        "plan ms",
        "plan"
    );
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    for rank in &output.ranks {
        println!(
            "{:>6} {:>7} {:>9.1} {:>9.1} {:>7.2}x {:>8} {:>6} {:>10.1} {:>6} {:>8.2}  {}",
            rank.rank,
            rank.params,
            megabytes(rank.needed_bytes),
            megabytes(rank.wire_bytes),
            rank.amplification,
            rank.reads,
            rank.staged_reads,
            megabytes(rank.staging_bytes),
            rank.waves,
            (rank.plan_s + rank.lower_s) * 1e3,
            &rank.plan_hash[..8],
        );
        for from in &rank.bytes_by_source {
            println!(
                "{:>14} source {:>3} {:>9.1} MB needed {:>9.1} MB on the wire",
                "from",
                from.source,
                megabytes(from.needed_bytes),
                megabytes(from.wire_bytes)
            );
        }
    }
    for Slots { source, slots, bytes } in output.packed.iter().flatten() {
        println!(
            "packed: source {source} copies {:.1} MB into {slots} slots whenever its weights change",
            megabytes(*bytes)
        );
    }
    if output.packed.as_ref().is_some_and(Vec::is_empty) {
        println!("packed: nothing, no engine rank asks for it");
    }
    // What every rank must do after its bytes have arrived, said once where ranks agree.
    let actions = |rank: &Rank| rank.post_actions.iter().map(|it| it.action.clone()).collect();
    let mut by_actions = BTreeMap::<Vec<String>, Vec<u32>>::new();
    for rank in &output.ranks {
        by_actions.entry(actions(rank)).or_default().push(rank.rank);
    }
    for (actions, ranks) in by_actions {
        let who = match ranks.as_slice() {
            ranks if ranks.len() == output.ranks.len() => "every target".to_owned(),
            ranks => format!("targets {ranks:?}"),
        };
        for action in actions {
            println!("then, on {who}: {action}");
        }
    }
}
