//! `refit verify`: golden cases through the whole stack, compared byte for byte.

mod layouts;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use refit::pool::PoolOptions;
use refit::translate::TranslateError;
use refit::translate::bands::Side;
use refit::transport::{Transport, TransportPool, TransportRegistrar, local};
use refit::{Publication, RefitError, Source, Target, TargetOptions, allocate};

use crate::case::{self, Case, CaseError, Tensors};
use crate::device::{DeviceName, Gpus, Home};
use crate::error::CliError;
use crate::placement::{Placement, Wish};
use crate::transports::{self, TransportName};

use layouts::Layouts;

/// How long the reads of one case may take. The largest are megabytes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Replay golden cases: real trainer shards in, every engine tensor compared byte for byte.
///
/// A case is a folder with case.json, config.json and safetensors of every rank. source/bands.json or target/bands.json
/// in it, as `refit bands` prints them, take the place of the layouts that the model gives: a case of a model that is
/// not supported brings both. Exit status: 0 when all pass, 1 when a case fails, 2 when a case cannot be read.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folders of cases, or folders that hold some
    #[arg(required = true, value_name = "CASE")]
    cases: Vec<PathBuf>,
    /// Where every parameter lives; on GPUs sources are on the first, targets on the second if there is one
    #[arg(long, value_enum, default_value_t = DeviceName::Host)]
    device: DeviceName,
    /// How bytes move (default: local; with --device cuda: auto)
    #[arg(long, value_enum)]
    transport: Option<TransportName>,
}

/// Why a case did not pass.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// It cannot be read: not a verdict on the project.
    #[error("cannot be read: {0}")]
    Broken(#[from] CaseError),
    /// Its tensors are not those of such a model.
    #[error("refused: {0}")]
    Translate(#[from] TranslateError),
    /// Its model is not supported, and it brings no bands.
    #[error(
        "refused: {source}; a case of another model brings {side}/bands.json, see docs/bands.md"
    )]
    Model { source: TranslateError, side: Side },
    /// Its tensors are not those that its bands describe.
    #[error("{side} rank {rank}: {reason}")]
    Held { side: Side, rank: u32, reason: String },
    /// It cannot be planned or moved.
    #[error("{0}")]
    Refit(#[from] RefitError),
    /// Its memory or the transport cannot be had.
    #[error("{0}")]
    Setup(#[from] CliError),
    /// A byte is wrong.
    #[error(
        "target rank {rank}: `{tensor}` is wrong from byte {byte} on: {got:#04x} instead of {want:#04x}"
    )]
    Wrong { rank: u32, tensor: String, byte: usize, got: u8, want: u8 },
    /// A rank of the case holds other tensors than the plan writes.
    #[error("target rank {rank}: {reason}")]
    Other { rank: u32, reason: String },
}

impl<S: std::fmt::Debug> From<refit::Failed<S>> for Failure {
    fn from(failed: refit::Failed<S>) -> Self {
        Self::Refit(failed.error)
    }
}

