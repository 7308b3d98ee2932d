//! What a person says to `refit serve` and `refit pull`.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use refit::planner::{RankLayout, Tensor};
use refit::translate::{ModelConfig, TargetLayout};
use refit_service::Stop;
use refit_service::reader::Checks;
use refit_service::rendezvous::Address;

use super::checkpoint::Checkpoint;
use crate::bench::values::Values;
use crate::device::DeviceName;
use crate::error::CliError;
use crate::model;
use crate::sizes::{SourceSizes, TargetSizes};
use crate::transports::TransportName;

/// What both sides have to be told.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Common {
    /// Where the ranks of the job meet: `dir:PATH` for processes of one host, `etcd:URL,...` for everything else
    #[arg(long, value_name = "dir:PATH|etcd:URL", value_parser = address)]
    pub(super) rendezvous: Address,
    /// The job; ranks of other jobs are refused
    #[arg(long, default_value = "refit", value_name = "NAME")]
    pub(super) job: String,
    /// The rank, counted from 0
    #[arg(long, value_name = "N")]
    pub(super) rank: u32,
    #[arg(long, value_name = "FILE|MODEL", help = format!("{} (default: that of --checkpoint, or {})", model::help(), model::DEFAULT))]
    config: Option<String>,
    /// Decoder layers to keep of the model (default: all)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    layers: Option<u32>,
    /// The model's name at the rendezvous: ranks of others do not meet (default: that of the bundled model, else
    /// `model`, and the number of layers)
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// A folder with config.json and safetensors in Hugging Face names. `serve` holds what is in there, and reads it again
    /// for every version; `pull` compares with it. Without one, values are made from the version's number
    #[arg(long, value_name = "FOLDER")]
    checkpoint: Option<PathBuf>,
    /// How bytes move; `local`, which does not leave its process, is refused here
    #[arg(long, value_enum, default_value_t = TransportName::Auto)]
    pub(super) transport: TransportName,
    /// The number of the GPU that holds the rank (default: the host does)
    #[arg(long, value_name = "N")]
    pub(super) gpu: Option<u32>,
    /// A file with the job's key, readable by this user only (default: the variable REFIT_JOB_KEY if there is one; else no
    /// key, which is taken where nobody else can write to the rendezvous)
    #[arg(long, value_name = "FILE")]
    pub(super) key_file: Option<PathBuf>,
    /// Let UCX use TCP over this interface (`all`: over every one; default: over none but this host's own). Whoever can connect
    /// there can read and write the memory of this process
    #[arg(long, value_name = "IFACE")]
    pub(super) insecure_tcp: Option<String>,
    /// What one step may take: joining, a version from its offer until it is installed, waiting for readers
    #[arg(long, default_value = "30", value_name = "SECONDS", value_parser = seconds)]
    pub(super) deadline: Duration,
    /// After what silence this process counts as dead
    #[arg(long, default_value = "10", value_name = "SECONDS", value_parser = seconds)]
    pub(super) ttl: Duration,
    /// The longest that leaving waits for others
    #[arg(long, default_value = "10", value_name = "SECONDS", value_parser = seconds)]
    pub(super) drain: Duration,
    /// Threads that write and compare values (default: as many as there are cores)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Answer GET /metrics here, for Prometheus; port 0 takes a free one, which is printed (default: nowhere)
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(super) metrics: Option<SocketAddr>,
    /// Let --metrics be an address that other hosts can reach: what is there is not encrypted, and asks nobody who they are
    #[arg(long, requires = "metrics")]
    metrics_beyond_this_host: bool,
    /// Print one JSON value a line instead of text
    #[arg(long)]
    pub(super) json: bool,
    /// Log more, to standard error: -v what happens, -vv every stage and how long it took, -vvv everything. RUST_LOG, if it
    /// is set, wins
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub(super) verbose: u8,
}

/// Serve one rank of a trainer: hold its parameters and offer them, version after version.
///
/// All ranks of a group offer the same version, or nothing is offered. Rank 0 says when the next comes: every --every
/// seconds, and whenever it gets SIGUSR1; the others follow it. SIGTERM or SIGINT: waits for nothing else any more, withdraws,
/// waits for readers, and ends with status 0, or with 1 if some are left after --drain; a second one ends it at once. Status 1:
/// failed; 2: asked for something that there is not.
#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(super) common: Common,
    /// Trainer sizes; the same for all ranks
    #[arg(long, value_name = SourceSizes::SHAPE)]
    pub(super) source: SourceSizes,
    /// The ranks that commit together
    #[arg(long, default_value = "trainer", value_name = "NAME")]
    pub(super) group: String,
    /// How long after a version the next one comes; rank 0 alone counts that (default: the next comes with SIGUSR1)
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(super) every: Option<Duration>,
    /// Leave after so many versions, each of which is offered for --every seconds (default: stay)
    #[arg(long, value_name = "N", requires = "every", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) versions: Option<u64>,
    /// The number of the first version (default: above every one that can be found). A number names bytes for ever
    #[arg(long, value_name = "N")]
    pub(super) first_version: Option<u64>,
    /// The longest that a reader which is silent holds up the next version
    #[arg(long, default_value = "30", value_name = "SECONDS", value_parser = seconds)]
    pub(super) lease: Duration,
}

