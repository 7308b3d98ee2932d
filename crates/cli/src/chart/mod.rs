//! `refit chart`: what `refit bench --json` and the scripts of `benches/peers` wrote, as a picture.

mod read;
mod svg;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::error::CliError;

/// Draw what `refit bench --json` wrote: whole refits, their pulls and the ceiling for each pair of sizes.
///
/// Files of benches/peers/gpu.py add what others take for the same. Models have panels of their own. The same files
/// give the same picture, byte for byte.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Files of `refit bench --json` and of benches/peers, in the order in which they are drawn
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The picture to write
    #[arg(long, value_name = "FILE.svg")]
    out: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode, CliError> {
    let mut chart = read::Chart::default();
    for path in &args.files {
        let text = std::fs::read_to_string(path)
            .map_err(|source| CliError::Read { path: path.clone(), source })?;
        chart
            .add(&name(path), &text)
            .map_err(|reason| CliError::Usage(format!("{}: {reason}", path.display())))?;
    }
    std::fs::write(&args.out, svg::draw(&chart))
        .map_err(|source| CliError::Write { path: args.out.clone(), source })?;
    let models: Vec<_> = chart.panels.iter().map(|panel| panel.model.as_str()).collect();
    println!("{}: {}", args.out.display(), models.join(", "));
    Ok(ExitCode::SUCCESS)
}

/// The name of a file without its folders: where it lay is nobody's business.
fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
