//! `refit bands`: layouts as files, and files as layouts.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use refit::planner::RankLayout;
use refit::translate::bands::{self, BandsError, MAX_TEXT_BYTES, Side};

use crate::case::CaseError;
use crate::error::CliError;
use crate::model;
use crate::sizes::{SourceSizes, TargetSizes};

/// Print one side's layouts as JSON: those of a model, to see the format or to edit it, or those of files.
///
/// Files may hold what an engine's own loader was seen to copy; they are printed as the bands that come of it. The
/// format is described in docs/bands.md.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("side").required(true).args(["source", "target", "files"]))]
pub(crate) struct Args {
    /// Files that describe some ranks of one side each
    #[arg(value_name = "FILE", conflicts_with = "config")]
    files: Vec<PathBuf>,
    #[arg(long, default_value = model::DEFAULT, help = model::help())]
    config: String,
    /// Trainer sizes
    #[arg(long, value_name = SourceSizes::SHAPE)]
    source: Option<SourceSizes>,
    /// Engine sizes
    #[arg(long, value_name = TargetSizes::SHAPE)]
    target: Option<TargetSizes>,
    /// Only this rank
    #[arg(long)]
    rank: Option<u32>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode, CliError> {
    let (side, about, ranks) = match (args.source, args.target) {
        (Some(sizes), _) => {
            let ranks = model::source(&model::config(&args.config)?, sizes)?;
            (Side::Source, format!("{} on {sizes} of Megatron-Core", args.config), ranks)
        }
        (None, Some(sizes)) => {
            let ranks = model::target(&model::config(&args.config)?, sizes)?;
            let ranks = ranks.into_iter().map(|rank| rank.layout).collect();
            (Side::Target, format!("{} on {sizes} of vLLM", args.config), ranks)
        }
        (None, None) => {
            let side =
                args.files.first().map_or(Ok(Side::Source), |file| read(file).map(|it| it.side))?;
            (side, name(&args.files), layouts(&args.files, side)?)
        }
    };
    let all = ranks.len();
    let ranks: Vec<RankLayout> = ranks
        .into_iter()
        .filter(|layout| args.rank.is_none_or(|rank| rank == layout.rank()))
        .collect();
    if let (Some(rank), true) = (args.rank, ranks.is_empty()) {
        return Err(CliError::Usage(format!(
            "there is no rank {rank} among the {all} of this side"
        )));
    }
    match io::stdout().write_all(bands::write(side, &about, &ranks).as_bytes()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        result => result.map(|()| ExitCode::SUCCESS).map_err(CliError::system("print")),
    }
}

/// Layouts from files in place of those of a model.
#[derive(Debug, clap::Args)]
pub(crate) struct Files {
    /// The trainer's layouts, from files as `refit bands` prints them; for several ranks in several, give it again
    #[arg(long, value_name = "FILE", conflicts_with = "source")]
    pub(crate) source_bands: Vec<PathBuf>,
    /// The engine's layouts, likewise
    #[arg(long, value_name = "FILE", conflicts_with = "target")]
    pub(crate) target_bands: Vec<PathBuf>,
}

impl Files {
    /// Refuses a model that nothing would come from.
    pub(crate) fn check(&self, model_given: bool) -> Result<(), CliError> {
        if model_given && !self.source_bands.is_empty() && !self.target_bands.is_empty() {
            let text = "both sides come from files: leave --config out, or one of the sides";
            return Err(CliError::Usage(text.to_owned()));
        }
        Ok(())
    }
}

/// The ranks of one side, from the files that describe some of them each.
pub(crate) fn layouts(files: &[PathBuf], side: Side) -> Result<Vec<RankLayout>, CaseError> {
    let mut layouts = BTreeMap::new();
    for path in files {
        let found = read(path)?;
        if found.side != side {
            return Err(CaseError::Side { path: path.clone(), found: found.side, wanted: side });
        }
        for layout in found.ranks {
            let rank = layout.rank();
            if layouts.insert(rank, layout).is_some() {
                return Err(CaseError::Rank { path: path.clone(), rank });
            }
        }
    }
    Ok(layouts.into_values().collect())
}

/// What a person calls layouts from files.
pub(crate) fn name(files: &[PathBuf]) -> String {
    let names: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
    names.join(", ")
}

fn read(path: &Path) -> Result<bands::Bands, CaseError> {
    let refused = |source| CaseError::Bands { path: path.to_path_buf(), source };
    let io = |source| CaseError::Io { path: path.to_path_buf(), source };
    // Before it is read: a file may be larger than memory.
    let bytes = usize::try_from(fs::metadata(path).map_err(io)?.len()).unwrap_or(usize::MAX);
    if bytes > MAX_TEXT_BYTES {
        return Err(refused(BandsError::TooLong { bytes }));
    }
    bands::read(&fs::read_to_string(path).map_err(io)?).map_err(refused)
}
