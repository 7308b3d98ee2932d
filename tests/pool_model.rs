//! The pool against a model of it, and under threads.
//!
//! The allocator and the registrar here watch each other: memory that is freed while registered, undone twice or over
//! budget is a violation, whatever the pool's own counters say.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::Index;
use refit_pool::{
    AllocateError, Allocator, Build, HostAllocator, KeepAlive, Key, Lease, LeaseError, Memory,
    MemoryKind, Pool, PoolError, PoolOptions, PoolStats, Region, Registrar,
};

fn key(name: u8) -> Key {
    Key::from([name; 32])
}

/// What really happened.
#[derive(Debug, Default)]
struct World {
    /// Start and length of what is allocated.
    allocated: BTreeMap<u64, u64>,
    /// Start and length of what is registered, and how often: entries may adopt the same memory.
    registered: BTreeMap<(u64, u64), u64>,
    /// Prepared works that exist.
    prepared: u64,
    budget: Option<u64>,
    /// Registrations until one is refused.
    refuse_after: Option<u64>,
    /// Deregistrations that will fail.
    complaints: u64,
    violations: Vec<String>,
}

#[derive(Clone, Debug, Default)]
struct Shared(Arc<Mutex<World>>);

impl Shared {
    fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[track_caller]
    fn assert_no_violations(&self) {
        let violations = std::mem::take(&mut self.world().violations);
        assert!(violations.is_empty(), "{violations:#?}");
    }
}

impl World {
    fn check(&mut self, right: bool, wrong: impl FnOnce() -> String) {
        if !right {
            self.violations.push(wrong());
        }
    }

    /// Whether some registration shares bytes with a range.
    fn is_registered(&self, address: u64, len: u64) -> bool {
        let last = self.registered.range(..(address + len, 0)).next_back();
        last.is_some_and(|((start, len), _)| start + len > address)
    }
}

#[derive(Debug)]
struct WatchedAllocator(Shared);

/// The owner of watched memory: notes when the last share goes, then lets the real memory go.
struct Watched {
    shared: Shared,
    address: u64,
    len: u64,
    _real: KeepAlive,
}

impl Drop for Watched {
    fn drop(&mut self) {
        let Self { address, len, .. } = *self;
        let mut world = self.shared.world();
        let registered = world.is_registered(address, len);
        world.check(!registered, || format!("{len} bytes freed while registered"));
        let known = world.allocated.remove(&address) == Some(len);
        world.check(known, || format!("{len} bytes freed twice"));
    }
}

impl Allocator for WatchedAllocator {
    fn kind(&self) -> MemoryKind {
        MemoryKind::Host
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, AllocateError> {
        let mut memory = HostAllocator.allocate(bytes)?;
        let start = NonNull::from(memory.host_bytes_mut().unwrap()).cast::<u8>();
        let (address, len) = (memory.address(), bytes as u64);
        let owner = Watched {
            shared: self.0.clone(),
            address,
            len,
            _real: memory.allocation().keep_alive().clone(),
        };
        drop(memory);
        let mut world = self.0.world();
        world.allocated.insert(address, len);
        let total = world.allocated.values().sum::<u64>();
        let within = world.budget.is_none_or(|budget| total <= budget);
        world.check(within, || format!("{total} bytes are allocated, over the budget"));
        // SAFETY: the owner holds the mapping, the first `Memory` of it is gone, and this is the only other one.
        Ok(unsafe { Memory::adopt(start, bytes, MemoryKind::Host, Arc::new(owner)) })
    }
}

#[derive(Debug)]
struct WatchedRegistrar(Shared);

#[derive(Debug, thiserror::Error)]
#[error("scripted")]
struct Scripted;

impl Registrar for WatchedRegistrar {
    type Registration = (u64, u64);
    type Error = Scripted;

    fn register(&self, region: &Region) -> Result<(u64, u64), Scripted> {
        let mut world = self.0.world();
        if let Some(left) = world.refuse_after {
            world.refuse_after = left.checked_sub(1);
            if left == 0 {
                return Err(Scripted);
            }
        }
        let (address, len) = (region.address(), region.len());
        *world.registered.entry((address, len)).or_default() += 1;
        Ok((address, len))
    }

