//! Whole sides in one process, over the in-process transport, with memory that shows what was written beside it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use refit::planner::RankLayout;
use refit::pool::{Allocator, HostAllocator, Memory, PoolOptions};
use refit::transport::local::{LocalTransport, Network};
use refit::transport::{Transport, TransportPool, TransportRegistrar};
use refit::{Publication, Report, Source, Target, TargetOptions};

use crate::oracle::{self, Buffers, POISON};

/// Bytes after every parameter that nobody may write.
const CANARY_BYTES: usize = 64;
const CANARY: u8 = 0x5c;

/// The bytes that follow each parameter.
#[derive(Debug, Default)]
pub struct Canaries(Vec<(String, Memory)>);

impl Canaries {
    /// Checks that every canary is alive.
    pub fn check(&self) {
        for (param, canary) in &self.0 {
            let alive = canary.host_bytes().unwrap().iter().all(|&byte| byte == CANARY);
            assert!(alive, "bytes after `{param}` were written");
        }
    }
}

/// Memory for every parameter of a layout, each followed by a canary, all of it poisoned.
#[must_use]
pub fn memory(layout: &RankLayout) -> (Vec<(String, Memory)>, Canaries) {
    let (mut params, mut canaries) = (Vec::new(), Canaries::default());
    for param in layout.params() {
        let bytes = usize::try_from(param.bytes()).unwrap();
        let whole = HostAllocator.allocate(bytes + CANARY_BYTES).unwrap();
        let (mut held, mut canary) = whole.split_at(bytes);
        held.host_bytes_mut().unwrap().fill(POISON);
        canary.host_bytes_mut().unwrap().fill(CANARY);
        params.push((param.name().to_string(), held));
        canaries.0.push((param.name().to_string(), canary));
    }
    (params, canaries)
}

/// An agent on a network of one process.
#[must_use]
pub fn agent(network: &Network, name: &str) -> Arc<LocalTransport> {
    Arc::new(LocalTransport::new(network, name).unwrap())
}

/// A pool over an agent, without a budget.
#[must_use]
pub fn pool<T: Transport>(transport: &Arc<T>) -> TransportPool<T> {
    TransportPool::new(
        HostAllocator,
        TransportRegistrar::new(transport.clone()),
        PoolOptions::default(),
    )
}

/// A source rank that holds what the oracle says.
#[must_use]
pub fn source<T: Transport>(transport: &Arc<T>, layout: &RankLayout) -> Source<T> {
    let (params, _) = memory(layout);
    let mut source =
        Source::new(transport.clone(), &pool(transport), layout.clone(), params).unwrap();
    write(&mut source, &oracle::buffers(layout));
    source
}

/// Overwrites a source's parameters, and commits the version that follows.
pub fn write<T: Transport>(source: &mut Source<T>, buffers: &Buffers) {
    let version = source.header().stamp.version + 1;
    let mut updating = source.begin_update().unwrap();
    for (name, memory) in updating.params_mut() {
        memory.host_bytes_mut().unwrap().copy_from_slice(&buffers[name]);
    }
    let offered = updating.commit(version).unwrap();
    assert_eq!(source.offered(), Some(offered));
}

/// A target rank that holds poison.
#[must_use]
pub fn target<T: Transport>(
    transport: &Arc<T>,
    layout: &RankLayout,
    options: TargetOptions,
) -> (Target<T>, TransportPool<T>, Canaries) {
    let (params, canaries) = memory(layout);
    let pool = pool(transport);
    let target =
        Target::new(transport.clone(), pool.clone(), layout.clone(), params, options).unwrap();
    (target, pool, canaries)
}

/// A whole refit that must succeed.
#[must_use]
pub fn refit<T: Transport>(target: Target<T>, published: &[Publication]) -> (Target<T>, Report) {
    let pulling = target.prepare(published).unwrap().pull().unwrap();
    pulling.wait(soon()).unwrap().land().unwrap().install().refreshed()
}

/// A deadline that no test should reach.
#[must_use]
pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// What a target holds.
#[must_use]
pub fn held<T: Transport>(target: &Target<T>) -> Buffers {
    target
        .params()
        .map(|(name, memory)| (name.to_owned(), memory.host_bytes().unwrap().to_vec()))
        .collect()
}
