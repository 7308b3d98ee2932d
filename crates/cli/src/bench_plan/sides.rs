//! Who plans from whom.

use std::path::Path;
use std::{fmt, fs};

use refit::planner::RankLayout;
use refit::translate::ModelConfig;
use refit::translate::megatron::{self, Pipeline, SourceRank, TrainerOptions, TrainerSizes};
use refit::translate::vllm::{self, TargetRank};
use serde_json::json;

use super::Preset;
use crate::error::CliError;
use crate::model;

/// Both sides of a job; any rank's layout can be made by itself.
pub(super) struct Sides {
    config: ModelConfig,
    source: Sharding,
    target: Sharding,
    sources: Vec<SourceRank>,
    targets: Targets,
}

enum Targets {
    /// The same way of holding as on the source side: a parameter for every expert, as other planners have it.
    Trainer(Vec<SourceRank>),
    /// An engine's, as they are. No experts.
    Engine(Vec<TargetRank>),
}

/// How one side shares a model out. Experts are not sharded over tensor-parallel ranks.
#[derive(Clone, Copy)]
struct Sharding {
    /// All ranks; whatever the other two do not divide are copies.
    ranks: u32,
    /// Tensor-parallel size of everything but routed experts.
    tp: u32,
    /// Expert-parallel size.
    ep: u32,
}

impl Sharding {
    fn trainer(self, config: &ModelConfig) -> Result<Vec<SourceRank>, CliError> {
        let sizes = TrainerSizes::new(self.tp).with_dp(self.ranks / self.tp).with_ep(self.ep);
        Ok(sizes.ranks(&Pipeline::new(1).stages(config.num_layers)?)?)
    }

    fn engine(self) -> Vec<TargetRank> {
        (0..self.ranks).map(|rank| TargetRank::new(rank, rank % self.tp, self.tp)).collect()
    }

    /// Ranks until layouts repeat: the least common multiple of the parallel sizes.
    fn distinct(self) -> u32 {
        let (mut a, mut b) = (self.tp, self.ep);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        (self.tp / a).saturating_mul(self.ep).min(self.ranks)
    }
}

impl Sides {
    pub(super) fn of(preset: Preset) -> Result<Self, CliError> {
        let dense = |tp: u32| Sharding { ranks: tp, tp, ep: 1 };
        let spread = |ranks: u32| Sharding { ranks, tp: 8, ep: 32 };
        let (name, source, target) = match preset {
            Preset::KimiK2 => ("kimi-k2", spread(256), spread(128)),
            Preset::DeepseekV3 => ("deepseek-v3", spread(256), spread(128)),
            Preset::Llama70b => ("llama-3.1-70b", dense(8), dense(4)),
            Preset::Qwen3 => ("qwen3-4b", dense(4), dense(2)),
        };
        Self::new(model::config(name)?, source, target)
    }

    fn new(config: ModelConfig, source: Sharding, target: Sharding) -> Result<Self, CliError> {
        let sources = source.trainer(&config)?;
        let targets = match config.moe {
            Some(_) => Targets::Trainer(target.trainer(&config)?),
            None => Targets::Engine(target.engine()),
        };
        Ok(Self { config, source, target, sources, targets })
    }

    /// The same job on this many target ranks and twice as many source ranks: more copies, and fewer experts a rank
    /// until the expert-parallel size is reached.
    pub(super) fn with_target_ranks(&self, ranks: u32) -> Result<Self, CliError> {
        let scaled =
            |side: Sharding, ranks: u32| Sharding { ranks, ep: side.ep.min(ranks), ..side };
        Self::new(self.config.clone(), scaled(self.source, 2 * ranks), scaled(self.target, ranks))
    }

    /// Writes `sides.json` and every layout of which there are copies once: rank `r` of a side holds what
    /// `SIDE-N.json` says, N being `r` modulo the number of such files.
    pub(super) fn write(&self, folder: &Path) -> Result<(), CliError> {
        let write = |name: String, text: String| {
            let path = folder.join(name);
            fs::write(&path, text).map_err(|source| CliError::Write { path, source })
        };
        fs::create_dir_all(folder).map_err(|source| {
            let path = folder.to_path_buf();
            CliError::Write { path, source }
        })?;
        let describe = |side: Sharding| json!({ "ranks": side.ranks, "tp": side.tp, "ep": side.ep, "layouts": side.distinct() });
        let sides = json!({ "source": describe(self.source), "target": describe(self.target) });
        write("sides.json".to_owned(), format!("{sides:#}\n"))?;
        let to_text = |layout: &RankLayout| serde_json::to_string(layout).unwrap_or_default();
        for rank in 0..self.source.distinct() {
            write(format!("source-{rank}.json"), to_text(&self.source(rank)?))?;
        }
        for rank in 0..self.target.distinct() {
            write(format!("target-{rank}.json"), to_text(&self.target(rank)?))?;
        }
        Ok(())
    }

    pub(super) fn source_ranks(&self) -> u32 {
        self.source.ranks
    }

    pub(super) fn target_ranks(&self) -> u32 {
        self.target.ranks
    }

    pub(super) fn source(&self, rank: u32) -> Result<RankLayout, CliError> {
        self.trainer(&self.sources[rank as usize])
    }

    pub(super) fn target(&self, rank: u32) -> Result<RankLayout, CliError> {
        match &self.targets {
            Targets::Trainer(ranks) => self.trainer(&ranks[rank as usize]),
            Targets::Engine(ranks) => {
                let rank = &ranks[rank as usize];
                let held = vllm::expected(&self.config, rank)?;
                Ok(vllm::layout(&self.config, rank, &held)?.layout)
            }
        }
    }

    fn trainer(&self, rank: &SourceRank) -> Result<RankLayout, CliError> {
        let held = megatron::expected(&self.config, rank, &TrainerOptions::default())?;
        Ok(megatron::layout(&self.config, rank, &held)?)
    }
}

impl fmt::Display for Sides {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = |side: Sharding| match self.targets {
            Targets::Engine(_) => format!("TP{}", side.tp),
            Targets::Trainer(_) => format!("TP{} EP{} on {} ranks", side.tp, side.ep, side.ranks),
        };
        write!(f, "{} -> {}", side(self.source), side(self.target))
    }
}
