//! Laying out one rank of Kimi-K2, 384 experts in 60 layers: what each side does once per rank before it can plan.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use refit::translate::ModelConfig;
use refit::translate::megatron::{self, Pipeline, SourceRank, TrainerOptions, TrainerSizes};
use refit::translate::roles::Placement;
use refit::translate::vllm::{self, EngineSizes, TargetRank};

const KIMI_K2: &str = include_str!("../crates/cli/presets/kimi-k2.json");

/// Something of a rank of these sizes, or the reason why there is none.
fn must<T, E: std::fmt::Display>(result: Result<T, E>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}

fn sources(config: &ModelConfig) -> Vec<SourceRank> {
    let sizes = TrainerSizes::new(8).with_dp(32).with_ep(32);
    must(sizes.ranks(&must(Pipeline::new(1).stages(config.num_layers))))
}

fn targets(dp: u32, placement: Option<Placement>) -> Vec<TargetRank> {
    let mut sizes = EngineSizes::new(8).with_dp(dp);
    sizes.expert_parallel = placement;
    must(sizes.ranks())
}

fn translating(criterion: &mut Criterion) {
    let config = must(ModelConfig::from_json(KIMI_K2));
    let mut group = criterion.benchmark_group("translate/kimi-k2");
    let options = TrainerOptions::default();
    let rank = &sources(&config)[0];
    group.bench_function("expected/tp8-ep32", |bencher| {
        bencher.iter(|| must(megatron::expected(black_box(&config), rank, &options)));
    });
    let held = must(megatron::expected(&config, rank, &options));
    group.bench_function("layout/tp8-ep32", |bencher| {
        bencher.iter(|| must(megatron::layout(black_box(&config), rank, &held)));
    });
    let spread = Some(Placement::Linear);
    for (name, dp, placement) in [("tp8-dp16-ep", 16, spread), ("tp8", 1, None)] {
        let rank = targets(dp, placement)[0];
        group.bench_function(format!("expected/engine-{name}"), |bencher| {
            bencher.iter(|| must(vllm::expected(black_box(&config), &rank)));
        });
        let held = must(vllm::expected(&config, &rank));
        group.bench_function(format!("layout/engine-{name}"), |bencher| {
            bencher.iter(|| must(vllm::layout(black_box(&config), &rank, &held)));
        });
    }
    group.sample_size(10).bench_function("all/256-trainer-128-engine-ranks", |bencher| {
        bencher.iter(|| {
            for rank in sources(&config) {
                let held = must(megatron::expected(&config, &rank, &options));
                black_box(must(megatron::layout(&config, &rank, &held)));
            }
            for rank in targets(16, spread) {
                let held = must(vllm::expected(&config, &rank));
                black_box(must(vllm::layout(&config, &rank, &held)));
            }
        });
    });
    group.finish();
}

criterion_group!(benches, translating);
criterion_main!(benches);
