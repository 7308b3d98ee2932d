//! The pool against a model of it.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

mod watched;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use proptest::prelude::*;
use proptest::sample::Index;
use refit_pool::{
    Allocator, Build, HostAllocator, Lease, LeaseError, Memory, PoolError, PoolOptions, PoolStats,
    Quarantined, Region,
};
use watched::*;

type TestLease = Lease<WatchedRegistrar, Prepared>;

const KEYS: u8 = 5;
const BUDGET: u64 = 60_000;
/// A little over the default, to see that it is the option that counts.
const QUARANTINE: u64 = 20_000;
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
    Lease {
        key: u8,
        arenas: Vec<u64>,
        adopt: u8,
        end: End,
        refuse_after: Option<u64>,
    },
    Release(Index),
    Quarantine(Index),
    Settle(Index),
    /// Nobody watches its transfers any more.
    Abandon(Index),
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
        2 => any::<Index>().prop_map(Op::Quarantine),
        2 => any::<Index>().prop_map(Op::Settle),
        1 => any::<Index>().prop_map(Op::Abandon),
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
    Quarantine { quarantined: u64, entries: u64 },
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
    /// In the order in which they were quarantined.
    quarantined: Vec<(u8, ModelEntry)>,
    leaked: Vec<ModelEntry>,
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
        let PoolStats { quarantined_bytes: quarantined, quarantined_entries: entries, .. } =
            self.stats;
        if quarantined > QUARANTINE {
            return Outcome::Quarantine { quarantined, entries };
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
        self.stats.quarantined_entries += 1;
        self.quarantined.push((key, entry));
    }

    fn settle(&mut self, index: usize) {
        let (key, mut entry) = self.quarantined.remove(index);
        self.stats.releases += 1;
        self.stats.quarantined_bytes -= entry.bytes;
        self.stats.quarantined_entries -= 1;
        self.clock += 1;
        if self.entries.contains_key(&key) {
            self.stats.bytes -= entry.bytes;
            self.deregister(entry.pieces);
        } else {
            entry.returned = Some(self.clock);
            self.entries.insert(key, entry);
        }
    }

    fn abandon(&mut self, index: usize) {
        let (_, entry) = self.quarantined.remove(index);
        self.leaked.push(entry);
    }

    /// Registered pieces, and entries, that are quarantined or leaked.
    fn apart(&self) -> (u64, u64) {
        let apart = self.quarantined.iter().map(|(_, entry)| entry).chain(&self.leaked);
        apart.fold((0, 0), |(pieces, entries), entry| (pieces + entry.pieces, entries + 1))
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
        LeaseError::Pool(PoolError::Quarantine { quarantined, entries, limit: QUARANTINE }) => {
            Outcome::Quarantine { quarantined, entries }
        }
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
    let (pool, shared) = test_pool_with(PoolOptions {
        budget_bytes: BUDGET,
        quarantine_bytes: Some(QUARANTINE),
        max_registration,
    });
    let step =
        max_registration.map_or(u64::MAX, |max| if max < 4096 { max } else { max - max % 4096 });
    let mut model = Model { step, ..Model::default() };
    let adopted = (0..KEYS).map(|_| HostAllocator.allocate(ADOPTED).unwrap()).collect::<Vec<_>>();
    let mut held = BTreeMap::<u8, TestLease>::new();
    let mut apart = Vec::<Quarantined<WatchedRegistrar, Prepared>>::new();

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
                    apart.push(lease.quarantine());
                    model.quarantine(name);
                }
            }
            Op::Settle(index) if !apart.is_empty() => {
                let index = index.index(apart.len());
                let quarantined = apart.remove(index);
                assert_eq!(quarantined.bytes(), model.quarantined[index].1.bytes);
                assert_eq!(quarantined.key(), key(model.quarantined[index].0));
                quarantined.release();
                model.settle(index);
            }
            Op::Abandon(index) if !apart.is_empty() => {
                let index = index.index(apart.len());
                drop(apart.remove(index));
                model.abandon(index);
            }
            Op::Settle(_) | Op::Abandon(_) => {}
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
        let (pieces, entries) = model.apart();
        assert_eq!(world.prepared, model.entries.len() as u64 + entries);
        assert_eq!(world.allocated.values().sum::<u64>(), model.stats.bytes);
        assert_eq!(
            world.registered.values().sum::<u64>(),
            model.entries.values().map(|entry| entry.pieces).sum::<u64>() + pieces
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
    // The pool is gone: what settles now is undone.
    apart.into_iter().for_each(Quarantined::release);
    model.quarantined.clear();
    shared.assert_no_violations();
    let world = shared.world();
    let leaked = model.leaked.iter().map(|entry| entry.bytes).sum::<u64>();
    assert_eq!(world.allocated.values().sum::<u64>(), leaked);
    assert_eq!((world.registered.values().sum::<u64>(), world.prepared), model.apart());
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
