//! What a person says to `refit bench`, and what it says to its ranks.

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;

use super::rank::RankSetup;
use crate::device::DeviceName;
use crate::error::CliError;
use crate::model;
use crate::sizes::{SourceSizes, TargetSizes};
use crate::transports::TransportName;

/// Refit a model between processes: every cycle changes the source's bytes and every target byte is verified.
///
/// Without --source and --target it runs TP 1->1, 2->2, 2->1 and 4->2. Without --layers it takes as many layers of
/// the model as the free memory holds, and says so. With --device cuda every rank keeps its parameters on a GPU; bytes
/// are made and compared on the host all the same.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[arg(long, default_value = "qwen3-4b", help = model::help())]
    pub(super) config: String,
    /// Decoder layers to keep of the model (default: as many as half of the free memory holds, or 90% of that of GPUs)
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) layers: Option<u32>,
    /// Trainer sizes; what is not said is 1, etp too, although Megatron's own default for it is tp (with neither side
    /// given: TP 1 -> 1, 2 -> 2, 2 -> 1 and 4 -> 2 in turn)
    #[arg(long, value_name = SourceSizes::SHAPE)]
    pub(super) source: Option<SourceSizes>,
    /// Engine sizes (default, where the trainer's are given: tp=1)
    #[arg(long, value_name = TargetSizes::SHAPE)]
    pub(super) target: Option<TargetSizes>,
    /// Rounds; each has a cycle of every kind and a measurement of every ceiling
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) cycles: u32,
    /// Where parameters live
    #[arg(long, value_enum, default_value_t = DeviceName::Host)]
    pub(super) device: DeviceName,
    /// GPUs of the trainer's ranks, cycled through by rank (default: one each if there are enough for all ranks; else
    /// every target beside its source; else the first half of the GPUs)
    #[arg(long, value_name = "GPU,...", value_delimiter = ',')]
    pub(super) source_devices: Vec<u32>,
    /// GPUs of the engine's ranks, likewise (default, where there are not enough: the second half)
    #[arg(long, value_name = "GPU,...", value_delimiter = ',')]
    pub(super) target_devices: Vec<u32>,
    /// How bytes move
    #[arg(long, value_enum, default_value_t = TransportName::Auto)]
    pub(super) transport: TransportName,
    /// Give every parameter of a source an allocation of its own, as torch does without an arena
    #[arg(long)]
    pub(super) separate: bool,
    /// Let sources pack what targets would read scattered, behind every change of their values, which costs the trainer
    /// what is printed and is not part of a refit
    #[arg(long)]
    pub(super) pack: bool,
    /// Print a third kind of cycle: the same plan with one read per contiguous run (on by itself where it differs
    /// and no sizes are given)
    #[arg(long)]
    pub(super) read_per_row: bool,
    /// What a wave may stage before it is landed, in MiB; 0 stages everything at once (default: 8, on GPUs 256)
    #[arg(long, value_name = "MIB")]
    pub(super) wave: Option<u64>,
    /// Write every number to a file
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Seconds after which a rank that does not answer, or a pull that does not settle, is an error
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    #[arg(value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub(super) patience: u64,
}

impl Args {
    /// Refuses a choice of GPUs where there are none to choose.
    pub(super) fn check(&self) -> Result<(), CliError> {
        let chosen = !self.source_devices.is_empty() || !self.target_devices.is_empty();
        if chosen && self.device != DeviceName::Cuda {
            let text = "--source-devices and --target-devices choose GPUs: add --device cuda";
            return Err(CliError::Usage(text.to_owned()));
        }
        Ok(())
    }
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
    pub(super) role: Role,
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
    pub(super) transport: TransportName,
    #[arg(long)]
    gpu: Option<u32>,
    #[arg(long)]
    copies: bool,
    #[arg(long)]
    separate: bool,
    #[arg(long)]
    directory: PathBuf,
    #[arg(long)]
    threads: usize,
    #[arg(long)]
    wave: Option<u64>,
    #[arg(long)]
    patience: u64,
}

impl RankArgs {
    /// The arguments of a rank with this setup.
    pub(super) fn to_arguments(
        role: Role,
        setup: &RankSetup,
        transport: TransportName,
    ) -> Vec<String> {
        let values = [
            ("--rank", setup.rank.to_string()),
            ("--config", setup.config.clone()),
            ("--layers", setup.layers.to_string()),
            ("--source", setup.source.argument()),
            ("--target", setup.target.argument()),
            ("--transport", transport.name().to_owned()),
            ("--directory", setup.directory.display().to_string()),
            ("--threads", setup.threads.to_string()),
            ("--patience", setup.patience.as_secs().to_string()),
        ];
        let gpu = setup.gpu.map(|gpu| ("--gpu", gpu.to_string()));
        let wave = setup.wave.map(|wave| ("--wave", wave.to_string()));
        let options = values.into_iter().chain(gpu).chain(wave);
        let options = options.flat_map(|(name, value)| [name.to_owned(), value]);
        let flags = [("--copies", setup.copies), ("--separate", setup.separate)];
        let flags = flags.into_iter().filter(|(_, on)| *on).map(|(name, _)| name.to_owned());
        std::iter::once(role.name().to_owned()).chain(options).chain(flags).collect()
    }

    /// The setup that these arguments were made of.
    pub(super) fn setup(&self) -> Result<RankSetup, CliError> {
        let wrong = |side| move |reason| CliError::Sizes { side, reason };
        Ok(RankSetup {
            config: self.config.clone(),
            layers: self.layers,
            source: self.source.parse().map_err(wrong("source"))?,
            target: self.target.parse().map_err(wrong("target"))?,
            rank: self.rank,
            gpu: self.gpu,
            copies: self.copies,
            separate: self.separate,
            directory: self.directory.clone(),
            own_process: true,
            threads: self.threads,
            wave: self.wave,
            patience: Duration::from_secs(self.patience),
        })
    }
}
