//! Schedules without time: the wire moves when the test says so.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::Index;
use refit_planner::{Dims, Transform};
use refit_pool::{Allocator, HostAllocator, Key, LeaseError, Memory, Pool, PoolError, PoolOptions};
use refit_tests::faults::{FaultTransport, Script, Wire};
use refit_transport::{
    LocalRange, Parked, Peer, Progress, Pull, PullError, ReadOp, RemoteRange, Returned, Settled,
    Transport, TransportError, TransportLease, TransportPool, TransportRegistrar, Unsettled,
};

use super::scripts;

type T = FaultTransport;

const KEYS: u8 = 3;
const READ: u64 = 64;
/// Reads of one batch; there are two.
const READS: u64 = 4;
const ARENA: u64 = 2 * READS * READ;
/// The last read of the second batch goes to live memory.
const LIVE: u64 = READ;
const LIMIT: u64 = 4 * ARENA;

#[derive(Clone, Debug)]
enum Op {
    Start(u8, Box<[Script; 2]>),
    Step(usize),
    Poll(Index),
    Finish(Index),
    Park(Index),
    PollParked(Index),
    Drop(Index),
    DropParked(Index),
    Borrow(u8),
    Return(Index),
    Kill,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let start = (0..KEYS, scripts(0), scripts(0))
        .prop_map(|(key, one, other)| Op::Start(key, Box::new([one, other])));
    let op = prop_oneof![
        6 => start,
        8 => (1..5_usize).prop_map(Op::Step),
        3 => any::<Index>().prop_map(Op::Poll),
        3 => any::<Index>().prop_map(Op::Finish),
        4 => any::<Index>().prop_map(Op::Park),
        4 => any::<Index>().prop_map(Op::PollParked),
        1 => any::<Index>().prop_map(Op::Drop),
        1 => any::<Index>().prop_map(Op::DropParked),
        4 => (0..KEYS).prop_map(Op::Borrow),
        2 => any::<Index>().prop_map(Op::Return),
        1 => Just(Op::Kill),
    ];
    prop::collection::vec(op, 1..80)
}

/// One incarnation: abandoned reads make an agent take no new ones, so that another follows.
struct Agent {
    transport: Arc<T>,
    pool: TransportPool<T>,
    /// Entries that nobody will ever see again.
    leaked: u64,
}

/// What a pull writes, from where.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    agent: usize,
    key: u8,
    arena: u64,
    live: u64,
}

struct World {
    wire: Wire,
    agents: Vec<Agent>,
    /// Live memory that nothing uses, by the arena of its entry.
    live: BTreeMap<u64, Memory>,
    pulls: Vec<(Pull<T>, Place)>,
    parked: Vec<(Parked<T>, Place)>,
    /// Arena and live memory that must never be lent again.
    leaked: Vec<Place>,
    /// Somebody else's: leases that the test writes, and their live memory.
    borrowed: Vec<(TransportLease<T>, Memory, Place, u8)>,
    fill: u8,
}

