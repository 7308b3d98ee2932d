//! `refit bench`: refits a model between ranks over a real transport, cycle by cycle, verifying every byte, with
//! buffers cached and not cached in one run, and the machine's ceilings measured beside them.

mod args;
mod ceiling;
mod copies;
mod held;
mod meeting;
mod process;
mod protocol;
mod rank;
mod sizing;
mod table;
pub(crate) mod values;
mod workers;

use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

pub(crate) use self::args::{Args, RankArgs, Role};
pub(crate) use self::process::run_rank;
use self::protocol::{Command, Mode, RankReport, Rate, Reply};
use self::rank::RankSetup;
use self::sizing::{Pair, Room};
pub(crate) use self::table::machine;
use self::table::{Cycle, PairResult, Run};
use self::workers::{Launcher, Worker};
use crate::device::{DeviceName, Gpus};
use crate::error::CliError;
use crate::model;
use crate::placement::{Placement, Wish};
use crate::sizes::{SourceSizes, TargetSizes};
use crate::transports::TransportName;

/// What is benched when no sizes are given: matched, gathered, and what row-parallel tensors make hard.
const PAIRS: [(u32, u32); 4] = [(1, 1), (2, 2), (2, 1), (4, 2)];

pub(crate) fn run(args: &Args) -> Result<ExitCode, CliError> {
    let config = model::config(&args.config)?;
    if let Some(layers) = args.layers.filter(|&layers| layers > config.num_layers) {
        let most = config.num_layers;
        return Err(CliError::Usage(format!("--layers {layers}: the model has {most}")));
    }
    args.check()?;
    let transport = args.transport.on(args.device)?;
    let count = match args.device {
        DeviceName::Host => None,
        DeviceName::Cuda => Some(Gpus::count()?),
    };
    let pair = |source: SourceSizes, target: TargetSizes| -> Result<Pair, CliError> {
        let wish = Wish { source: &args.source_devices, target: &args.target_devices };
        let placed = |gpus| Placement::new(gpus, source.world(), target.world(), wish);
        let placement = count.map(placed).transpose()?;
        let copies = transport == TransportName::Nixl && placement.is_some();
        Ok(Pair { source, target, placement, copies })
    };
    let all = args.source.is_none() && args.target.is_none();
    let pairs = if all {
        let sizes = |&(source, target)| pair(SourceSizes::new(source), TargetSizes::new(target));
        PAIRS.iter().map(sizes).collect::<Result<_, _>>()?
    } else {
        let source = args.source.unwrap_or_else(|| SourceSizes::new(1));
        vec![pair(source, args.target.unwrap_or_else(|| TargetSizes::new(1)))?]
    };
    let used = pairs.iter().flat_map(|pair| &pair.placement).flat_map(Placement::gpus);
    let gpus = count.map(|_| Gpus::look(used.collect())).transpose()?;
    let room = match &gpus {
        None => Room::Host(sizing::free_memory()?),
        Some(gpus) => Room::Gpus(gpus.free()),
    };
    let layers = match args.layers {
        Some(layers) => layers,
        None => sizing::layers(&config, &pairs, &room)?,
    };
    let mut kept = config.clone();
    kept.num_layers = layers;
    // Refuse illegal sizes here, in one line, and not in every rank.
    for pair in &pairs {
        sizing::bytes(&kept, pair)?;
    }

    let mut run = Run::new(args, layers, config.num_layers, transport, gpus);
    run.print_header(&room);
    for pair in pairs {
        let read_per_row = args.read_per_row || (all && pair.source.tp > pair.target.tp());
        let result = bench(args, layers, transport, pair, read_per_row)?;
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
fn bench(
    args: &Args,
    layers: u32,
    transport: TransportName,
    pair: Pair,
    read_per_row: bool,
) -> Result<PairResult, CliError> {
    let meeting = tempfile::tempdir().map_err(CliError::system("make a directory to meet in"))?;
    let launcher = Launcher::new(transport);
    let patience = Duration::from_secs(args.patience);
    let Pair { source, target, placement, copies } = pair;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let setup = |role: Role, rank| {
        // The ranks of a side write or compare values at the same time.
        let (ranks, gpu) = match role {
            Role::Source => (source.world(), placement.as_ref().and_then(|it| it.source(rank))),
            Role::Target => (target.world(), placement.as_ref().and_then(|it| it.target(rank))),
        };
        RankSetup {
            config: args.config.clone(),
            layers,
            source,
            target,
            rank,
            gpu,
            copies,
            separate: args.separate,
            directory: meeting.path().to_path_buf(),
            own_process: launcher.own_processes(),
            threads: (cores / ranks as usize).max(1),
            wave: args.wave,
            patience,
        }
    };
    let mut modes = vec![Mode::Uncached, Mode::Cached];
    if read_per_row {
        modes.push(Mode::ReadPerRun);
    }
    let steps = u64::from(args.cycles) * (modes.len() as u64 * 3 + 2 + u64::from(copies)) + 4;
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

    if args.pack {
        bar.set_message("packing");
        all(&mut targets, patience, Some(&Command::AskToPack))?;
        all(&mut sources, patience, Some(&Command::Pack))?;
        all(&mut targets, patience, Some(&Command::MeetPacked))?;
    }
    bar.inc(1);

    let mut result = PairResult::new(source, target, placement.clone());
    let mut version = 0;
    for round in 0..args.cycles {
        for &mode in &modes {
            version += 1;
            bar.set_message("writing new values");
            let fill = Command::Fill { cycle: version };
            let filled = all(&mut sources, patience, Some(&fill))?;
            result.packs.push(rates(&filled));
            let announced = filled.iter().filter_map(Reply::announced).collect();
            bar.inc(1);
            bar.set_message(mode.label());
            let replies = all(&mut targets, patience, Some(&Command::Refit { mode, announced }))?;
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
        result.big_reads.push(rates(&all(&mut targets, patience, Some(&Command::BigRead))?));
        bar.inc(1);
        if copies {
            bar.set_message("copies");
            let replies = all(&mut targets, patience, Some(&Command::Copies))?;
            result.add_copies(&replies, rates(&replies));
            bar.inc(1);
        }
        bar.set_message("memcpy");
        result.memcpys.push(rates(&all(&mut targets, patience, Some(&Command::Memcpy))?));
        bar.inc(1);
    }
    for reply in all(&mut targets, patience, Some(&Command::Describe))? {
        if let Reply::Described(description) = reply {
            result.descriptions.push(*description);
        }
    }
    bar.inc(1);
    bar.finish_and_clear();
    drop(targets);
    Ok(result)
}

fn start(
    launcher: &Launcher,
    role: Role,
    ranks: u32,
    setup: &impl Fn(Role, u32) -> RankSetup,
) -> Result<Vec<Worker>, CliError> {
    (0..ranks).map(|rank| launcher.start(role, &setup(role, rank))).collect()
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

/// What every rank measured, in their order.
fn rates(replies: &[Reply]) -> Vec<Rate> {
    let rate = |reply: &Reply| match *reply {
        Reply::Rate(rate) => Some(rate),
        Reply::Filled { packed, .. } => packed,
        _ => None,
    };
    replies.iter().filter_map(rate).collect()
}

fn progress(steps: u64, prefix: String) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:>12} [{bar:30}] {pos}/{len} {elapsed} {msg}");
    ProgressBar::new(steps)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_prefix(prefix)
}
