//! Shared by the benches: layouts of models by name, and agents in one process.

#![allow(
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    reason = "a panic here is a broken bench"
)]

use std::sync::Arc;

use refit::planner::{Capabilities, Plan, PlanOptions, RankLayout, SourceLayout, plan};
use refit::pool::{HostAllocator, PoolOptions};
use refit::translate::ModelConfig;
use refit::translate::megatron::{self, Pipeline, SourceRank, TrainerOptions, TrainerSizes};
use refit::translate::vllm::{self, TargetRank};
use refit::transport::local::{LocalTransport, Network};
use refit::transport::{TransportPool, TransportRegistrar};
use refit::{Publication, Source, Target, TargetOptions, allocate};

/// NIXL over host memory, as its transport describes itself.
pub const CAPABILITIES: Capabilities = Capabilities::plain(2_000, 5_000);

/// Qwen3-4B with this many layers.
#[must_use]
pub fn qwen3_4b(layers: u32) -> ModelConfig {
    let mut config =
        ModelConfig::from_json(include_str!("../crates/cli/presets/qwen3-4b.json")).unwrap();
    config.num_layers = layers;
    config
}

/// Llama-3.1-70B.
#[must_use]
pub fn llama_70b() -> ModelConfig {
    ModelConfig::from_json(include_str!("../crates/cli/presets/llama-3.1-70b.json")).unwrap()
}

/// Every one of so many trainer ranks that hold Kimi-K2 with TP8 and EP32.
pub fn kimi_k2(ranks: u32) -> impl Iterator<Item = RankLayout> {
    let config =
        ModelConfig::from_json(include_str!("../crates/cli/presets/kimi-k2.json")).unwrap();
    let stages = Pipeline::new(1).stages(config.num_layers).unwrap();
    let ranks = TrainerSizes::new(8).with_dp(ranks / 8).with_ep(32).ranks(&stages).unwrap();
    ranks.into_iter().map(move |rank| source_layout(&config, &rank))
}

/// One trainer rank's layout.
#[must_use]
pub fn source_layout(config: &ModelConfig, rank: &SourceRank) -> RankLayout {
    let held = megatron::expected(config, rank, &TrainerOptions::default()).unwrap();
    megatron::layout(config, rank, &held).unwrap()
}

/// Every trainer rank's layout.
#[must_use]
pub fn source_layouts(config: &ModelConfig, tp: u32) -> Vec<RankLayout> {
    let ranks = SourceRank::grid(config.num_layers, tp, 1, 1).unwrap();
    ranks.iter().map(|rank| source_layout(config, rank)).collect()
}

/// One engine rank's layout.
#[must_use]
pub fn target_layout(config: &ModelConfig, tp_rank: u32, tp: u32) -> RankLayout {
    let rank = TargetRank::new(tp_rank, tp_rank, tp);
    vllm::layout(config, &rank, &vllm::expected(config, &rank).unwrap()).unwrap().layout
}

/// The plan of the first engine rank.
#[must_use]
pub fn first_plan(config: &ModelConfig, source_tp: u32, target_tp: u32) -> Plan {
    let source = SourceLayout::new(source_layouts(config, source_tp)).unwrap();
    plan(&source, &target_layout(config, 0, target_tp), &PlanOptions::default()).unwrap()
}

/// A trainer and an engine rank in this process, met and ready.
#[derive(Debug)]
pub struct Pair {
    /// Kept so that what the target reads stays there.
    pub sources: Vec<Source<LocalTransport>>,
    /// What they published.
    pub published: Vec<Publication>,
    /// The first engine rank.
    pub target: Target<LocalTransport>,
}

/// Sets both sides up in this process.
#[must_use]
pub fn pair(config: &ModelConfig, source_tp: u32, target_tp: u32) -> Pair {
    let network = Network::new();
    let agent = |name: &str| Arc::new(LocalTransport::new(&network, name).unwrap());
    let trainer = agent("trainer");
    let pool = TransportPool::new(
        HostAllocator,
        TransportRegistrar::new(trainer.clone()),
        PoolOptions::default(),
    );
    let sources: Vec<_> = source_layouts(config, source_tp)
        .into_iter()
        .map(|layout| {
            let params = allocate(&layout, &HostAllocator).unwrap();
            Source::new(trainer.clone(), &pool, layout, params).unwrap()
        })
        .collect();
    let published = sources.iter().map(|source| source.publication().unwrap()).collect();
    let engine = agent("engine");
    let pool = TransportPool::new(
        HostAllocator,
        TransportRegistrar::new(engine.clone()),
        PoolOptions::default(),
    );
    let layout = target_layout(config, 0, target_tp);
    let params = allocate(&layout, &HostAllocator).unwrap();
    let target = Target::new(engine, pool, layout, params, TargetOptions::default()).unwrap();
    Pair { sources, published, target }
}