fn from(key: u8, read: u64) -> u64 {
    1_000 * u64::from(key) + 17 * read
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            wire: Wire::default(),
            agents: Vec::new(),
            live: BTreeMap::new(),
            pulls: Vec::new(),
            parked: Vec::new(),
            leaked: Vec::new(),
            borrowed: Vec::new(),
            fill: 0,
        };
        world.renew();
        world
    }

    fn renew(&mut self) {
        let transport = Arc::new(T::new(format!("agent-{}", self.agents.len()), &self.wire));
        let registrar = TransportRegistrar::new(Arc::clone(&transport));
        let options = PoolOptions {
            budget_bytes: 40 * ARENA,
            quarantine_bytes: Some(LIMIT),
            ..PoolOptions::default()
        };
        let pool = Pool::new(HostAllocator, registrar, options);
        self.agents.push(Agent { transport, pool, leaked: 0 });
    }

    /// A lease of what the pool must lend, with its live memory.
    fn lease(&mut self, key: u8) -> Option<(TransportLease<T>, Memory, Place)> {
        let number = self.agents.len() - 1;
        let agent = &self.agents[number];
        let quarantined = agent.pool.stats().quarantined_bytes;
        let taken = self.pulls.iter().map(|(_, place)| place);
        let taken = taken.chain(self.borrowed.iter().map(|(_, _, place, _)| place));
        let taken = taken.into_iter().any(|place| (place.agent, place.key) == (number, key));
        let suspect = agent.transport.suspects() > 0;
        let mut fresh = None;
        let leased = agent.pool.lease(Key::from([key; 32]), |build| {
            let arena = build.arena(ARENA)?;
            let live = HostAllocator.allocate(usize::try_from(LIVE).unwrap()).unwrap();
            build.register([live.allocation()])?;
            let peer = Peer { name: "peer".into() };
            let read = |read: u64| {
                let last = read + 1 == 2 * READS;
                let address = if last { live.address() } else { arena.address() + read * READ };
                ReadOp {
                    from: RemoteRange { address: from(key, read), len: READ, kind: arena.kind() },
                    into: LocalRange { address, len: READ, kind: arena.kind() },
                    run: READ,
                    dims: Dims::none(),
                    transform: Transform::Copy,
                    bulk: false,
                }
            };
            let batch = |batch: u64| {
                let reads = (batch * READS..(batch + 1) * READS).map(read).collect::<Vec<_>>();
                agent.transport.prepare(&peer, &reads)
            };
            let batches = vec![batch(0)?, batch(1)?];
            fresh = Some((arena.address(), live));
            Ok::<_, Box<dyn std::error::Error>>(batches)
        });
        let lease = match leased {
            Ok(lease) => lease,
            Err(LeaseError::Pool(PoolError::Quarantine { quarantined: found, limit, .. })) => {
                assert!(found == quarantined && found > limit && limit == LIMIT);
                return None;
            }
            Err(LeaseError::Pool(PoolError::Leased { .. })) => {
                assert!(taken, "refused a key that nobody has");
                return None;
            }
            Err(LeaseError::Build(error)) => {
                let error = error.downcast::<TransportError>().unwrap();
                assert!(suspect && matches!(*error, TransportError::Suspect { .. }), "{error}");
                self.renew();
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        assert!(!taken && quarantined <= LIMIT, "lent what it must not lend");
        if let Some((arena, live)) = fresh {
            self.live.insert(arena, live);
        }
        let arena = lease.arenas()[0].address();
        let live = self.live.remove(&arena).expect("its live memory is where it was left");
        let place = Place { agent: number, key, arena, live: live.address() };
        // What is lent is nothing that may still be written.
        for other in self.forbidden() {
            assert!(place.arena != other.arena && place.live != other.live, "{place:?}");
        }
        Some((lease, live, place))
    }

    /// What must not be lent.
    fn forbidden(&self) -> impl Iterator<Item = &Place> {
        let pulls = self.pulls.iter().map(|(_, place)| place);
        pulls.chain(self.parked.iter().map(|(_, place)| place)).chain(&self.leaked)
    }

    fn leak(&mut self, place: Place) {
        self.agents[place.agent].leaked += 1;
        self.leaked.push(place);
    }

    fn start(&mut self, key: u8, scripts: &[Script; 2]) {
        let Some((lease, live, place)) = self.lease(key) else { return };
        let transport = Arc::clone(&self.agents[place.agent].transport);
        if transport.suspects() == 0 {
            scripts.iter().for_each(|script| transport.script(script.clone()));
        }
        match Pull::start(Arc::clone(&transport), lease, vec![live], ..) {
            Ok(pull) => self.pulls.push((pull, place)),
            Err(error) => self.failed(error, place),
        }
        transport.unscript();
    }

    fn failed(&mut self, error: PullError<T>, place: Place) {
        match error {
            PullError::Failed { errors, lease, mut live } => {
                let suspect = matches!(errors[0], TransportError::Suspect { .. });
                assert!(!errors.is_empty());
                self.live.insert(place.arena, live.pop().unwrap());
                drop(lease);
                if suspect && place.agent + 1 == self.agents.len() {
                    self.renew();
                }
            }
            PullError::Lost { .. } => self.leak(place),
            PullError::Deadline { pull } => self.pulls.push((*pull, place)),
            other => panic!("{other}"),
        }
    }

    fn finish(&mut self, pull: Pull<T>, place: Place) {
        match pull.finish() {
            Ok(Settled { lease, mut live, .. }) => {
                let live = live.pop().unwrap();
                check_bytes(&lease.arenas()[0], &live, place.key);
                self.live.insert(place.arena, live);
            }
            Err(error) => self.failed(error, place),
        }
    }

    fn settle(&mut self, parked: Parked<T>, place: Place) {
        match parked.settle() {
            Ok(Returned { mut live, .. }) => {
                self.live.insert(place.arena, live.pop().unwrap());
            }
            Err(Unsettled::Pending(parked)) => self.parked.push((*parked, place)),
            Err(Unsettled::Lost { .. }) => self.leak(place),
            Err(other) => panic!("{other}"),
        }
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Start(key, scripts) => self.start(*key, scripts),
            Op::Step(times) => (0..*times).for_each(|_| self.wire.step()),
            Op::Kill => self.wire.kill(),
            Op::Poll(index) => {
                if let Some(index) = pick(index, self.pulls.len()) {
                    self.pulls[index].0.poll();
                }
            }
            Op::Finish(index) => {
                if let Some(index) = pick(index, self.pulls.len()) {
                    let (mut pull, place) = self.pulls.swap_remove(index);
                    pull.poll();
                    self.finish(pull, place);
                }
            }
            Op::Park(index) => {
                if let Some(index) = pick(index, self.pulls.len()) {
                    let (pull, place) = self.pulls.swap_remove(index);
                    self.parked.push((pull.park(), place));
                }
            }
            Op::PollParked(index) => {
                if let Some(index) = pick(index, self.parked.len()) {
                    let (mut parked, place) = self.parked.swap_remove(index);
                    parked.poll();
                    self.settle(parked, place);
                }
            }
            Op::Drop(index) => {
                if let Some(index) = pick(index, self.pulls.len()) {
                    let (pull, place) = self.pulls.swap_remove(index);
                    self.dropped(pull.progress(), pull, place);
                }
            }
            Op::DropParked(index) => {
                if let Some(index) = pick(index, self.parked.len()) {
                    let (parked, place) = self.parked.swap_remove(index);
                    self.dropped(parked.progress(), parked, place);
                }
            }
            Op::Borrow(key) => {
                if let Some((mut lease, mut live, place)) = self.lease(*key) {
                    self.fill = self.fill.wrapping_add(1);
                    // None of the bytes that come over the wire.
                    let fill = 0x80 | self.fill;
                    lease.arenas_mut()[0].host_bytes_mut().unwrap().fill(fill);
                    live.host_bytes_mut().unwrap().fill(fill);
                    self.borrowed.push((lease, live, place, fill));
                }
            }
            Op::Return(index) => {
                if let Some(index) = pick(index, self.borrowed.len()) {
                    let (lease, live, place, _) = self.borrowed.swap_remove(index);
                    drop(lease);
                    self.live.insert(place.arena, live);
                }
            }
        }
    }

    /// Dropping leaks what may still be written, as far as was seen, and frees the rest, with its live memory.
    fn dropped<P>(&mut self, progress: Progress, one: P, place: Place) {
        let agent = &self.agents[place.agent];
        let before = agent.transport.suspects();
        drop(one);
        let leaks = agent.transport.suspects() > before;
        assert!(leaks || progress != Progress::Pending, "pending reads were not leaked");
        if leaks {
            self.leak(place);
        } else {
            // The entry is idle and knows its live memory no more: a pull of it finds what it does not own.
            let _ = self.agents[place.agent].pool.evict(Key::from([place.key; 32]));
        }
    }

    fn check(&self) {
        for (lease, live, place, fill) in &self.borrowed {
            let arena = lease.arenas()[0].host_bytes().unwrap();
            let mut bytes = arena.iter().chain(live.host_bytes().unwrap());
            assert!(bytes.all(|byte| byte == fill), "a late read wrote lent memory: {place:?}");
        }
        for live in self.live.values() {
            assert_eq!(live.len() as u64, LIVE);
        }
        for (number, agent) in self.agents.iter().enumerate() {
            let stats = agent.pool.stats();
            let of = |places: &mut dyn Iterator<Item = &Place>| {
                places.filter(|place| place.agent == number).count() as u64
            };
            let pulls = of(&mut self.pulls.iter().map(|(_, place)| place));
            let borrowed = of(&mut self.borrowed.iter().map(|(_, _, place, _)| place));
            let parked = of(&mut self.parked.iter().map(|(_, place)| place));
            assert_eq!(stats.leased_bytes, (pulls + borrowed) * ARENA);
            let quarantined = parked + agent.leaked;
            assert_eq!(stats.quarantined_entries, quarantined);
            assert_eq!(stats.quarantined_bytes, quarantined * ARENA);
            assert_eq!(stats.quarantines - stats.releases, quarantined);
            assert!(stats.bytes >= stats.leased_bytes + stats.quarantined_bytes);
        }
    }

    /// The peer is killed: everything that can be watched settles, and its memory is back.
    fn end(mut self) {
        self.wire.kill();
        for (mut pull, place) in std::mem::take(&mut self.pulls) {
            assert_ne!(pull.poll(), Progress::Pending);
            self.finish(pull, place);
        }
        for (mut parked, place) in std::mem::take(&mut self.parked) {
            assert_ne!(parked.poll(), Progress::Pending);
            self.settle(parked, place);
        }
        assert!(self.pulls.is_empty() && self.parked.is_empty());
        self.check();
        for agent in &self.agents {
            assert_eq!(agent.pool.stats().quarantined_entries, agent.leaked);
        }
        // What is lost goes on landing where nobody looks.
        self.wire.step();
        self.check();
        self.borrowed.clear();
        for agent in &self.agents {
            agent.pool.clear();
            let stats = agent.pool.stats();
            assert_eq!((stats.bytes, stats.entries), (agent.leaked * ARENA, 0));
        }
        self.wire.step();
    }
}

fn pick(index: &Index, len: usize) -> Option<usize> {
    (len > 0).then(|| index.index(len))
}

fn check_bytes(arena: &Memory, live: &Memory, key: u8) {
    let (arena, live) = (arena.host_bytes().unwrap(), live.host_bytes().unwrap());
    for read in 0..2 * READS {
        let start = usize::try_from(read * READ).unwrap();
        let bytes = if read + 1 == 2 * READS { live } else { &arena[start..start + live.len()] };
        for (at, &byte) in (0..).zip(bytes) {
            assert_eq!(byte, T::byte(from(key, read) + at), "read {read}, byte {at}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn p02_nothing_that_a_read_may_write_is_lent(ops in ops()) {
        let mut world = World::new();
        for op in &ops {
            world.run(op);
            world.check();
        }
        world.end();
    }
}
