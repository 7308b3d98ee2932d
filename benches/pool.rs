//! What a warm lease costs, and what copying past the caches gains.

use std::convert::Infallible;
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use refit::pool::{HostAllocator, Key, Pool, PoolOptions, Region, Registrar, copy_runs};

/// Registers nothing: what is measured is the pool.
#[derive(Debug)]
struct Nowhere;

impl Registrar for Nowhere {
    type Registration = ();
    type Error = Infallible;

    fn register(&self, _: &Region) -> Result<(), Infallible> {
        Ok(())
    }

    fn deregister(&self, (): ()) -> Result<(), Infallible> {
        Ok(())
    }
}

fn leasing(criterion: &mut Criterion) {
    let pool = Pool::new(HostAllocator, Nowhere, PoolOptions::default());
    let key = |number: u8| Key::from([number; 32]);
    for number in 0..64 {
        drop(pool.lease(key(number), |build| build.arena(4096).map(|_| ())));
    }
    criterion.bench_function("pool/warm-lease", |bencher| {
        bencher.iter(|| {
            let lease = pool.lease(black_box(key(7)), |build| build.arena(4096).map(|_| ()));
            black_box(lease.is_ok_and(|lease| lease.is_hit()))
        });
    });
    criterion.bench_function("pool/cold-lease-64-MiB", |bencher| {
        bencher.iter(|| {
            let lease = pool.lease(black_box(key(200)), |build| build.arena(64 << 20).map(|_| ()));
            drop(lease);
            pool.evict(key(200))
        });
    });
}

/// Rows of a down projection's shard, from a buffer that a cache holds into 256 MiB that none does.
fn copying(criterion: &mut Criterion) {
    const WAVE: usize = 8 << 20;
    let (from, mut into) = (vec![1_u8; WAVE], vec![2_u8; 256 << 20]);
    let mut group = criterion.benchmark_group("pool/copy-rows");
    group.sample_size(20).throughput(Throughput::Bytes(into.len() as u64));
    for row in [2048, 4864] {
        let places = |wave: usize| {
            (0..WAVE / row).map(move |place| (place * row, wave * WAVE + place * row))
        };
        let waves = into.len() / WAVE;
        group.bench_function(format!("memcpy/{row}"), |bencher| {
            bencher.iter(|| {
                for (source, target) in (0..waves).flat_map(places) {
                    into[target..target + row].copy_from_slice(&from[source..source + row]);
                }
                black_box(&mut into);
            });
        });
        group.bench_function(format!("streaming/{row}"), |bencher| {
            bencher.iter(|| {
                copy_runs(&from, &mut into, row, |copy| {
                    (0..waves).flat_map(places).for_each(|(source, target)| copy(source, target));
                });
                black_box(&mut into);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, leasing, copying);
criterion_main!(benches);
