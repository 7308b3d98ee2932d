//! A warm lease allocates nothing, on the heap either.

use std::convert::Infallible;

use refit_pool::{HostAllocator, Key, Pool, PoolError, PoolOptions, Region, Registrar};
use refit_tests::allocations::{self, Counting};

#[global_allocator]
static GLOBAL: Counting = Counting;

#[derive(Debug)]
struct Agreeable;

impl Registrar for Agreeable {
    type Registration = ();
    type Error = Infallible;

    fn register(&self, _: &Region) -> Result<(), Infallible> {
        Ok(())
    }

    fn deregister(&self, (): ()) -> Result<(), Infallible> {
        Ok(())
    }
}

#[test]
fn a_warm_lease_allocates_and_registers_nothing() {
    let pool = Pool::new(HostAllocator, Agreeable, PoolOptions::default());
    let lease = |name: u8| {
        let built = pool.lease(Key::from([name; 32]), |build| {
            build.arena(1 << 20)?;
            Ok::<_, PoolError>(vec![0_u64; 100])
        });
        built.unwrap()
    };
    for name in 0..8 {
        drop(lease(name));
    }
    let (cold, before) = (pool.stats(), allocations::count());
    assert!(before > 0, "the counter does not count");
    for round in 0..1000_u32 {
        let mut lease = lease(round.to_le_bytes()[0] % 8);
        assert!(lease.is_hit());
        let (prepared, arenas) = lease.parts_mut();
        prepared[0] += arenas.len() as u64;
    }
    assert_eq!(allocations::count() - before, 0, "heap allocations");
    let warm = pool.stats();
    assert_eq!((warm.allocations, warm.registrations), (cold.allocations, cold.registrations));
    assert_eq!((warm.hits, warm.misses), (1000, 8));
}
