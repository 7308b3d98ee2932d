//! Joining a side and planning one rank: whole models, matched and mixed sizes, and one rank of a cluster.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use refit::planner::{PlanOptions, RankLayout, SourceLayout, plan};
use refit_benches::{kimi_k2, llama_70b, qwen3_4b, source_layouts, target_layout};

fn joined(layouts: &[RankLayout]) -> SourceLayout {
    SourceLayout::new(layouts).unwrap_or_else(|error| panic!("{error}"))
}

fn planning(criterion: &mut Criterion) {
    let qwen = qwen3_4b(36);
    let mut group = criterion.benchmark_group("plan");
    for (from, to) in [(1, 1), (2, 2), (4, 2), (2, 4), (8, 1)] {
        let source = joined(&source_layouts(&qwen, from));
        let target = target_layout(&qwen, 0, to);
        group.bench_function(format!("qwen3-4b/tp{from}-to-tp{to}"), |bencher| {
            bencher.iter(|| plan(black_box(&source), &target, &PlanOptions::default()));
        });
    }
    group.sample_size(20);
    let source = joined(&source_layouts(&llama_70b(), 8));
    let target = target_layout(&llama_70b(), 0, 4);
    group.bench_function("llama-70b/tp8-to-tp4", |bencher| {
        bencher.iter(|| plan(black_box(&source), &target, &PlanOptions::default()));
    });
    let source = SourceLayout::new(kimi_k2(256)).unwrap_or_else(|error| panic!("{error}"));
    let target = kimi_k2(128).nth(77).unwrap_or_else(|| panic!("there are 128"));
    group.bench_function("kimi-k2/256-to-128", |bencher| {
        bencher.iter(|| plan(black_box(&source), &target, &PlanOptions::default()));
    });
    group.finish();
}

fn joining(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("source-layout");
    let layouts = source_layouts(&qwen3_4b(36), 4);
    group.bench_function("qwen3-4b/tp4", |bencher| {
        bencher.iter(|| SourceLayout::new(black_box(&layouts)));
    });
    let layouts: Vec<_> = kimi_k2(64).collect();
    group.sample_size(10).bench_function("kimi-k2/64", |bencher| {
        bencher.iter(|| SourceLayout::new(black_box(&layouts)));
    });
    group.finish();
}

criterion_group!(benches, planning, joining);
criterion_main!(benches);
