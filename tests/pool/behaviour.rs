//! What the pool promises, one promise a test: memory's lifetime, refusals, room, threads.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

mod watched;

use std::cell::RefCell;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use refit_pool::{
    Allocator, Build, HostAllocator, LeaseError, MemoryKind, Pool, PoolError, PoolOptions, Region,
    Registrar,
};
use watched::*;

fn test_pool(budget_bytes: u64, max_registration: Option<u64>) -> (TestPool, Shared) {
    test_pool_with(PoolOptions { budget_bytes, max_registration, ..PoolOptions::default() })
}

fn one_arena(
    shared: &Shared,
    bytes: u64,
) -> impl FnOnce(&mut Build<'_, WatchedRegistrar>) -> Result<Prepared, PoolError> {
    move |build| {
        build.arena(bytes)?;
        Ok(Prepared::new(shared, build.registered()))
    }
}

// --- what the model cannot say ---

#[test]
fn the_host_allocator_aligns_and_zeroes() {
    const MIB: usize = 1 << 20;
    for bytes in [0, 1, 4095, 4096, 4097, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1, 5 * MIB + 3, 64 * MIB]
    {
        let mut memory = HostAllocator.allocate(bytes).unwrap();
        assert_eq!((memory.len(), memory.kind()), (bytes, MemoryKind::Host));
        let boundary = if bytes >= 2 * MIB { 2 * MIB as u64 } else { 4096 };
        assert!(
            bytes == 0 || memory.address() % boundary == 0,
            "{bytes} bytes start off a boundary"
        );
        let contents = memory.host_bytes_mut().unwrap();
        assert!(contents.iter().all(|&byte| byte == 0));
        // The last byte is ours as much as the first.
        contents.fill(0xa5);
    }
}

#[test]
fn mappings_side_by_side_do_not_overlap() {
    let sizes = [1, 4096, 3 << 20, 2 << 20, 100, (2 << 20) + 1];
    let memories = sizes.map(|bytes| HostAllocator.allocate(bytes).unwrap());
    let mut ranges = memories
        .each_ref()
        .map(|memory| (memory.address(), memory.address() + memory.len() as u64));
    ranges.sort_unstable();
    assert!(ranges.is_sorted_by(|a, b| a.1 <= b.0));
}

#[test]
fn memory_lives_as_long_as_any_share() {
    let (pool, shared) = test_pool(1 << 20, None);
    let lease = pool.lease(key(0), one_arena(&shared, 1000)).unwrap();
    let share = lease.arenas()[0].allocation().clone();
    drop((lease, pool));
    assert!(shared.world().registered.is_empty());
    assert_eq!(shared.world().allocated.len(), 1);
    drop(share);
    assert!(shared.world().allocated.is_empty());
    shared.assert_no_violations();
}

#[test]
fn build_may_lease_other_keys_and_not_its_own() {
    let (pool, shared) = test_pool(1 << 20, None);
    let outer = pool.lease(key(0), |build| {
        build.arena(100)?;
        let inner = pool.lease(key(1), one_arena(&shared, 100)).map_err(|error| match error {
            LeaseError::Pool(error) | LeaseError::Build(error) => error,
            _ => unreachable!(),
        })?;
        assert!(!inner.is_hit());
        assert!(!pool.evict(key(0)), "it is being built");
        let own = pool.lease(key(0), one_arena(&shared, 100)).unwrap_err();
        assert!(matches!(own, LeaseError::Pool(PoolError::Leased { .. })), "{own}");
        Ok::<_, PoolError>(Prepared::new(&shared, build.registered()))
    });
    assert!(!outer.unwrap().is_hit());
    assert!(pool.lease(key(0), one_arena(&shared, 100)).unwrap().is_hit());
    assert!(pool.lease(key(1), one_arena(&shared, 100)).unwrap().is_hit());
    shared.assert_no_violations();
}

#[test]
fn a_build_that_goes_on_after_a_refusal_keeps_what_it_has() {
    let (pool, shared) = test_pool(10_000, None);
    let lease = pool.lease(key(0), |build| {
        let kept = build.arena(6_000)?;
        let refused = build.arena(6_000).unwrap_err();
        assert!(matches!(
            refused,
            PoolError::Budget { needed: 6_000, budget: 10_000, leased: 6_000, quarantined: 0 }
        ));
        assert_eq!(build.registered().len(), 1);
        assert_eq!(build.registered()[0].address(), kept.address());
        build.arena(4_000)?;
        Ok::<_, PoolError>(Prepared::new(&shared, build.registered()))
    });
    assert_eq!(lease.unwrap().arenas().len(), 2);
    shared.assert_no_violations();
}

