//! The pool's locks in every order that two or three threads can take them in. Run by `cargo xtask loom`.

use std::convert::Infallible;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

use super::*;
use crate::{AllocateError, Memory, MemoryKind, PoolError, Region};

const BYTES: u64 = 100;

/// What really exists.
#[derive(Debug, Default)]
struct World {
    allocated: AtomicU64,
}

#[derive(Debug)]
struct Counting(Arc<World>);

struct Owner(Arc<World>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.allocated.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Allocator for Counting {
    fn kind(&self) -> MemoryKind {
        MemoryKind::Host
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, AllocateError> {
        self.0.allocated.fetch_add(1, Ordering::Relaxed);
        let owner = Arc::new(Owner(Arc::clone(&self.0)));
        // SAFETY: nobody reads or writes through it.
        Ok(unsafe { Memory::adopt(NonNull::dangling(), bytes, MemoryKind::Host, owner) })
    }
}

#[derive(Debug)]
struct Nothing;

impl Registrar for Nothing {
    type Registration = ();
    type Error = Infallible;

    fn register(&self, _: &Region) -> Result<(), Infallible> {
        Ok(())
    }

    fn deregister(&self, (): ()) -> Result<(), Infallible> {
        // Others may run while this is under way.
        thread::yield_now();
        Ok(())
    }
}

type ModelPool = Pool<Nothing, ()>;

fn pool(budget_bytes: u64, quarantine_bytes: Option<u64>) -> (ModelPool, Arc<World>) {
    let world = Arc::new(World::default());
    let options = PoolOptions { budget_bytes, quarantine_bytes, ..PoolOptions::default() };
    (Pool::new(Counting(Arc::clone(&world)), Nothing, options), world)
}

fn lease(pool: &ModelPool, key: u8) -> Result<Lease<Nothing, ()>, LeaseError<PoolError>> {
    pool.lease(Key::from([key; 32]), |build| build.arena(BYTES).map(drop))
}

fn model(run: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(run);
}

/// Nothing is left but what these numbers say.
fn check(pool: &ModelPool, world: &World, idle: u64, quarantined: u64) {
    let stats = pool.stats();
    assert_eq!(stats.bytes, (idle + quarantined) * BYTES);
    assert_eq!((stats.leased_bytes, stats.entries), (0, idle));
    assert_eq!(
        (stats.quarantined_entries, stats.quarantined_bytes),
        (quarantined, quarantined * BYTES)
    );
    assert_eq!(world.allocated.load(Ordering::Relaxed), idle + quarantined);
}

#[test]
fn p17_an_entry_has_one_holder() {
    model(|| {
        let (pool, world) = pool(u64::MAX, None);
        let held = Arc::new(AtomicBool::new(false));
        let threads = [(); 2].map(|()| {
            let (pool, held) = (pool.clone(), Arc::clone(&held));
            thread::spawn(move || match lease(&pool, 1) {
                Ok(lease) => {
                    assert!(!held.swap(true, Ordering::AcqRel), "two holders");
                    held.store(false, Ordering::Release);
                    drop(lease);
                }
                Err(LeaseError::Pool(PoolError::Leased { .. })) => {}
                Err(error) => panic!("{error}"),
            })
        });
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        check(&pool, &world, 1, 0);
    });
}

#[test]
fn p17_whoever_needs_room_gets_what_another_frees() {
    model(|| {
        let (pool, world) = pool(BYTES, None);
        drop(lease(&pool, 1).unwrap());
        let other = {
            let pool = pool.clone();
            thread::spawn(move || pool.clear())
        };
        // Evicts the idle entry, or waits until the other has freed it; never sleeps for ever, never fails.
        drop(lease(&pool, 2).unwrap());
        other.join().unwrap();
        pool.clear();
        check(&pool, &world, 0, 0);
    });
}

#[test]
fn p17_two_who_need_room_do_not_sleep_for_ever() {
    model(|| {
        let (pool, world) = pool(BYTES, None);
        drop(lease(&pool, 1).unwrap());
        let threads = [2, 3].map(|key| {
            let pool = pool.clone();
            thread::spawn(move || match lease(&pool, key) {
                Ok(lease) => drop(lease),
                Err(LeaseError::Build(PoolError::Budget { .. })) => {}
                Err(error) => panic!("{error}"),
            })
        });
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        pool.clear();
        check(&pool, &world, 0, 0);
    });
}

#[test]
fn p17_what_is_released_meets_whoever_builds_its_key() {
    model(|| {
        let (pool, world) = pool(u64::MAX, None);
        let quarantined = lease(&pool, 1).unwrap().quarantine();
        let other = {
            let pool = pool.clone();
            // Finds the entry that came back, or builds one, or has the key while it comes back.
            thread::spawn(move || drop(lease(&pool, 1).unwrap()))
        };
        quarantined.release();
        other.join().unwrap();
        check(&pool, &world, 1, 0);
        let stats = pool.stats();
        assert_eq!((stats.quarantines, stats.releases), (1, 1));
    });
}

#[test]
fn p17_the_limit_of_the_quarantine_is_lifted_by_a_release() {
    model(|| {
        let (pool, world) = pool(4 * BYTES, Some(0));
        let quarantined = lease(&pool, 1).unwrap().quarantine();
        let other = {
            let pool = pool.clone();
            thread::spawn(move || match lease(&pool, 2) {
                Ok(lease) => drop(lease),
                Err(LeaseError::Pool(PoolError::Quarantine {
                    quarantined: BYTES,
                    entries: 1,
                    limit: 0,
                })) => {}
                Err(error) => panic!("{error}"),
            })
        };
        quarantined.release();
        other.join().unwrap();
        // Whatever the other saw.
        drop(lease(&pool, 2).unwrap());
        check(&pool, &world, 2, 0);
    });
}

#[test]
fn p17_what_outlives_the_pool_goes_when_it_is_given_back() {
    model(|| {
        let (pool, world) = pool(u64::MAX, None);
        let quarantined = lease(&pool, 1).unwrap().quarantine();
        let leased = lease(&pool, 2).unwrap();
        let threads =
            [thread::spawn(move || quarantined.release()), thread::spawn(move || drop(leased))];
        drop(pool);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(world.allocated.load(Ordering::Relaxed), 0);
    });
}