/// Pull versions into one rank of an engine, as they are offered, and compare every byte.
///
/// All ranks of a replica install the same version, or none does. A pull that fails is told and tried again. SIGTERM or
/// SIGINT: waits for nothing but its own reads any more, leaves its replica, and ends with status 0, or with 1 if reads are under
/// way still after --drain; a second one ends it at once. Status 1: failed; 2: asked for something that there is not.
#[derive(Debug, clap::Args)]
pub(crate) struct PullArgs {
    #[command(flatten)]
    pub(super) common: Common,
    /// Engine sizes; the same for all ranks
    #[arg(long, value_name = TargetSizes::SHAPE)]
    pub(super) target: TargetSizes,
    /// The ranks that answer together
    #[arg(long, default_value = "engine", value_name = "NAME")]
    pub(super) replica: String,
    /// Read into a second set of parameters, and copy it to the live ones when all ranks have it (default)
    #[arg(long, conflicts_with = "paused")]
    pub(super) staged: bool,
    /// Read into the live parameters, as an engine that stands still does. Not together with other ranks
    #[arg(long)]
    pub(super) paused: bool,
    /// Offer to others what was read, as a group of the replica's name
    #[arg(long)]
    pub(super) relay: bool,
    /// Compare what has landed with what its source says of it
    #[arg(long, value_enum, default_value_t = Digests::Never)]
    pub(super) digests: Digests,
    /// Leave after so many versions (default: stay)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) versions: Option<u64>,
    /// Give up when nothing new could be read for so long
    #[arg(long, default_value = "600", value_name = "SECONDS", value_parser = seconds)]
    pub(super) wait: Duration,
    /// The longest lease that is taken. One attempt goes on for no longer, and for half of --deadline at most
    #[arg(long, default_value = "30", value_name = "SECONDS", value_parser = seconds)]
    pub(super) lease: Duration,
    /// Most ranks that read a group at a time
    #[arg(long, default_value = "16", value_name = "N")]
    pub(super) fanout: NonZeroU32,
    /// Do not compare what was installed with what it should be
    #[arg(long)]
    pub(super) no_verify: bool,
    /// Trainer sizes, where the trainer holds layers that predict tokens further ahead (mtp=N); it tells the others itself
    #[arg(long, value_name = SourceSizes::SHAPE)]
    source: Option<SourceSizes>,
}

/// Whether what has landed is compared with what its source says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Digests {
    /// It is not
    Never,
    /// Where the source has answered
    IfAnswered,
    /// It is, and waited for
    Always,
}

impl From<Digests> for Checks {
    fn from(digests: Digests) -> Self {
        match digests {
            Digests::Never => Self::Never,
            Digests::IfAnswered => Self::IfAnswered,
            Digests::Always => Self::Always,
        }
    }
}

/// What one rank holds.
#[derive(Debug)]
pub(super) struct Holding<L> {
    pub(super) layout: L,
    pub(super) ranks: u32,
    /// What its parameters are to hold.
    pub(super) values: Contents,
    pub(super) threads: usize,
    /// The model's name at the rendezvous.
    pub(super) model: String,
}

/// What parameters hold, version by version.
#[derive(Debug)]
pub(super) struct Contents {
    values: Values,
    checkpoint: Option<PathBuf>,
    /// What the rank takes of it.
    tensors: Vec<Tensor>,
}

impl Contents {
    /// Writes and compares no more once this is told.
    pub(super) fn heed(&mut self, stop: Stop) {
        self.values.heed(stop);
    }

    /// Of a version that begins now: what the folder holds now, if there is one.
    pub(super) fn renewed(&mut self) -> Result<&Values, CliError> {
        if let Some(folder) = &self.checkpoint {
            self.values.set_checkpoint(&self.tensors, Checkpoint::open(folder)?)?;
        }
        Ok(&self.values)
    }
}

impl Common {
    pub(super) fn device(&self) -> DeviceName {
        if self.gpu.is_some() { DeviceName::Cuda } else { DeviceName::Host }
    }

