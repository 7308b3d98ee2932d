//! How many layers fit.

use std::collections::BTreeMap;

use refit::planner::RankLayout;
use refit::translate::ModelConfig;

use crate::error::CliError;
use crate::model;
use crate::placement::Placement;
use crate::sizes::{SourceSizes, TargetSizes, bytes as shown};

/// A bench may take this share of the host's free memory: pages that the system caches for others stay where they are.
const HOST_PERCENT: u64 = 50;

/// And this share of a GPU's, where nobody else's pages lie.
const GPU_PERCENT: u64 = 90;

/// What a rank takes of a GPU besides its parameters: its context, and what transports keep there.
const GPU_RANK_BYTES: u64 = 1 << 30;

/// One pair of sizes, and where its ranks run if that is on GPUs.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    pub(crate) source: SourceSizes,
    pub(crate) target: TargetSizes,
    pub(crate) placement: Option<Placement>,
    /// Whether targets measure copies beside their transport, for which they need memory once more.
    pub(crate) copies: bool,
}

/// The memory that a bench may use.
#[derive(Clone, Debug)]
pub(crate) enum Room {
    /// Free bytes.
    Host(u64),
    /// Free bytes by GPU.
    Gpus(BTreeMap<u32, u64>),
}

impl Room {
    fn holds(&self, config: &ModelConfig, pair: &Pair) -> Result<bool, CliError> {
        let (sources, targets) = bytes(config, pair)?;
        let (free, placement) = match (self, &pair.placement) {
            (Self::Gpus(free), Some(placement)) => (free, placement),
            (Self::Host(free), _) => {
                let all: u64 = sources.iter().chain(&targets).sum();
                return Ok(all <= free / 100 * HOST_PERCENT);
            }
            (Self::Gpus(_), None) => return Ok(false),
        };
        let mut taken = BTreeMap::<u32, u64>::new();
        let sources = (0..).zip(sources).map(|(rank, bytes)| (placement.source(rank), bytes));
        let targets = (0..).zip(targets).map(|(rank, bytes)| (placement.target(rank), bytes));
        for (gpu, bytes) in sources.chain(targets) {
            let Some(gpu) = gpu else { return Ok(false) };
            *taken.entry(gpu).or_default() += bytes + GPU_RANK_BYTES;
        }
        let fits = |(gpu, taken): (&u32, &u64)| {
            free.get(gpu).is_some_and(|free| *taken <= free / 100 * GPU_PERCENT)
        };
        Ok(taken.iter().all(fits))
    }

    /// How a person would name it.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Host(free) => format!("half of the {} of free memory", shown(*free)),
            Self::Gpus(free) => {
                let least = free.values().min().copied().unwrap_or_default();
                format!("{GPU_PERCENT}% of the GPUs' free memory ({} on the fullest)", shown(least))
            }
        }
    }
}

/// The bytes that each source rank holds, and that each target rank holds, stages and measures ceilings with.
pub(crate) fn bytes(config: &ModelConfig, pair: &Pair) -> Result<(Vec<u64>, Vec<u64>), CliError> {
    let sources = model::source(config, pair.source)?;
    let targets = model::target(config, pair.target)?;
    let times = if pair.copies { 4 } else { 3 };
    Ok((
        sources.iter().map(RankLayout::bytes).collect(),
        targets.iter().map(|target| target.layout.bytes().saturating_mul(times)).collect(),
    ))
}

/// The most layers, at least one, with which every one of these pairs fits.
pub(crate) fn layers(config: &ModelConfig, pairs: &[Pair], room: &Room) -> Result<u32, CliError> {
    for layers in (1..=config.num_layers).rev() {
        let mut smaller = config.clone();
        smaller.num_layers = layers;
        let mut fits = true;
        for pair in pairs {
            if !pair.source.takes(layers) {
                fits = false;
                break;
            }
            fits &= room.holds(&smaller, pair)?;
        }
        if fits {
            return Ok(layers);
        }
    }
    let message = format!(
        "not even one layer a stage of this model fits into {}; give --layers to try all the same",
        room.text()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::Wish;

    fn pair(gpus: u32) -> Pair {
        let placement = Placement::new(gpus, 2, 1, Wish::default()).unwrap();
        Pair {
            source: SourceSizes::new(2),
            target: TargetSizes::new(1),
            placement: Some(placement),
            copies: false,
        }
    }

    #[test]
    fn every_gpu_must_hold_its_own_ranks() {
        let mut config = model::config("qwen3-4b").unwrap();
        config.num_layers = 2;
        let (sources, targets) = bytes(&config, &pair(3)).unwrap();
        // On three GPUs a rank each; on two the sources share one.
        let needed = |bytes: u64| (bytes + GPU_RANK_BYTES) * 100 / GPU_PERCENT + 100;
        let three = [needed(sources[0]), needed(sources[1]), needed(targets[0])];
        let room = |free: &[u64]| Room::Gpus((0..).zip(free.iter().copied()).collect());
        assert!(room(&three).holds(&config, &pair(3)).unwrap());
        for small in 0..3 {
            let mut free = three;
            free[small] = free[small] / 10 * 9;
            assert!(!room(&free).holds(&config, &pair(3)).unwrap(), "{small}");
        }
        let two = [needed(sources[0]) + needed(sources[1]), needed(targets[0])];
        assert!(room(&two).holds(&config, &pair(2)).unwrap());
        assert!(!room(&[two[0] - needed(sources[1]), two[1]]).holds(&config, &pair(2)).unwrap());
        // Copies take a target's bytes once more.
        let copies = Pair { copies: true, ..pair(3) };
        assert_eq!(bytes(&config, &copies).unwrap().1[0], targets[0] / 3 * 4);
        assert!(!room(&three).holds(&config, &copies).unwrap());
        // The more room, the more layers; never more than there are.
        let config = model::config("qwen3-4b").unwrap();
        let layers = |free: u64| layers(&config, &[pair(2)], &room(&[free, free]));
        assert_eq!(layers(140_000_000_000).unwrap(), 36);
        assert!((1..36).contains(&layers(16_000_000_000).unwrap()));
        let refused = layers(1_000_000_000).unwrap_err().to_string();
        assert!(refused.contains("give --layers"), "{refused}");
    }
}
