//! Lowering one rank's plan, and what a plan's hash costs as part of it.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use refit::planner::{LowerOptions, Policy, lower};
use refit_benches::{CAPABILITIES, first_plan, qwen3_4b};

fn lowering(criterion: &mut Criterion) {
    let config = qwen3_4b(36);
    let mut group = criterion.benchmark_group("lower/qwen3-4b");
    for (from, to) in [(1, 1), (4, 2), (2, 4)] {
        let plan = first_plan(&config, from, to);
        group.bench_function(format!("tp{from}-to-tp{to}"), |bencher| {
            bencher.iter(|| lower(black_box(&plan), &CAPABILITIES, &LowerOptions::default()));
        });
    }
    let plan = first_plan(&config, 4, 2);
    let options = LowerOptions::default().with_policy(Policy::ReadPerRun);
    group.sample_size(20).bench_function("tp4-to-tp2-read-per-run", |bencher| {
        bencher.iter(|| lower(black_box(&plan), &CAPABILITIES, &options));
    });
    group.finish();
}

criterion_group!(benches, lowering);
criterion_main!(benches);
