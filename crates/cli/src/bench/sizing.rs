//! How many layers fit.

use refit::translate::ModelConfig;

use crate::error::CliError;
use crate::model;
use crate::sizes::{SourceSizes, TargetSizes};

/// A bench may take this share of the free memory: pages that the system caches for others stay where they are.
const SHARE_PERCENT: u64 = 50;

/// The bytes of a bench of this model: sources, targets, what targets stage and what they measure ceilings with.
pub(crate) fn bytes(
    config: &ModelConfig,
    source: SourceSizes,
    target: TargetSizes,
) -> Result<u64, CliError> {
    let sources: u64 =
        model::source(config, source)?.iter().map(refit::planner::RankLayout::bytes).sum();
    let targets: u64 =
        model::target(config, target)?.iter().map(|target| target.layout.bytes()).sum();
    Ok(sources + 3 * targets)
}

/// The most layers, at least one, with which every one of these pairs fits into the free memory.
pub(crate) fn layers(
    config: &ModelConfig,
    pairs: &[(SourceSizes, TargetSizes)],
    free: u64,
) -> Result<u32, CliError> {
    let budget = free / 100 * SHARE_PERCENT;
    for layers in (1..=config.num_layers).rev() {
        let mut smaller = config.clone();
        smaller.num_layers = layers;
        let mut fits = true;
        for &(source, target) in pairs {
            if !source.takes(layers) {
                fits = false;
                break;
            }
            fits &= bytes(&smaller, source, target)? <= budget;
        }
        if fits {
            return Ok(layers);
        }
    }
    let message = format!(
        "not even one layer a stage of this model fits into half of the {} MB of free memory; \
         give --layers to try all the same",
        free / 1_000_000
    );
    Err(CliError::Usage(message))
}

/// `MemAvailable`: what new programs can have without swapping.
pub(crate) fn free_memory() -> Result<u64, CliError> {
    let text =
        std::fs::read_to_string("/proc/meminfo").map_err(CliError::system("read /proc/meminfo"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kilobytes.map(|kilobytes| kilobytes * 1024).ok_or_else(|| {
        CliError::Usage(
            "this system does not say how much memory is free; give --layers".to_owned(),
        )
    })
}