    /// The transport, one that crosses processes.
    pub(super) fn transport(&self) -> Result<TransportName, CliError> {
        if self.transport == TransportName::Local
            || (self.transport == TransportName::Auto
                && self.gpu.is_none()
                && cfg!(not(feature = "nixl")))
        {
            return Err(CliError::Usage(format!(
                "the local transport does not leave its process, and serve and pull are two: take --transport nixl{}",
                if cfg!(feature = "nixl") {
                    ""
                } else {
                    ", in a build with it (`cargo xtask refit -- ...`, or `--features nixl`)"
                }
            )));
        }
        if self.transport == TransportName::Peer && self.gpu.is_none() {
            let text = "the peer transport moves memory of GPUs only: add --gpu N, or take --transport nixl";
            return Err(CliError::Usage(text.to_owned()));
        }
        self.transport.on(self.device())
    }

    /// Where metrics are answered, if they are.
    pub(super) fn metrics(&self) -> Result<Option<SocketAddr>, CliError> {
        match self.metrics {
            Some(at) if !at.ip().is_loopback() && !self.metrics_beyond_this_host => {
                Err(CliError::Usage(format!(
                    "--metrics {at} can be reached from other hosts, and asks nobody who they are: take 127.0.0.1, or say \
                     --metrics-beyond-this-host"
                )))
            }
            at => Ok(at),
        }
    }

    fn model(&self) -> Result<(ModelConfig, String), CliError> {
        let name = match (&self.config, &self.checkpoint) {
            (Some(config), _) => config.clone(),
            (None, Some(folder)) => folder.join("config.json").display().to_string(),
            (None, None) => model::DEFAULT.to_owned(),
        };
        let mut config = model::config(&name)?;
        if let Some(layers) = self.layers {
            if layers > config.num_layers {
                let most = config.num_layers;
                return Err(CliError::Usage(format!("--layers {layers}: the model has {most}")));
            }
            config.num_layers = layers;
        }
        let bundled = model::PRESETS.iter().any(|(bundled, _)| *bundled == name);
        let known = if bundled { &name } else { "model" };
        let layers = config.num_layers;
        let name = self.model.clone().unwrap_or_else(|| format!("{known}-{layers}"));
        Ok((config, name))
    }

    fn holding<L>(
        &self,
        layouts: Vec<L>,
        of: impl Fn(&L) -> &RankLayout,
        what: &str,
        values: Values,
        model: String,
    ) -> Result<Holding<L>, CliError> {
        let ranks = u32::try_from(layouts.len()).unwrap_or(u32::MAX);
        let layout = layouts.into_iter().find(|layout| of(layout).rank() == self.rank);
        let layout = layout.ok_or_else(|| {
            let (rank, last) = (self.rank, ranks.saturating_sub(1));
            CliError::Usage(format!("--rank {rank}: {what} has {ranks} ranks, 0 to {last}"))
        })?;
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.threads.map_or_else(cores, usize::from);
        let tensors = of(&layout).tensors().to_vec();
        let values = Contents { values, checkpoint: self.checkpoint.clone(), tensors };
        Ok(Holding { layout, ranks, values, threads, model })
    }
}

impl ServeArgs {
    pub(super) fn holding(&self) -> Result<Holding<RankLayout>, CliError> {
        let (config, model) = self.common.model()?;
        let layouts = model::source(&config, self.source)?;
        // What elements look like does not depend on the engine's sizes.
        let values = Values::new(&layouts, &plain(model::target(&config, TargetSizes::new(1))?))?;
        let what = format!("a trainer of {}", self.source.argument());
        self.common.holding(layouts, |it| it, &what, values, model)
    }
}

impl PullArgs {
    pub(super) fn holding(&self) -> Result<Holding<TargetLayout>, CliError> {
        let (config, model) = self.common.model()?;
        let layouts = model::target(&config, self.target)?;
        if self.paused && layouts.len() > 1 {
            return Err(CliError::Usage(format!(
                "--paused reads into live parameters, which {} ranks cannot do together: leave it out",
                layouts.len()
            )));
        }
        let sizes = self.source.unwrap_or_else(|| SourceSizes::new(1));
        let targets: Vec<RankLayout> = layouts.iter().map(|it| it.layout.clone()).collect();
        let values = Values::new(&model::source(&config, sizes)?, &targets)?;
        let what = format!("an engine of {}", self.target.argument());
        self.common.holding(layouts, |it| &it.layout, &what, values, model)
    }
}

fn plain(layouts: Vec<TargetLayout>) -> Vec<RankLayout> {
    layouts.into_iter().map(|target| target.layout).collect()
}

/// An address that other processes reach.
fn address(text: &str) -> Result<Address, String> {
    match text.parse() {
        Ok(Address::InProcess(_)) => Err("write dir:PATH or etcd:http://HOST:PORT".to_owned()),
        Ok(address) => Ok(address),
        Err(error) => Err(error.to_string()),
    }
}

/// Seconds, with a fraction if need be.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    if !(0.1..=86_400.0).contains(&seconds) {
        return Err("seconds go from 0.1 to 86400".to_owned());
    }
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
