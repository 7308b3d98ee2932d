//! Small models by name, for tests that need real layouts.

use refit::planner::{Plan, PlanOptions, RankLayout, SourceLayout, plan};
use refit::translate::megatron::{self, SourceRank, TrainerOptions};
use refit::translate::vllm::{self, TargetRank};
use refit::translate::{Family, ModelConfig};

/// A Qwen3 of two layers with everything small and nothing round.
#[must_use]
pub fn tiny() -> ModelConfig {
    let mut config = ModelConfig::new(Family::Qwen3);
    config.hidden_size = 48;
    config.intermediate_size = 96;
    config.num_layers = 2;
    config.num_heads = 8;
    config.num_kv_heads = 4;
    config.head_dim = 16;
    config.vocab_size = 500;
    config
}

/// Qwen3-4B.
#[must_use]
pub fn qwen3_4b() -> ModelConfig {
    let mut config = ModelConfig::new(Family::Qwen3);
    config.hidden_size = 2560;
    config.intermediate_size = 9728;
    config.num_layers = 36;
    config.num_heads = 32;
    config.num_kv_heads = 8;
    config.head_dim = 128;
    config.vocab_size = 151_936;
    config.tied = true;
    config
}

/// Every trainer rank of these sizes.
#[must_use]
pub fn source(config: &ModelConfig, tp: u32, pp: u32, dp: u32) -> Vec<RankLayout> {
    let ranks = SourceRank::grid(config.num_layers, tp, pp, dp).unwrap();
    source_ranks(config, &ranks, &TrainerOptions::default())
}

/// The layouts of these trainer ranks.
#[must_use]
pub fn source_ranks(
    config: &ModelConfig,
    ranks: &[SourceRank],
    options: &TrainerOptions,
) -> Vec<RankLayout> {
    let layout = |rank: &SourceRank| {
        let held = megatron::expected(config, rank, options).unwrap();
        megatron::layout(config, rank, &held).unwrap()
    };
    ranks.iter().map(layout).collect()
}

/// Every engine rank of this size.
#[must_use]
pub fn target(config: &ModelConfig, tp: u32) -> Vec<RankLayout> {
    target_ranks(config, &TargetRank::grid(tp).unwrap())
}

/// The layouts of these engine ranks.
#[must_use]
pub fn target_ranks(config: &ModelConfig, ranks: &[TargetRank]) -> Vec<RankLayout> {
    let layout = |rank: &TargetRank| {
        vllm::layout(config, rank, &vllm::expected(config, rank).unwrap()).unwrap().layout
    };
    ranks.iter().map(layout).collect()
}

/// The plan of one engine rank.
#[must_use]
pub fn plan_of(config: &ModelConfig, source_tp: u32, target_tp: u32, rank: usize) -> Plan {
    let source = SourceLayout::new(source(config, source_tp, 1, 1)).unwrap();
    plan(&source, &target(config, target_tp)[rank], &PlanOptions::default()).unwrap()
}
