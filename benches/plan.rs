//! Planning one rank: whole models, matched and mixed sizes.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use refit::planner::{PlanOptions, SourceLayout, plan};
use refit_benches::{qwen3_4b, source_layouts, target_layout};

fn planning(criterion: &mut Criterion) {
    let config = qwen3_4b(36);
    let mut group = criterion.benchmark_group("plan/qwen3-4b");
    for (from, to) in [(1, 1), (2, 2), (4, 2), (2, 4), (8, 1)] {
        let source = SourceLayout::new(source_layouts(&config, from))
            .unwrap_or_else(|error| panic!("{error}"));
        let target = target_layout(&config, 0, to);
        group.bench_function(format!("tp{from}-to-tp{to}"), |bencher| {
            bencher.iter(|| plan(black_box(&source), &target, &PlanOptions::default()));
        });
    }
    group.finish();

    let layouts = source_layouts(&config, 4);
    criterion.bench_function("source-layout/qwen3-4b/tp4", |bencher| {
        bencher
            .iter_with_setup(|| layouts.clone(), |layouts| SourceLayout::new(black_box(layouts)));
    });
}

criterion_group!(benches, planning);
criterion_main!(benches);
