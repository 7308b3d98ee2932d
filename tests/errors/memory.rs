//! Registrations, leases and pulls.

use std::sync::Arc;

use refit::planner::{Dims, Transform};
use refit::pool::{
    Allocator, HostAllocator, Key, LeaseError, Memory, Pool, PoolError, PoolOptions,
};
use refit::transport::local::{LocalOptions, LocalTransport, Network};
use refit::transport::{
    Cause, LocalRange, Peer, Pull, PullError, ReadOp, RemoteRange, Transport, TransportError,
    TransportLease, TransportPool, TransportRegistrar,
};
use refit_tests::ranks;

use super::{Said, said};

type Local = LocalTransport;

const BYTES: usize = 4096;

/// A trainer with registered memory, and an engine that knows it and moves a byte whenever it looks.
struct World {
    trainer: Local,
    memory: Memory,
    registration: Option<<Local as Transport>::Registration>,
    engine: Arc<Local>,
    peer: Peer,
    network: Network,
}

impl World {
    fn new() -> Self {
        let network = Network::new();
        let trainer = LocalTransport::new(&network, "trainer").unwrap();
        let options = LocalOptions::default().with_bytes_per_poll(1);
        let engine = LocalTransport::with_options(&network, "engine", options).unwrap();
        let memory = HostAllocator.allocate(BYTES).unwrap();
        let registration = trainer.register(memory.allocation()).unwrap();
        let peer = engine.connect("trainer", &trainer.metadata().unwrap()).unwrap();
        let (engine, registration) = (Arc::new(engine), Some(registration));
        Self { trainer, memory, registration, engine, peer, network }
    }

    /// One read of everything.
    fn lease(&self) -> TransportLease<Local> {
        let lease = ranks::pool(&self.engine).lease(Key::from([1; 32]), |build| {
            let arena = build.arena(BYTES as u64).unwrap();
            let (len, kind) = (BYTES as u64, arena.kind());
            let read = ReadOp {
                from: RemoteRange { address: self.memory.address(), len, kind },
                into: LocalRange { address: arena.address(), len, kind },
                run: len,
                dims: Dims::none(),
                transform: Transform::Copy,
                bulk: false,
            };
            Ok::<_, TransportError>(vec![self.engine.prepare(&self.peer, &[read])?])
        });
        lease.unwrap()
    }

    fn start(&self) -> Result<Pull<Local>, PullError<Local>> {
        Pull::start(self.engine.clone(), self.lease(), Vec::new(), ..)
    }
}

fn pool(agent: &Arc<Local>, options: PoolOptions) -> TransportPool<Local> {
    Pool::new(HostAllocator, TransportRegistrar::new(agent.clone()), options)
}

fn arena(
    pool: &TransportPool<Local>,
    key: u8,
    bytes: u64,
) -> Result<TransportLease<Local>, PoolError> {
    let lease = pool.lease(Key::from([key; 32]), |build| {
        build.arena(bytes)?;
        Ok::<_, PoolError>(Vec::new())
    });
    lease.map_err(|error| match error {
        LeaseError::Pool(error) | LeaseError::Build(error) => error,
        other => panic!("{other}"),
    })
}

pub(super) fn quarantined() -> Said {
    let agent = ranks::agent(&Network::new(), "engine");
    let options = PoolOptions { quarantine_bytes: Some(1_000), ..PoolOptions::default() };
    let pool = pool(&agent, options);
    let apart = arena(&pool, 1, 2_000).unwrap().quarantine();
    let error = arena(&pool, 2, 10).unwrap_err();
    apart.release();
    drop(arena(&pool, 2, 10).unwrap());
    said!(error, PoolError::Quarantine { .. })
}

pub(super) fn exhausted() -> Said {
    let agent = ranks::agent(&Network::new(), "engine");
    let options = PoolOptions { budget_bytes: 1_000, ..PoolOptions::default() };
    said!(arena(&pool(&agent, options), 1, 4_096).unwrap_err(), PoolError::Budget { .. })
}

pub(super) fn deregistered() -> Said {
    let mut world = World::new();
    let lease = world.lease();
    drop(world.registration.take());
    let started = Pull::start(world.engine.clone(), lease, Vec::new(), ..);
    let errors = match started.and_then(|pull| pull.wait(ranks::soon())) {
        Err(PullError::Failed { errors, .. }) => errors,
        other => panic!("{other:?}"),
    };
    let error = errors.into_iter().next().unwrap();
    said!(error, TransportError::Failed { cause: Cause::Deregistered { .. }, .. })
}

pub(super) fn abandoned() -> Said {
    let world = World::new();
    // Leaks what it would write: a NIC might.
    drop(world.start().unwrap());
    let error = world.engine.prepare(&world.peer, &[]).unwrap_err();
    said!(error, TransportError::Suspect { .. })
}

pub(super) fn foreign() -> Said {
    let mut world = World::new();
    let other = LocalTransport::new(&world.network, "other").unwrap();
    let error = other.deregister(world.registration.take().unwrap()).unwrap_err();
    said!(error, TransportError::Register { cause: Cause::Foreign, .. })
}

pub(super) fn metadata() -> Said {
    let world = World::new();
    let mut metadata = world.trainer.metadata().unwrap();
    let last = metadata.len() - 40;
    metadata[last] ^= 1;
    let error = world.engine.connect("trainer", &metadata).unwrap_err();
    said!(error, TransportError::Connect { cause: Cause::Metadata { .. }, .. })
}
