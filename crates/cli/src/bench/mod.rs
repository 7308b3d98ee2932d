//! `refit bench`: refits a model between ranks over a real transport, cycle by cycle, verifying every byte, with
//! buffers cached and not cached in one run, and the machine's ceilings measured beside them.

mod protocol;
mod rank;
mod sizing;
mod table;
mod values;
mod workers;

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use refit::planner::LowerOptions;

use self::protocol::{Command, Mode, RankReport, Reply};
use self::rank::RankSetup;
pub(crate) use self::table::machine;
use self::table::{Cycle, PairResult, Run};
use self::workers::{Launcher, Worker};
use crate::error::CliError;
use crate::model;
use crate::sizes::{SourceSizes, TargetSizes};
use crate::transports::TransportName;

/// What is benched when no sizes are given: matched, gathered, and what row-parallel tensors make hard.
const PAIRS: [(u32, u32); 4] = [(1, 1), (2, 2), (2, 1), (4, 2)];

/// Refit a model between processes: every cycle changes the source's bytes and every target byte is verified.
///
/// Without --source and --target it runs TP 1->1, 2->2, 2->1 and 4->2. Without --layers it takes as many layers of
/// the model as half of the free memory holds, and says so.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[arg(long, default_value = "qwen3-4b", help = model::help())]
    config: String,
    /// Decoder layers to keep of the model (default: as many as half of the free memory holds)
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    layers: Option<u32>,
    /// Trainer sizes; what is not said is 1, etp too, although Megatron's own default for it is tp (with neither side
    /// given: TP 1 -> 1, 2 -> 2, 2 -> 1 and 4 -> 2 in turn)
    #[arg(long, value_name = SourceSizes::SHAPE)]
    source: Option<SourceSizes>,
    /// Engine sizes (default, where the trainer's are given: tp=1)
    #[arg(long, value_name = TargetSizes::SHAPE)]
    target: Option<TargetSizes>,
    /// Rounds; each has a cycle of every kind and a measurement of every ceiling
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    cycles: u32,
    /// How bytes move
    #[arg(long, value_enum, default_value_t = TransportName::preferred())]
    transport: TransportName,
    /// Print a third kind of cycle: the same plan with one read per contiguous run (on by itself where it differs
    /// and no sizes are given)
    #[arg(long)]
    read_per_row: bool,
    /// What a wave may stage before it is landed, in MiB; 0 stages everything at once
    #[arg(long, default_value_t = LowerOptions::default().wave_bytes >> 20, value_name = "MIB")]
    wave: u64,
    /// Write every number to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Seconds after which a rank that does not answer, or a pull that does not settle, is an error
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    patience: u64,
}

/// The side a rank is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// Holds weights
    Source,
    /// Wants them
    Target,
}

