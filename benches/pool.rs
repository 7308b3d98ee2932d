//! What a warm lease costs.

use std::convert::Infallible;
use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use refit::pool::{HostAllocator, Key, Pool, PoolOptions, Region, Registrar};

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

criterion_group!(benches, leasing);
criterion_main!(benches);
