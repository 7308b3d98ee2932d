//! What a source takes to hash what a target reads of it, beside copying as many bytes in the same run. For the rate of
//! one core, pin it to one: `taskset -c 0 cargo xtask criterion --bench digest`.

#![allow(clippy::unwrap_used, reason = "a panic here is a broken bench")]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use refit::planner::{
    Band, Dtype, LayoutBuilder, Param, PlanOptions, RankLayout, SourceLayout, plan,
};
use refit::pool::{HostAllocator, PoolOptions};
use refit::transport::local::{LocalTransport, Network};
use refit::transport::{TransportPool, TransportRegistrar};
use refit::{DigestRequest, Source, allocate};

const ROWS: u64 = 16_384;
const COLS: u64 = 8_192;

/// Columns of one tensor: 256 MiB of bf16 if all of them.
fn columns(cols: u64) -> RankLayout {
    let mut layout = LayoutBuilder::new(0);
    let tensor = layout.tensor("w", ROWS, COLS).unwrap();
    let band = Band::new(tensor, 0..ROWS, 0..cols);
    layout.param(Param::new("w", Dtype::Bf16, ROWS, cols).band(band)).unwrap();
    layout.build()
}

fn hashing(criterion: &mut Criterion) {
    let network = Network::new();
    let trainer = Arc::new(LocalTransport::new(&network, "trainer").unwrap());
    let registrar = TransportRegistrar::new(trainer.clone());
    let pool = TransportPool::new(HostAllocator, registrar, PoolOptions::default());
    let held = columns(COLS);
    let mut params = allocate(&held, &HostAllocator).unwrap();
    let bytes = params[0].1.host_bytes_mut().unwrap();
    bytes.iter_mut().zip(0_u64..).for_each(|(byte, at)| *byte = ((at * 31) >> 3).to_le_bytes()[0]);
    let (from, mut into) = (bytes.to_vec(), vec![1_u8; bytes.len()]);
    let source = Source::new(trainer, &pool, held.clone(), params).unwrap();
    let sources = SourceLayout::new([held]).unwrap();

    let mut group = criterion.benchmark_group("digest");
    group.sample_size(10);
    for (name, cols) in [("whole", COLS), ("rows-of-4-KiB", COLS / 4)] {
        let plan = plan(&sources, &columns(cols), &PlanOptions::default()).unwrap();
        let request = DigestRequest::new(&plan);
        group.throughput(Throughput::Bytes(ROWS * cols * 2));
        group.bench_function(format!("xxh3/{name}"), |bencher| {
            bencher.iter(|| black_box(source.digests(&request).unwrap()));
        });
    }
    group.throughput(Throughput::Bytes(from.len() as u64));
    group.bench_function("memcpy/whole", |bencher| {
        bencher.iter(|| {
            into.copy_from_slice(black_box(&from));
            black_box(&mut into);
        });
    });
    group.finish();
}

criterion_group!(benches, hashing);
criterion_main!(benches);
