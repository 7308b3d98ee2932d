//! Lowering one rank's plan, and the part of planning it that is its hash.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use refit::planner::{LowerOptions, PlanOptions, Policy, SourceLayout, lower, plan};
use refit_benches::{CAPABILITIES, first_plan, kimi_k2, llama_70b, qwen3_4b};

fn lowering(criterion: &mut Criterion) {
    let config = qwen3_4b(36);
    let mut group = criterion.benchmark_group("lower");
    for (from, to) in [(1, 1), (4, 2), (2, 4)] {
        let plan = first_plan(&config, from, to);
        group.bench_function(format!("qwen3-4b/tp{from}-to-tp{to}"), |bencher| {
            bencher.iter(|| lower(black_box(&plan), &CAPABILITIES, &LowerOptions::default()));
        });
    }
    let per_run = first_plan(&config, 4, 2);
    let options = LowerOptions::default().with_policy(Policy::ReadPerRun);
    group.sample_size(20).bench_function("qwen3-4b/tp4-to-tp2-read-per-run", |bencher| {
        bencher.iter(|| lower(black_box(&per_run), &CAPABILITIES, &options));
    });
    let llama = first_plan(&llama_70b(), 8, 4);
    let source = SourceLayout::new(kimi_k2(64));
    let kimi = plan(
        &source.unwrap_or_else(|error| panic!("{error}")),
        &kimi_k2(128).nth(77).unwrap_or_else(|| panic!("there are 128")),
        &PlanOptions::default(),
    )
    .unwrap_or_else(|error| panic!("{error}"));
    for (name, plan) in [("llama-70b/tp8-to-tp4", &llama), ("kimi-k2/one-rank", &kimi)] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| lower(black_box(plan), &CAPABILITIES, &LowerOptions::default()));
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("hash");
    let qwen = first_plan(&config, 4, 2);
    for (name, plan) in [
        ("qwen3-4b/tp4-to-tp2", &qwen),
        ("llama-70b/tp8-to-tp4", &llama),
        ("kimi-k2/one-rank", &kimi),
    ] {
        assert_eq!(plan.rehash(), plan.hash());
        group.bench_function(name, |bencher| bencher.iter(|| black_box(plan).rehash()));
    }
    group.finish();
}

criterion_group!(benches, lowering);
criterion_main!(benches);
