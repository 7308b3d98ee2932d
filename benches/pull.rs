//! A warm refit in one process, transport and landing included: what our own code adds to a memcpy.

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use refit_benches::{Pair, pair, qwen3_4b};

fn refits(criterion: &mut Criterion) {
    let mut config = qwen3_4b(2);
    config.vocab_size = 8192;
    let mut group = criterion.benchmark_group("refit/local/2-layers");
    group.sample_size(20);
    for (from, to) in [(1, 1), (4, 2), (2, 1)] {
        let Pair { sources, published, target } = pair(&config, from, to);
        group.throughput(Throughput::Bytes(target.layout().bytes()));
        let mut slot = Some(target);
        group.bench_function(format!("tp{from}-to-tp{to}"), |bencher| {
            bencher.iter(|| {
                let target = slot.take().unwrap_or_else(|| panic!("an earlier refit failed"));
                let prepared =
                    target.prepare(&published).unwrap_or_else(|failed| panic!("{failed}"));
                let pulling = prepared.pull().unwrap_or_else(|failed| panic!("{failed}"));
                let pulled = pulling.wait(Instant::now() + Duration::from_secs(60));
                let landed = pulled.unwrap_or_else(|failed| panic!("{failed}")).land();
                slot = Some(
                    landed.unwrap_or_else(|failed| panic!("{failed}")).install().refreshed().0,
                );
            });
        });
        drop(sources);
    }
    group.finish();
}

criterion_group!(benches, refits);
criterion_main!(benches);