#[test]
fn errors_say_what_to_do() {
    let (pool, shared) = test_pool_with(PoolOptions {
        budget_bytes: 1000,
        quarantine_bytes: Some(600),
        ..PoolOptions::default()
    });
    let held = pool.lease(key(0xab), one_arena(&shared, 600)).unwrap();
    let error = pool.lease(key(0xab), one_arena(&shared, 1)).unwrap_err();
    assert!(error.to_string().contains("entry abababab is leased"), "{error}");
    drop(held.quarantine());
    let error = pool.lease(key(1), one_arena(&shared, 500)).unwrap_err().to_string();
    for part in [
        "500 bytes does not fit",
        "budget of 1000",
        "0 are leased",
        "600 are quarantined",
        "raise the budget",
    ] {
        assert!(error.contains(part), "{error}");
    }
    let fresh = pool.lease(key(0xab), one_arena(&shared, 400)).unwrap();
    assert!(!fresh.is_hit(), "a leaked entry never comes back");
    assert!(
        fresh.arenas()[0].host_bytes().is_some_and(|bytes| bytes.iter().all(|&byte| byte == 0))
    );
    let huge = pool.lease(key(2), one_arena(&shared, u64::MAX)).unwrap_err();
    assert!(
        matches!(huge, LeaseError::Build(PoolError::Budget { needed: u64::MAX, .. })),
        "{huge}"
    );
    let registrar = WatchedRegistrar(shared.clone());
    let unbounded = Pool::new(HostAllocator, registrar, PoolOptions::default());
    let huge = unbounded.lease(key(2), one_arena(&shared, u64::MAX)).unwrap_err();
    assert!(matches!(huge, LeaseError::Build(PoolError::Allocate(_))), "{huge}");
}

thread_local! {
    /// What this thread does in the middle of undoing a registration.
    static WHILE_LEAVING: RefCell<Option<Box<dyn FnOnce()>>> = const { RefCell::new(None) };
}

#[derive(Debug)]
struct SlowToLeave(WatchedRegistrar);

impl Registrar for SlowToLeave {
    type Registration = (u64, u64);
    type Error = Scripted;

    fn register(&self, region: &Region) -> Result<(u64, u64), Scripted> {
        self.0.register(region)
    }

    fn deregister(&self, registration: (u64, u64)) -> Result<(), Scripted> {
        if let Some(act) = WHILE_LEAVING.take() {
            act();
        }
        self.0.deregister(registration)
    }
}

#[test]
fn whoever_needs_room_waits_for_memory_that_is_leaving() {
    let shared = Shared::default();
    shared.world().budget = Some(1000);
    let options = PoolOptions { budget_bytes: 1000, ..PoolOptions::default() };
    let registrar = SlowToLeave(WatchedRegistrar(shared.clone()));
    let pool = Pool::<_, ()>::new(WatchedAllocator(shared.clone()), registrar, options);
    let lease = |name| {
        let leased = pool.lease(key(name), |build| build.arena(800).map(drop));
        leased.map(drop)
    };
    lease(0).unwrap();

    let (leaving, is_leaving) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel::<()>();
    thread::scope(|scope| {
        // Dropped if an assertion below fails, so that the threads end and the failure is seen.
        let go_on = go_on;
        scope.spawn(|| {
            WHILE_LEAVING.set(Some(Box::new(move || {
                leaving.send(()).unwrap();
                may_go_on.recv().unwrap();
            })));
            assert!(pool.evict(key(0)));
        });
        is_leaving.recv().unwrap();
        // Nothing idle, nothing leased, and yet no room: an error would blame a budget that suffices.
        let waiting = scope.spawn(|| lease(1));
        thread::sleep(Duration::from_millis(20));
        assert!(!waiting.is_finished());
        // Without a lock held, others go on.
        assert_eq!(pool.stats().bytes, 800);
        drop(pool.lease(key(2), |_| Ok::<_, PoolError>(())).unwrap());
        go_on.send(()).unwrap();
        waiting.join().unwrap().unwrap();
    });
    assert_eq!(pool.stats().bytes, 800);
    shared.assert_no_violations();
}

