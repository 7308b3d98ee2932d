//! Pool entries on device memory.

use std::convert::Infallible;

use refit_pool::cuda::{CudaAllocator, download, upload};
use refit_pool::{Key, LeaseError, Pool, PoolError, PoolOptions, Region, Registrar};

use crate::gpu::{Gpus, pattern};

/// Registers nothing and counts nothing: the pool counts.
#[derive(Debug)]
pub(crate) struct Recorder;

impl Registrar for Recorder {
    type Registration = ();
    type Error = Infallible;

    fn register(&self, _region: &Region) -> Result<(), Infallible> {
        Ok(())
    }

    fn deregister(&self, (): ()) -> Result<(), Infallible> {
        Ok(())
    }
}

const GIB: u64 = 1 << 30;
/// What other processes on the device may take or give in between.
const SLACK: u64 = GIB / 4;

#[test]
fn entries_stay_between_leases_and_go_when_evicted() {
    let Some(gpus) = Gpus::get("entries_stay_between_leases_and_go_when_evicted", 1) else {
        return;
    };
    let device = &gpus[0];
    let free = || device.memory().unwrap().0;
    let before = free();
    let options = PoolOptions { budget_bytes: 2 * GIB, ..PoolOptions::default() };
    let pool = Pool::new(CudaAllocator::new(device.clone()), Recorder, options);
    let lease = |key: u8, bytes: u64| {
        pool.lease(Key::from([key; 32]), |build| {
            build.arena(bytes)?;
            Ok::<_, PoolError>(())
        })
    };

    let mut cold = lease(1, GIB).unwrap();
    assert!(!cold.is_hit() && cold.arenas()[0].kind() == device.kind());
    assert!(free() + GIB <= before + SLACK);
    let address = cold.arenas()[0].address();
    let sent = pattern(7, 1 << 20);
    upload(device, &mut cold.arenas_mut()[0], 12345, &sent).unwrap();
    drop(cold);

    let warm = lease(1, GIB).unwrap();
    assert!(warm.is_hit() && warm.arenas()[0].address() == address);
    let mut found = vec![0; sent.len()];
    download(device, &warm.arenas()[0], 12345, &mut found).unwrap();
    assert!(found == sent, "a warm arena keeps what it holds");
    // A leased entry is not evicted for another one.
    assert!(matches!(lease(2, 3 * GIB / 2), Err(LeaseError::Build(PoolError::Budget { .. }))));
    drop(warm);

    let other = lease(2, 3 * GIB / 2).unwrap();
    assert!(!other.is_hit());
    assert!(free() + GIB >= before.saturating_sub(GIB / 2 + SLACK), "the first entry was freed");
    drop(other);
    assert!(!lease(1, GIB).unwrap().is_hit(), "it was evicted");
    drop(pool);
    assert!(free() + SLACK >= before, "{} of {before} bytes are free", free());
}

#[test]
fn a_device_that_is_full_is_an_error_and_costs_nothing() {
    let Some(gpus) = Gpus::get("a_device_that_is_full_is_an_error_and_costs_nothing", 1) else {
        return;
    };
    let device = &gpus[0];
    let allocator = CudaAllocator::new(device.clone());
    let pool = Pool::new(allocator, Recorder, PoolOptions::default());
    let before = device.memory().unwrap().0;
    let error = pool.lease(Key::from([1; 32]), |build| {
        build.arena(GIB)?;
        build.arena(1 << 50)?;
        Ok::<_, PoolError>(())
    });
    assert!(matches!(error, Err(LeaseError::Build(PoolError::Allocate(_)))), "{error:?}");
    let after = device.memory().unwrap().0;
    assert!(after + SLACK >= before, "{after} of {before} bytes are free");
    assert_eq!((pool.stats().entries, pool.stats().bytes), (0, 0));
}
