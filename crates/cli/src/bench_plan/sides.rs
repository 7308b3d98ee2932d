//! Who plans from whom.

use std::path::Path;
use std::{fmt, fs};

use refit::RefitError;
use refit::planner::RankLayout;
use refit::translate::ModelConfig;
use refit::translate::megatron::{self, SourceRank, TrainerOptions};
use refit::translate::vllm::{self, TargetRank};
use serde_json::json;

use super::Preset;
use crate::error::CliError;
use crate::model;
use crate::synthetic::{self, Moe, Sharding};

/// Both sides of a job; any rank's layout can be made by itself.
pub(super) struct Sides {
    model: Model,
    source: Sharding,
    target: Sharding,
}

enum Model {
    /// A trainer's and an engine's layouts, as they are. No experts.
    Dense(Box<ModelConfig>),
    /// The same way of holding on either side.
    Moe(Moe),
}

impl Sides {
    pub(super) fn of(preset: Preset) -> Result<Self, CliError> {
        let dense = |name: &str, source: u32, target: u32| {
            let sharding = |tp: u32| Sharding { ranks: tp, tp, ep: 1 };
            let model = Model::Dense(Box::new(model::config(name)?));
            Ok(Self { model, source: sharding(source), target: sharding(target) })
        };
        let moe = |model: Moe| {
            let sharding = |ranks: u32| Sharding { ranks, tp: 8, ep: 32 };
            Ok(Self { model: Model::Moe(model), source: sharding(256), target: sharding(128) })
        };
        match preset {
            Preset::KimiK2 => moe(synthetic::KIMI_K2),
            Preset::DeepseekV3 => moe(synthetic::DEEPSEEK_V3),
            Preset::Llama70b => dense("llama-3.1-70b", 8, 4),
            Preset::Qwen3 => dense("qwen3-4b", 4, 2),
        }
    }

    /// The same job on this many target ranks and twice as many source ranks: more copies, and fewer experts a rank
    /// until the expert-parallel size is reached.
    pub(super) fn with_target_ranks(&self, ranks: u32) -> Self {
        let scaled =
            |side: Sharding, ranks: u32| Sharding { ranks, ep: side.ep.min(ranks), ..side };
        let model = match &self.model {
            Model::Dense(config) => Model::Dense(config.clone()),
            Model::Moe(model) => Model::Moe(*model),
        };
        Self { model, source: scaled(self.source, 2 * ranks), target: scaled(self.target, ranks) }
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
        match &self.model {
            Model::Moe(model) => moe(model, self.source, rank),
            Model::Dense(config) => {
                let tp = self.source.tp;
                let layers = (0..config.num_layers).collect();
                let rank = SourceRank::new(rank, layers).with_tp(rank % tp, tp);
                let held = megatron::expected(config, &rank, &TrainerOptions::default())?;
                Ok(megatron::layout(config, &rank, &held)?)
            }
        }
    }

    pub(super) fn target(&self, rank: u32) -> Result<RankLayout, CliError> {
        match &self.model {
            Model::Moe(model) => moe(model, self.target, rank),
            Model::Dense(config) => {
                let rank = TargetRank::new(rank, rank % self.target.tp, self.target.tp);
                Ok(vllm::layout(config, &rank, &vllm::expected(config, &rank)?)?.layout)
            }
        }
    }
}

fn moe(model: &Moe, sharding: Sharding, rank: u32) -> Result<RankLayout, CliError> {
    Ok(synthetic::layout(model, sharding, rank).map_err(RefitError::from)?)
}

impl fmt::Display for Sides {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = |side: Sharding| match self.model {
            Model::Dense(_) => format!("TP{}", side.tp),
            Model::Moe(_) => format!("TP{} EP{} on {} ranks", side.tp, side.ep, side.ranks),
        };
        write!(f, "{} -> {}", side(self.source), side(self.target))
    }
}