#[test]
fn four_threads_never_see_each_others_bytes() {
    const THREADS: u64 = 4;
    const KEYS: usize = 6;
    const ROUNDS: u64 = 3_000;
    // Room for three or four of the six, so that eviction never stops; quarantine takes a little away for good.
    let (pool, shared) = test_pool_with(PoolOptions {
        budget_bytes: 260_000,
        quarantine_bytes: Some(u64::MAX),
        max_registration: Some(16_384),
    });
    let in_use = [const { AtomicBool::new(false) }; KEYS];
    let leaks = AtomicU64::new(0);
    let work = |seed: u64| {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let mut leases = 0_u64;
        for _ in 0..ROUNDS {
            let name = usize::try_from(next() % KEYS as u64).unwrap();
            let pool_key = key(u8::try_from(name).unwrap());
            match next() % 64 {
                0 => pool.clear(),
                1 | 2 => drop(pool.evict(pool_key)),
                _ => {}
            }
            let mut lease =
                match pool.lease(pool_key, one_arena(&shared, 50_000 + 4_000 * name as u64)) {
                    Ok(lease) => lease,
                    Err(
                        LeaseError::Pool(PoolError::Leased { .. })
                        | LeaseError::Build(PoolError::Budget { .. }),
                    ) => continue,
                    Err(error) => panic!("{error}"),
                };
            assert!(!in_use[name].swap(true, Ordering::AcqRel), "leased twice");
            leases += 1;
            let (prepared, arenas) = lease.parts_mut();
            let bytes = arenas[0].host_bytes_mut().unwrap();
            assert!(bytes.iter().all(|&byte| byte == prepared.canary), "somebody else wrote here");
            prepared.canary = u8::try_from(next() % 255).unwrap() + 1;
            bytes.fill(prepared.canary);
            if next().is_multiple_of(16) {
                thread::yield_now();
            }
            assert!(
                bytes.iter().all(|&byte| byte == prepared.canary),
                "somebody else wrote here meanwhile"
            );
            in_use[name].store(false, Ordering::Release);
            // The key is free only when the lease is gone, so nobody can have it in between.
            if next() % 1000 == 0 && leaks.fetch_add(1, Ordering::Relaxed) < 1 {
                drop(lease.quarantine());
            } else if next() % 50 == 0 {
                let quarantined = lease.quarantine();
                thread::yield_now();
                quarantined.release();
            }
        }
        leases
    };
    let leases = thread::scope(|scope| {
        let threads = (1..=THREADS).map(|seed| scope.spawn(move || work(seed))).collect::<Vec<_>>();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .sum::<u64>()
    });
    shared.assert_no_violations();
    let stats = pool.stats();
    assert!(leases > ROUNDS, "only {leases} leases: the threads starved");
    assert!(stats.evictions > 0 && stats.hits > 0, "{stats:?}");
    assert_eq!(stats.leased_bytes, 0);
    pool.clear();
    let stats = pool.stats();
    assert_eq!((stats.bytes, stats.entries), (stats.quarantined_bytes, 0));
    let world = shared.world();
    assert_eq!(world.allocated.values().sum::<u64>(), stats.quarantined_bytes);
    assert_eq!(world.registered.values().sum::<u64>(), stats.registrations - stats.deregistrations);
    assert_eq!(world.prepared, stats.quarantines - stats.releases);
}

#[test]
fn p02_quarantined_memory_is_not_lent_until_it_is_released() {
    let (pool, shared) = test_pool_with(PoolOptions {
        budget_bytes: 1000,
        quarantine_bytes: None,
        ..PoolOptions::default()
    });
    let first = pool.lease(key(1), one_arena(&shared, 200)).unwrap();
    let address = first.arenas()[0].address();
    let first = first.quarantine();
    assert_eq!((first.bytes(), first.key()), (200, key(1)));
    // Within the limit the pool goes on, in memory of its own.
    let second = pool.lease(key(1), one_arena(&shared, 100)).unwrap();
    assert!(!second.is_hit() && second.arenas()[0].address() != address);
    let stats = pool.stats();
    assert_eq!((stats.bytes, stats.quarantined_bytes, stats.quarantined_entries), (300, 200, 1));

    // Above it, nobody is given anything, not even what lies ready.
    drop(pool.lease(key(3), one_arena(&shared, 10)).unwrap());
    let second = second.quarantine();
    let error = pool.lease(key(3), one_arena(&shared, 10)).unwrap_err();
    let LeaseError::Pool(PoolError::Quarantine { quarantined: 300, entries: 2, limit: 250 }) =
        error
    else {
        panic!("{error:?}")
    };
    let error = error.to_string();
    assert!(error.contains("end the silent peer") && error.contains("restart this process"));

    // What settles first is idle again, and what settles when the key is taken is undone.
    second.release();
    let stats = pool.stats();
    assert_eq!((stats.bytes, stats.quarantined_bytes, stats.releases), (310, 200, 1));
    let again = pool.lease(key(1), one_arena(&shared, 999)).unwrap();
    assert!(again.is_hit());
    first.release();
    let stats = pool.stats();
    assert_eq!((stats.bytes, stats.quarantined_bytes, stats.quarantined_entries), (110, 0, 0));
    // Clearing frees nothing that is quarantined.
    let again = again.quarantine();
    pool.clear();
    assert_eq!(shared.world().allocated.len(), 1);
    drop(pool);
    assert_eq!(shared.world().allocated.len(), 1);
    again.release();
    assert!(shared.world().allocated.is_empty() && shared.world().registered.is_empty());
    shared.assert_no_violations();
}

#[test]
fn leases_and_pools_cross_threads() {
    fn check<T: Send>(value: T) -> T {
        value
    }
    let (pool, shared) = test_pool(1 << 20, None);
    let lease = check(pool.lease(key(0), one_arena(&shared, 100)).unwrap());
    let other = check(pool.clone());
    thread::spawn(move || drop((lease, other))).join().unwrap();
    assert!(pool.lease(key(0), one_arena(&shared, 100)).unwrap().is_hit());
    assert_eq!(pool.stats().entries, 1);
}
