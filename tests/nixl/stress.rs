//! P17: threads that share a pool and an agent never see one another's bytes.
//!
//! `REFIT_STRESS_PULLS` says how many pulls they do together; a few thousand by default.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use refit_planner::{Dims, Transform};
use refit_pool::{
    Allocator, HostAllocator, Key, LeaseError, Memory, Pool, PoolError, PoolOptions, Region,
};
use refit_transport::conformance::Harness;
use refit_transport::nixl::NixlTransport;
use refit_transport::{
    LocalRange, Peer, Pull, ReadOp, RemoteRange, Transport, TransportError, TransportPool,
    TransportRegistrar,
};

use crate::isolated::isolated;
use crate::{EMULATED, Nixl, ONE_SIDED};

const THREADS: u64 = 4;
const KEYS: u64 = 8;
const ARENA: usize = 32 << 10;
/// Each pull is so many reads, which land in reverse order.
const READS: usize = 8;
/// What no byte is that is read.
const POISON: u8 = 0xff;

fn pulls() -> u64 {
    std::env::var("REFIT_STRESS_PULLS").map_or(4_000, |pulls| pulls.parse().unwrap())
}

/// A generator of numbers, one for each thread.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % end
    }
}

/// Bytes that tell where they stand: no two keys have the same.
fn content() -> Vec<u8> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let whole = usize::try_from(KEYS).unwrap() * ARENA;
    (0..whole).map(|_| u8::try_from(random.below(u64::from(POISON))).unwrap()).collect()
}

/// What a key's arena holds once it is read.
fn expected(content: &[u8], key: usize) -> Vec<u8> {
    let theirs = &content[key * ARENA..(key + 1) * ARENA];
    theirs.chunks(ARENA / READS).rev().flatten().copied().collect()
}

/// The reads of a key.
fn reads(source: &Memory, key: usize, arena: &Region) -> Vec<ReadOp> {
    let len = ARENA / READS;
    let read = |read: usize| {
        let from = source.address() + (key * ARENA + read * len) as u64;
        let into = arena.address() + ((READS - 1 - read) * len) as u64;
        let (run, kind) = (len as u64, arena.kind());
        ReadOp {
            from: RemoteRange { address: from, len: run, kind: source.kind() },
            into: LocalRange { address: into, len: run, kind },
            run,
            dims: Dims::none(),
            transform: Transform::Copy,
            bulk: false,
        }
    };
    (0..READS).map(read).collect()
}

/// What the threads share.
struct Shared {
    transport: Arc<NixlTransport>,
    pool: TransportPool<NixlTransport>,
    peer: Peer,
    source: Memory,
    /// What the arena of each key is to hold.
    expected: Vec<Vec<u8>>,
    in_use: Vec<AtomicBool>,
    pulled: AtomicU64,
}

impl Shared {
    /// One pull of some key, and whether the key was free.
    fn pull(&self, random: &mut Random) -> bool {
        let number = random.below(KEYS);
        let key = usize::try_from(number).unwrap();
        let name = Key::from([u8::try_from(number).unwrap(); 32]);
        match random.below(256) {
            0 => self.pool.clear(),
            1..8 => drop(self.pool.evict(name)),
            _ => {}
        }
        let lease = self.pool.lease(name, |build| {
            let arena = build.arena(ARENA as u64).expect("there is room for all threads");
            let reads = reads(&self.source, key, &arena);
            Ok::<_, TransportError>(vec![self.transport.prepare(&self.peer, &reads)?])
        });
        let mut lease = match lease {
            Ok(lease) => lease,
            Err(LeaseError::Pool(PoolError::Leased { .. })) => return false,
            Err(error) => panic!("{error}"),
        };
        assert!(!self.in_use[key].swap(true, Ordering::AcqRel), "leased twice");
        lease.arenas_mut()[0].host_bytes_mut().unwrap().fill(POISON);
        let pull = Pull::start(Arc::clone(&self.transport), lease, Vec::new(), ..).unwrap();
        let settled = pull.wait(Instant::now() + Duration::from_secs(60)).unwrap();
        let mut lease = settled.lease;
        assert!(lease.arenas()[0].host_bytes().unwrap() == self.expected[key], "wrong bytes");
        // Whoever has it next must read all of it anew; nobody may have it yet.
        let bytes = lease.arenas_mut()[0].host_bytes_mut().unwrap();
        bytes.fill(POISON);
        thread::yield_now();
        assert!(bytes.iter().all(|byte| *byte == POISON), "somebody else wrote here");
        self.in_use[key].store(false, Ordering::Release);
        true
    }
}

fn threads_share_a_pool_and_an_agent() {
    let pulls = pulls();
    let content = content();
    let mut source = HostAllocator.allocate(content.len()).unwrap();
    source.host_bytes_mut().unwrap().copy_from_slice(&content);
    let owner = Nixl.agent("source").unwrap();
    let registration = owner.register(source.allocation()).unwrap();
    let transport = Arc::new(Nixl.agent("target").unwrap());
    let peer = transport.connect(owner.agent(), &owner.metadata().unwrap()).unwrap();
    // Room for one arena a thread and one more, so that eviction never stops.
    let options =
        PoolOptions { budget_bytes: (THREADS + 1) * ARENA as u64, ..PoolOptions::default() };
    let registrar = TransportRegistrar::new(Arc::clone(&transport));
    let pool = Pool::new(HostAllocator, registrar, options);
    let expected = (0..usize::try_from(KEYS).unwrap()).map(|key| expected(&content, key)).collect();
    let in_use = (0..KEYS).map(|_| AtomicBool::new(false)).collect();
    let pulled = AtomicU64::new(0);
    let shared = Shared { transport, pool, peer, source, expected, in_use, pulled };
    let started = Instant::now();
    thread::scope(|scope| {
        for thread in 1..=THREADS {
            let shared = &shared;
            scope.spawn(move || {
                let mut random = Random(thread.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                while shared.pulled.load(Ordering::Relaxed) < pulls {
                    if shared.pull(&mut random) {
                        shared.pulled.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let stats = shared.pool.stats();
    let pulled = shared.pulled.load(Ordering::Relaxed);
    println!("{pulled} pulls in {:?}, 0 wrong bytes: {stats:?}", started.elapsed());
    assert!(pulled >= pulls);
    assert!(stats.evictions > 0 && stats.hits > 0, "{stats:?}");
    assert_eq!((stats.leased_bytes, stats.quarantined_bytes), (0, 0));
    shared.pool.clear();
    let stats = shared.pool.stats();
    assert_eq!((stats.bytes, stats.registrations), (0, stats.deregistrations));
    owner.deregister(registration).unwrap();
}

#[test]
fn p17_four_threads_pull_through_one_pool_one_sided() {
    isolated(
        "stress::p17_four_threads_pull_through_one_pool_one_sided",
        ONE_SIDED,
        threads_share_a_pool_and_an_agent,
    );
}

#[test]
fn p17_four_threads_pull_through_one_pool_emulated() {
    isolated(
        "stress::p17_four_threads_pull_through_one_pool_emulated",
        EMULATED,
        threads_share_a_pool_and_an_agent,
    );
}