    fn deregister(&self, (address, len): (u64, u64)) -> Result<(), Scripted> {
        let mut world = self.0.world();
        let times = world.registered.remove(&(address, len));
        world.check(times.is_some(), || format!("{len} bytes deregistered too often"));
        if let Some(left @ 1..) = times.and_then(|times| times.checked_sub(1)) {
            world.registered.insert((address, len), left);
        }
        match world.complaints.checked_sub(1) {
            Some(left) => {
                world.complaints = left;
                Err(Scripted)
            }
            None => Ok(()),
        }
    }
}

/// Prepared work that refers to registrations, and must go before them.
#[derive(Debug)]
struct Prepared {
    shared: Shared,
    refers_to: Vec<(u64, u64)>,
    /// What the last holder wrote over the arenas.
    canary: u8,
}

impl Prepared {
    fn new(shared: &Shared, registered: &[Region]) -> Self {
        shared.world().prepared += 1;
        let refers_to = registered.iter().map(|region| (region.address(), region.len())).collect();
        Self { shared: shared.clone(), refers_to, canary: 0 }
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        let mut world = self.shared.world();
        world.prepared -= 1;
        let intact = self.refers_to.iter().all(|piece| world.registered.contains_key(piece));
        world.check(intact, || "a registration went before the prepared work".to_owned());
    }
}

type TestPool = Pool<WatchedRegistrar, Prepared>;
type TestLease = Lease<WatchedRegistrar, Prepared>;

fn test_pool(budget_bytes: u64, max_registration: Option<u64>) -> (TestPool, Shared) {
    let shared = Shared::default();
    shared.world().budget = Some(budget_bytes);
    let options = PoolOptions { budget_bytes, max_registration };
    (Pool::new(WatchedAllocator(shared.clone()), WatchedRegistrar(shared.clone()), options), shared)
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

// --- the model ---

const KEYS: u8 = 5;
const BUDGET: u64 = 60_000;
/// Bytes of the allocation that entries of one key adopt.
const ADOPTED: usize = 9_000;

#[derive(Clone, Debug)]
enum End {
    Succeed,
    Fail,
    Panic,
}

#[derive(Clone, Debug)]
enum Op {
    Lease { key: u8, arenas: Vec<u64>, adopt: u8, end: End, refuse_after: Option<u64> },
    Release(Index),
    Quarantine(Index),
    Clear,
    Evict(u8),
    Complain(u64),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let arenas = prop::collection::vec(
        prop_oneof![1 => Just(0), 8 => 1..20_000_u64, 1 => 20_000..70_000_u64],
        0..4,
    );
    let end = prop_oneof![10 => Just(End::Succeed), 1 => Just(End::Fail), 1 => Just(End::Panic)];
    let lease = (0..KEYS, arenas, 0..3_u8, end, prop::option::weighted(0.1, 0..6_u64)).prop_map(
        |(key, arenas, adopt, end, refuse_after)| Op::Lease {
            key,
            arenas,
            adopt,
            end,
            refuse_after,
        },
    );
    let op = prop_oneof![
        12 => lease,
        8 => any::<Index>().prop_map(Op::Release),
        1 => any::<Index>().prop_map(Op::Quarantine),
        1 => Just(Op::Clear),
        2 => (0..KEYS).prop_map(Op::Evict),
        1 => (1..4_u64).prop_map(Op::Complain),
    ];
    prop::collection::vec(op, 1..80)
}

#[derive(Clone, Debug)]
struct ModelEntry {
    arenas: Vec<u64>,
    bytes: u64,
    pieces: u64,
    /// When it was returned; `None` while leased.
    returned: Option<u64>,
}

#[derive(Debug, PartialEq)]
enum Outcome {
    Hit,
    Built,
    Leased,
    Deregister(u64),
    Budget { needed: u64, leased: u64, quarantined: u64 },
    Register,
    Failed,
    Panicked,
}

/// What the pool should do, as simply as it can be said.
#[derive(Debug, Default)]
struct Model {
    entries: BTreeMap<u8, ModelEntry>,
    stats: PoolStats,
    step: u64,
    clock: u64,
    complaints: u64,
    failures: u64,
    quarantined_pieces: u64,
}

impl Model {
    fn deregister(&mut self, pieces: u64) {
        let failed = pieces.min(self.complaints);
        self.complaints -= failed;
        self.failures += failed;
        self.stats.failed_deregistrations += failed;
        self.stats.deregistrations += pieces;
    }

    fn drop_entry(&mut self, key: u8) {
        let entry = self.entries.remove(&key).unwrap();
        self.stats.bytes -= entry.bytes;
        self.deregister(entry.pieces);
    }

    fn evict(&mut self, key: u8) {
        self.stats.evictions += 1;
        self.drop_entry(key);
    }

    fn idle(&self) -> Vec<u8> {
        self.entries
            .iter()
            .filter(|(_, entry)| entry.returned.is_some())
            .map(|(&key, _)| key)
            .collect()
    }

    fn reserve(&mut self, needed: u64) -> Result<(), Outcome> {
        while self.stats.bytes + needed > BUDGET {
            let mut idle = self.idle();
            idle.retain(|key| self.entries[key].bytes > 0);
            let fixed =
                self.stats.bytes - idle.iter().map(|key| self.entries[key].bytes).sum::<u64>();
            if fixed + needed > BUDGET {
                let quarantined = self.stats.quarantined_bytes;
                return Err(Outcome::Budget { needed, leased: fixed - quarantined, quarantined });
            }
            let oldest = idle.into_iter().min_by_key(|key| self.entries[key].returned).unwrap();
            self.evict(oldest);
        }
        self.stats.bytes += needed;
        Ok(())
    }

    /// Registers a region of `bytes`, or nothing of it.
    fn register(&mut self, bytes: u64, refuse_after: &mut Option<u64>) -> Result<u64, Outcome> {
        let wanted = bytes.div_ceil(self.step);
        if let Some(left) = *refuse_after {
            if left < wanted {
                self.stats.registrations += left;
                self.deregister(left);
                *refuse_after = None;
                return Err(Outcome::Register);
            }
            *refuse_after = Some(left - wanted);
        }
        self.stats.registrations += wanted;
        Ok(wanted)
    }

    fn build(
        &mut self,
        arenas: &[u64],
        adopt: u8,
        end: &End,
        mut refuse: Option<u64>,
    ) -> (u64, Result<u64, Outcome>) {
        let (mut bytes, mut pieces) = (0, 0);
        let mut steps = || {
            for &arena in arenas.iter().filter(|&&arena| arena > 0) {
                self.reserve(arena)?;
                self.stats.allocations += 1;
                match self.register(arena, &mut refuse) {
                    Ok(added) => pieces += added,
                    Err(refused) => {
                        self.stats.bytes -= arena;
                        return Err(refused);
                    }
                }
                bytes += arena;
            }
            if adopt > 0 {
                pieces += self.register(ADOPTED as u64, &mut refuse)?;
            }
            match end {
                End::Succeed => Ok(()),
                End::Fail => Err(Outcome::Failed),
                End::Panic => Err(Outcome::Panicked),
            }
        };
        let result = steps();
        if result.is_err() {
            self.stats.bytes -= bytes;
            self.deregister(pieces);
        }
        (bytes, result.map(|()| pieces))
    }

    fn lease(
        &mut self,
        key: u8,
        arenas: &[u64],
        adopt: u8,
        end: &End,
        refuse_after: Option<u64>,
    ) -> Outcome {
        if self.failures > 0 {
            return Outcome::Deregister(std::mem::take(&mut self.failures));
        }
        match self.entries.get_mut(&key) {
            Some(ModelEntry { returned: None, .. }) => Outcome::Leased,
            Some(entry) => {
                entry.returned = None;
                self.stats.hits += 1;
                Outcome::Hit
            }
            None => {
                self.stats.misses += 1;
                match self.build(arenas, adopt, end, refuse_after) {
                    (bytes, Ok(pieces)) => {
                        let entry =
                            ModelEntry { arenas: arenas.to_vec(), bytes, pieces, returned: None };
                        self.entries.insert(key, entry);
                        Outcome::Built
                    }
                    (_, Err(outcome)) => outcome,
                }
            }
        }
    }

    fn release(&mut self, key: u8) {
        self.clock += 1;
        self.entries.get_mut(&key).unwrap().returned = Some(self.clock);
    }

    fn quarantine(&mut self, key: u8) {
        let entry = self.entries.remove(&key).unwrap();
        self.stats.quarantines += 1;
        self.stats.quarantined_bytes += entry.bytes;
        self.quarantined_pieces += entry.pieces;
    }

    fn stats(&self) -> PoolStats {
        let mut stats = self.stats;
        let leased = self.entries.values().filter(|entry| entry.returned.is_none());
        stats.leased_bytes = leased.map(|entry| entry.bytes).sum();
        stats.entries = self.entries.len() as u64;
        stats
    }
}

#[derive(Debug, thiserror::Error)]
enum BuildError {
    #[error(transparent)]
    Pool(#[from] PoolError),
    #[error("asked to fail")]
    Asked,
}

fn run_lease(
    pool: &TestPool,
    shared: &Shared,
    adopted: &[Memory],
    op: &Op,
) -> (Outcome, Option<TestLease>) {
    let Op::Lease { key: name, arenas, adopt, end, refuse_after } = op else { unreachable!() };
    shared.world().refuse_after = *refuse_after;
    let build = |build: &mut Build<'_, WatchedRegistrar>| {
        for &bytes in arenas {
            let region = build.arena(bytes)?;
            assert_eq!(region.len(), bytes);
        }
        // As often as asked: the second time has nothing left to do.
        for _ in 0..*adopt {
            let region = adopted[usize::from(*name)].allocation();
            build.register([region, region])?;
        }
        let prepared = Prepared::new(shared, build.registered());
        match end {
            End::Succeed => Ok(prepared),
            End::Fail => Err(BuildError::Asked),
            // Without the panic hook, which would fill the test's output.
            End::Panic => resume_unwind(Box::new("asked to panic")),
        }
    };
    let leased = catch_unwind(AssertUnwindSafe(|| pool.lease(key(*name), build)));
    shared.world().refuse_after = None;
    let error = match leased {
        Err(panic) => {
            assert_eq!(panic.downcast_ref::<&str>(), Some(&"asked to panic"));
            return (Outcome::Panicked, None);
        }
        Ok(Ok(lease)) => {
            return (if lease.is_hit() { Outcome::Hit } else { Outcome::Built }, Some(lease));
        }
        Ok(Err(error)) => error,
    };
    let outcome = match error {
        LeaseError::Build(BuildError::Asked) => Outcome::Failed,
        LeaseError::Build(BuildError::Pool(PoolError::Register { .. })) => Outcome::Register,
        LeaseError::Build(BuildError::Pool(PoolError::Budget {
            needed,
            budget: BUDGET,
            leased,
            quarantined,
        })) => Outcome::Budget { needed, leased, quarantined },
        LeaseError::Pool(PoolError::Leased { key: refused }) if refused == key(*name) => {
            Outcome::Leased
        }
        LeaseError::Pool(PoolError::Deregister { failures, .. }) => Outcome::Deregister(failures),
        other => panic!("unexpected: {other:?}"),
    };
    (outcome, None)
}

fn check_lease(lease: &mut TestLease, entry: &ModelEntry) {
    let sizes = lease.arenas().iter().map(|arena| arena.len() as u64).collect::<Vec<_>>();
    assert_eq!(sizes, entry.arenas);
    let registered = lease.registered();
    assert_eq!(registered.len() as u64, entry.pieces);
    assert!(registered.is_sorted_by(|a, b| a.address() + a.len() <= b.address()), "pieces overlap");
    for arena in lease.arenas() {
        let inside = |piece: &&Region| {
            (arena.address()..arena.address() + arena.len() as u64).contains(&piece.address())
        };
        assert_eq!(
            registered.iter().filter(inside).map(Region::len).sum::<u64>(),
            arena.len() as u64
        );
    }
    // What one holder leaves, the next one finds.
    let (prepared, arenas) = lease.parts_mut();
    let next = prepared.canary.wrapping_add(1);
    for arena in arenas {
        let bytes = arena.host_bytes_mut().unwrap();
        assert!(bytes.iter().all(|&byte| byte == prepared.canary), "somebody else wrote here");
        bytes.fill(next);
    }
    prepared.canary = next;
}

fn take<T>(from: &mut BTreeMap<u8, T>, index: &Index) -> Option<(u8, T)> {
    let names = from.keys().copied().collect::<Vec<_>>();
    (!names.is_empty()).then(|| from.remove_entry(index.get(&names)).unwrap())
}

fn run(ops: &[Op], max_registration: Option<u64>, pool_first: bool) {
    let (pool, shared) = test_pool(BUDGET, max_registration);
    let step =
        max_registration.map_or(u64::MAX, |max| if max < 4096 { max } else { max - max % 4096 });
    let mut model = Model { step, ..Model::default() };
    let adopted = (0..KEYS).map(|_| HostAllocator.allocate(ADOPTED).unwrap()).collect::<Vec<_>>();
    let mut held = BTreeMap::<u8, TestLease>::new();

    for op in ops {
        match op {
            Op::Lease { key, arenas, adopt, end, refuse_after } => {
                let expected = model.lease(*key, arenas, *adopt, end, *refuse_after);
                let (outcome, lease) = run_lease(&pool, &shared, &adopted, op);
                assert_eq!(outcome, expected);
                if let Some(mut lease) = lease {
                    check_lease(&mut lease, &model.entries[key]);
                    assert!(held.insert(*key, lease).is_none(), "leased twice");
                }
            }
            Op::Release(index) => {
                if let Some((name, lease)) = take(&mut held, index) {
                    drop(lease);
                    model.release(name);
                }
            }
            Op::Quarantine(index) => {
                if let Some((name, lease)) = take(&mut held, index) {
                    lease.quarantine();
                    model.quarantine(name);
                }
            }
            Op::Clear => {
                pool.clear();
                model.idle().into_iter().for_each(|name| model.evict(name));
            }
            Op::Evict(name) => {
                let idle = model.idle().contains(name);
                assert_eq!(pool.evict(key(*name)), idle);
                if idle {
                    model.evict(*name);
                }
            }
            Op::Complain(more) => {
                shared.world().complaints += more;
                model.complaints += more;
            }
        }
        assert_eq!(pool.stats(), model.stats(), "after {op:?}");
        shared.assert_no_violations();
        let world = shared.world();
        assert_eq!(world.prepared, model.entries.len() as u64 + model.stats.quarantines);
        assert_eq!(world.allocated.values().sum::<u64>(), model.stats.bytes);
        assert_eq!(
            world.registered.values().sum::<u64>(),
            model.entries.values().map(|entry| entry.pieces).sum::<u64>()
                + model.quarantined_pieces
        );
    }

    if pool_first {
        drop(pool);
        let leased = held.keys().map(|name| model.entries[name].bytes).sum::<u64>();
        let left = shared.world().allocated.values().sum::<u64>();
        assert_eq!(left, leased + model.stats.quarantined_bytes, "idle entries go with the pool");
        for (name, mut lease) in held {
            assert_eq!(lease.arenas_mut().len(), model.entries[&name].arenas.len());
        }
    } else {
        drop(held);
        drop(pool);
    }
    shared.assert_no_violations();
    let world = shared.world();
    assert_eq!(world.allocated.values().sum::<u64>(), model.stats.quarantined_bytes);
    assert_eq!(world.registered.values().sum::<u64>(), model.quarantined_pieces);
    assert_eq!(world.prepared, model.stats.quarantines);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_pool_does_what_the_model_does(
        ops in ops(),
        max_registration in prop_oneof![Just(None), Just(Some(4096)), Just(Some(10_000)), Just(Some(1_000))],
        pool_first in any::<bool>(),
    ) {
        run(&ops, max_registration, pool_first);
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
    let (pool, shared) = test_pool(1000, None);
    let held = pool.lease(key(0xab), one_arena(&shared, 600)).unwrap();
    let error = pool.lease(key(0xab), one_arena(&shared, 1)).unwrap_err();
    assert!(error.to_string().contains("entry abababab is leased"), "{error}");
    held.quarantine();
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
    assert!(!fresh.is_hit(), "a quarantined entry never comes back");
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
    let (pool, shared) = test_pool(260_000, Some(16_384));
    let in_use = [const { AtomicBool::new(false) }; KEYS];
    let quarantines = AtomicU64::new(0);
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
            if next() % 1000 == 0 && quarantines.fetch_add(1, Ordering::Relaxed) < 1 {
                lease.quarantine();
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
    assert_eq!(world.prepared, stats.quarantines);
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
