//! Shared by the benches: layouts of models by name, and agents in one process.

#![allow(
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    reason = "a panic here is a broken bench"
)]

use std::sync::Arc;

use refit::planner::{Capabilities, Plan, PlanOptions, RankLayout, SourceLayout, plan};
use refit::pool::{HostAllocator, PoolOptions};
use refit::translate::megatron::{self, SourceRank, TrainerOptions};
use refit::translate::vllm::{self, TargetRank};
use refit::translate::{Family, ModelConfig};
use refit::transport::local::{LocalTransport, Network};
use refit::transport::{TransportPool, TransportRegistrar};
use refit::{Publication, Source, Target, TargetOptions, allocate};
use refit_cli::synthetic::{self, Sharding};

/// NIXL over host memory, as its transport describes itself.
pub const CAPABILITIES: Capabilities = Capabilities {
    strided_reads: false,
    bytes_per_us: 2_000,
    ns_per_read: 5_000,
    max_reads: u64::MAX,
};

/// Qwen3-4B with this many layers.
#[must_use]
pub fn qwen3_4b(layers: u32) -> ModelConfig {
    let mut config = ModelConfig::new(Family::Qwen3);
    config.hidden_size = 2560;
    config.intermediate_size = 9728;
    config.num_layers = layers;
    config.num_heads = 32;
    config.num_kv_heads = 8;
    config.head_dim = 128;
    config.vocab_size = 151_936;
    config.tied = true;
    config
}

/// Llama-3.1-70B.
#[must_use]
pub fn llama_70b() -> ModelConfig {
    let mut config = ModelConfig::new(Family::Llama);
    config.hidden_size = 8192;
    config.intermediate_size = 28_672;
    config.num_layers = 80;
    config.num_heads = 64;
    config.num_kv_heads = 8;
    config.head_dim = 128;
    config.vocab_size = 128_256;
    config
}

/// One of so many ranks of a side that holds Kimi-K2 with TP8 and EP32.
#[must_use]
pub fn kimi_k2(ranks: u32, rank: u32) -> RankLayout {
    let sharding = Sharding { ranks, tp: 8, ep: 32 };
    synthetic::layout(&synthetic::KIMI_K2, sharding, rank).unwrap()
}

/// Every trainer rank's layout.
#[must_use]
pub fn source_layouts(config: &ModelConfig, tp: u32) -> Vec<RankLayout> {
    let layout = |rank: &SourceRank| {
        let held = megatron::expected(config, rank, &TrainerOptions::default()).unwrap();
        megatron::layout(config, rank, &held).unwrap()
    };
    SourceRank::grid(config.num_layers, tp, 1, 1).unwrap().iter().map(layout).collect()
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