/// What a case that passed came to.
#[derive(Default)]
struct Passed {
    ranks: usize,
    tensors: usize,
    bytes: u64,
    reads: u64,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode, CliError> {
    let default = match args.device {
        DeviceName::Host => TransportName::Local,
        DeviceName::Cuda => TransportName::Auto,
    };
    let transport = args.transport.unwrap_or(default).on(args.device)?;
    let homes = Homes::new(args.device)?;
    let (mut passed, mut failed, mut broken) = (0, 0, 0);
    for path in &args.cases {
        let folders = match case::find(path) {
            Ok(folders) => folders,
            Err(error) => {
                broken += 1;
                println!("BROKEN {}: {error}", case::name(path));
                continue;
            }
        };
        for folder in folders {
            let name = case::name(&folder);
            match replay(&folder, transport, &homes) {
                Ok(Passed { ranks, tensors, bytes, reads }) => {
                    passed += 1;
                    println!(
                        "ok     {name}: {ranks} target ranks, {tensors} tensors, {bytes} bytes, {reads} reads"
                    );
                }
                Err(Failure::Broken(error)) => {
                    broken += 1;
                    println!("BROKEN {name}: {error}");
                }
                Err(failure) => {
                    failed += 1;
                    println!("FAIL   {name}: {failure}");
                }
            }
        }
    }
    println!("{passed} passed, {} failed", failed + broken);
    Ok(match (failed, broken) {
        (0, 0) => ExitCode::SUCCESS,
        (_, 0) => ExitCode::from(1),
        _ => ExitCode::from(2),
    })
}

/// Where the parameters of either side live.
struct Homes {
    source: Home,
    target: Home,
}

impl Homes {
    fn new(device: DeviceName) -> Result<Self, CliError> {
        let (source, target) = match device {
            DeviceName::Host => (None, None),
            DeviceName::Cuda => {
                let placed = Placement::new(Gpus::count()?, 1, 1, Wish::default())?;
                println!("{placed}");
                (placed.source(0), placed.target(0))
            }
        };
        Ok(Self { source: Home::new(source)?, target: Home::new(target)? })
    }
}

fn replay(folder: &Path, transport: TransportName, homes: &Homes) -> Result<Passed, Failure> {
    let case = Case::open(folder)?;
    match transport {
        TransportName::Local => {
            let network = local::Network::new();
            let agent = |name: &str| local::LocalTransport::new(&network, name).map(Arc::new);
            let agents = agent("source").and_then(|source| Ok((source, agent("target")?)));
            let (source, target) = agents.map_err(RefitError::from)?;
            replay_over(&case, homes, source, target)
        }
        #[cfg(feature = "nixl")]
        TransportName::Nixl => {
            let agent = transports::nixl;
            let source = agent("source", true, &homes.source)?;
            replay_over(&case, homes, source, agent("target", false, &homes.target)?)
        }
        #[cfg(feature = "cuda")]
        TransportName::Peer => {
            let source = transports::peer("source", &homes.source)?;
            replay_over(&case, homes, source, transports::peer("target", &homes.target)?)
        }
        #[cfg(feature = "cuda")]
        TransportName::Auto => {
            let agent = transports::auto;
            let source = agent("source", true, &homes.source)?;
            replay_over(&case, homes, source, agent("target", false, &homes.target)?)
        }
        #[cfg(not(all(feature = "nixl", feature = "cuda")))]
        other => Err(transports::missing(other).into()),
    }
}

/// Publishes every source rank of a case from one agent and pulls every target rank of it from another.
fn replay_over<T: Transport>(
    case: &Case,
    homes: &Homes,
    publisher: Arc<T>,
    puller: Arc<T>,
) -> Result<Passed, Failure> {
    let (trainer, engine) = (Layouts::of(case, Side::Source)?, Layouts::of(case, Side::Target)?);
    let pool = TransportPool::new(
        homes.source.clone(),
        TransportRegistrar::new(publisher.clone()),
        PoolOptions::default(),
    );
    let mut sources = Vec::new();
    for rank in &case.source.ranks {
        let tensors = case.tensors(&rank.file)?;
        let layout = trainer.source(case, rank, &tensors.specs)?;
        let mut params = allocate(&layout, &homes.source)?;
        for (name, memory) in &mut params {
            let held = tensors.bytes.get(name.as_str()).map_or(&[][..], Vec::as_slice);
            homes.source.write(memory, held)?;
        }
        sources.push(Source::new(publisher.clone(), &pool, layout, params)?);
    }
    // Only now: what an agent publishes about itself must include every registration.
    let published: Vec<Publication> =
        sources.iter().map(Source::publication).collect::<Result<_, _>>()?;

    let pool = TransportPool::new(
        homes.target.clone(),
        TransportRegistrar::new(puller.clone()),
        PoolOptions::default(),
    );
    let mut passed = Passed::default();
    for rank in &case.target.ranks {
        let wanted = case.tensors(&rank.file)?;
        let layout = engine.target(case, rank, &wanted.specs)?;
        let (params, guards) = homes.target.guarded(&layout)?;
        let options = TargetOptions::default().with_lower(homes.target.lowering());
        let target = Target::new(puller.clone(), pool.clone(), layout, params, options)?;
        let target = homes.target.equip(target)?;
        let pulling = target.prepare(&published)?.pull()?;
        let (target, report) =
            pulling.wait(Instant::now() + PATIENCE)?.land()?.install().refreshed();
        compare(rank.rank, &homes.target, &target, &wanted)?;
        guards.check(&homes.target, target.layout())?;
        passed.ranks += 1;
        passed.tensors += wanted.specs.len();
        passed.bytes += target.layout().bytes();
        passed.reads += report.reads;
    }
    Ok(passed)
}

fn compare<T: Transport>(
    rank: u32,
    home: &Home,
    target: &Target<T>,
    wanted: &Tensors,
) -> Result<(), Failure> {
    let (mut compared, mut scratch) = (0, Vec::new());
    for (name, memory) in target.params() {
        let got = home.read(memory, 0..memory.len(), &mut scratch)?;
        let want = wanted.bytes.get(name).map_or(&[][..], Vec::as_slice);
        if got.len() != want.len() {
            let reason = format!("`{name}` has {} bytes instead of {}", got.len(), want.len());
            return Err(Failure::Other { rank, reason });
        }
        if let Some(byte) = got.iter().zip(want).position(|(got, want)| got != want) {
            let (got, want) = (got[byte], want[byte]);
            return Err(Failure::Wrong { rank, tensor: name.to_owned(), byte, got, want });
        }
        compared += 1;
    }
    if compared != wanted.bytes.len() {
        let reason = format!("{compared} of its {} tensors were written", wanted.bytes.len());
        return Err(Failure::Other { rank, reason });
    }
    Ok(())
}