impl Role {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

/// One rank of a bench, in its own process.
#[derive(Debug, clap::Args)]
pub(crate) struct RankArgs {
    role: Role,
    #[arg(long)]
    rank: u32,
    #[arg(long)]
    config: String,
    #[arg(long)]
    layers: u32,
    #[arg(long)]
    source: String,
    #[arg(long)]
    target: String,
    #[arg(long, value_enum)]
    transport: TransportName,
    #[arg(long)]
    directory: PathBuf,
    #[arg(long)]
    wave: u64,
    #[arg(long)]
    patience: u64,
}

impl RankArgs {
    fn to_arguments(role: Role, setup: &RankSetup, transport: TransportName) -> Vec<String> {
        let values = [
            ("--rank", setup.rank.to_string()),
            ("--config", setup.config.clone()),
            ("--layers", setup.layers.to_string()),
            ("--source", setup.source.argument()),
            ("--target", setup.target.argument()),
            ("--transport", transport.name().to_owned()),
            ("--directory", setup.directory.display().to_string()),
            ("--wave", setup.wave.to_string()),
            ("--patience", setup.patience.as_secs().to_string()),
        ];
        let options = values.into_iter().flat_map(|(name, value)| [name.to_owned(), value]);
        std::iter::once(role.name().to_owned()).chain(options).collect()
    }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode, CliError> {
    let config = model::config(&args.config)?;
    if let Some(layers) = args.layers.filter(|&layers| layers > config.num_layers) {
        let most = config.num_layers;
        return Err(CliError::Usage(format!("--layers {layers}: the model has {most}")));
    }
    #[cfg(not(feature = "nixl"))]
    if args.transport == TransportName::Nixl {
        return Err(crate::transports::without_nixl());
    }
    let all = args.source.is_none() && args.target.is_none();
    let pairs: Vec<(SourceSizes, TargetSizes)> = if all {
        let sizes = |&(source, target)| (SourceSizes::new(source), TargetSizes::new(target));
        PAIRS.iter().map(sizes).collect()
    } else {
        let source = args.source.unwrap_or_else(|| SourceSizes::new(1));
        vec![(source, args.target.unwrap_or_else(|| TargetSizes::new(1)))]
    };
    let free = sizing::free_memory()?;
    let layers = match args.layers {
        Some(layers) => layers,
        None => sizing::layers(&config, &pairs, free)?,
    };
    let mut kept = config.clone();
    kept.num_layers = layers;
    // Refuse illegal sizes here, in one line, and not in every rank.
    for &(source, target) in &pairs {
        sizing::bytes(&kept, source, target)?;
    }

    let mut run = Run::new(args.config.clone(), layers, config.num_layers, args.transport.name());
    run.print_header(free, args.layers.is_none());
    for (source, target) in pairs {
        let read_per_row = args.read_per_row || (all && source.tp > target.tp());
        let result = pair(args, layers, source, target, read_per_row)?;
        result.print();
        run.pairs.push(result);
    }
    run.print_summary();
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&run.json()).unwrap_or_default();
        std::fs::write(path, json + "\n")
            .map_err(|source| CliError::Write { path: path.clone(), source })?;
        println!("every number: {}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Benches one pair of sizes.
fn pair(
    args: &Args,
    layers: u32,
    source: SourceSizes,
    target: TargetSizes,
    read_per_row: bool,
) -> Result<PairResult, CliError> {
    let meeting = tempfile::tempdir().map_err(CliError::system("make a directory to meet in"))?;
    let launcher = Launcher::new(args.transport);
    let patience = Duration::from_secs(args.patience);
    let setup = |rank| RankSetup {
        config: args.config.clone(),
        layers,
        source,
        target,
        rank,
        directory: meeting.path().to_path_buf(),
        own_process: launcher.own_processes(),
        wave: args.wave,
        patience,
    };
    let mut modes = vec![Mode::Uncached, Mode::Cached];
    if read_per_row {
        modes.push(Mode::ReadPerRun);
    }
    let steps = u64::from(args.cycles) * (modes.len() as u64 * 3 + 2) + 2;
    let bar = progress(steps, format!("{source} -> {target}"));

    bar.set_message("starting sources");
    // Targets are declared last, so that they leave before what they read from.
    let mut sources = start(&launcher, Role::Source, source.world(), &setup)?;
    all(&mut sources, patience, None)?;
    bar.inc(1);
    bar.set_message("starting targets");
    let mut targets = start(&launcher, Role::Target, target.world(), &setup)?;
    all(&mut targets, patience, None)?;
    bar.inc(1);

    let mut result = PairResult::new(source, target);
    let mut version = 0;
    for round in 0..args.cycles {
        for &mode in &modes {
            version += 1;
            bar.set_message("writing new values");
            all(&mut sources, patience, Some(&Command::Fill { cycle: version }))?;
            bar.inc(1);
            bar.set_message(mode.label());
            let replies = all(&mut targets, patience, Some(&Command::Refit { mode }))?;
            bar.inc(1);
            bar.set_message("verifying every byte");
            all(&mut targets, patience, Some(&Command::Verify { cycle: version }))?;
            bar.inc(1);
            let reports: Vec<RankReport> = replies
                .into_iter()
                .filter_map(
                    |reply| if let Reply::Refit(report) = reply { Some(*report) } else { None },
                )
                .collect();
            result.cycles.push(Cycle::new(source, target, mode, round, reports));
        }
        bar.set_message("one big read");
        result.big_read_gbps.push(rate(&all(&mut targets, patience, Some(&Command::BigRead))?));
        bar.inc(1);
        bar.set_message("memcpy");
        result.memcpy_gbps.push(rate(&all(&mut targets, patience, Some(&Command::Memcpy))?));
        bar.inc(1);
    }
    bar.finish_and_clear();
    drop(targets);
    Ok(result)
}

fn start(
    launcher: &Launcher,
    role: Role,
    ranks: u32,
    setup: &impl Fn(u32) -> RankSetup,
) -> Result<Vec<Worker>, CliError> {
    (0..ranks).map(|rank| launcher.start(role, &setup(rank))).collect()
}

/// Tells every worker, then waits for every answer: they work at the same time.
fn all(
    workers: &mut [Worker],
    patience: Duration,
    command: Option<&Command>,
) -> Result<Vec<Reply>, CliError> {
    if let Some(command) = command {
        for worker in workers.iter_mut() {
            worker.tell(command)?;
        }
    }
    workers.iter_mut().map(|worker| worker.reply(patience)).collect()
}

/// Gigabytes a second of all ranks together: their bytes over the time of the slowest.
#[allow(clippy::cast_precision_loss, reason = "a rate for people")]
fn rate(replies: &[Reply]) -> f64 {
    let (mut total, mut slowest) = (0, 0.0_f64);
    for reply in replies {
        if let Reply::Rate { bytes, seconds } = reply {
            total += bytes;
            slowest = slowest.max(*seconds);
        }
    }
    if slowest > 0.0 { total as f64 / slowest / 1e9 } else { 0.0 }
}

fn progress(steps: u64, prefix: String) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:>12} [{bar:30}] {pos}/{len} {elapsed} {msg}");
    ProgressBar::new(steps)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_prefix(prefix)
}

/// Runs one rank: commands from standard input, answers to standard output.
pub(crate) fn run_rank(args: &RankArgs) -> Result<ExitCode, CliError> {
    let wrong = |side| move |reason| CliError::Sizes { side, reason };
    let setup = RankSetup {
        config: args.config.clone(),
        layers: args.layers,
        source: args.source.parse().map_err(wrong("source"))?,
        target: args.target.parse().map_err(wrong("target"))?,
        rank: args.rank,
        directory: Path::new(&args.directory).to_path_buf(),
        own_process: true,
        wave: args.wave,
        patience: Duration::from_secs(args.patience),
    };
    let served = serve(args, &setup);
    if let Err(error) = &served {
        say(&Reply::Failed { reason: error.to_string() });
    }
    Ok(if served.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

#[cfg(feature = "nixl")]
fn serve(args: &RankArgs, setup: &RankSetup) -> Result<(), CliError> {
    if args.transport != TransportName::Nixl {
        return Err(CliError::Usage("ranks in processes of their own need NIXL".to_owned()));
    }
    let commands =
        std::io::stdin().lock().lines().map_while(|line| serde_json::from_str(&line.ok()?).ok());
    let transport = crate::transports::nixl(
        &format!("{}-{}", args.role.name(), args.rank),
        args.role == Role::Source,
    )?;
    match args.role {
        Role::Source => rank::source(setup, transport, commands, |reply| say(&reply)),
        Role::Target => rank::target(setup, transport, commands, |reply| say(&reply)),
    }
}

#[cfg(not(feature = "nixl"))]
fn serve(args: &RankArgs, setup: &RankSetup) -> Result<(), CliError> {
    let _ = (args, setup, std::io::stdin().lock().lines());
    Err(crate::transports::without_nixl())
}

/// Answers on standard output; a bench that is gone closes it, and then the next command never comes.
fn say(reply: &Reply) {
    let line = serde_json::to_string(reply).unwrap_or_default() + "\n";
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush());
}
