//! One target, some sources, and what a pull should leave behind.

use std::ops::RangeBounds;
use std::sync::Arc;
use std::time::Instant;

use refit_planner::{Dims, Transform};
use refit_pool::{Allocator, Key, LeaseError, Memory, Pool, PoolError, PoolOptions};

use super::elements::converted;
use super::{Failure, Harness};
use crate::{
    LocalRange, Peer, Pull, PullError, ReadOp, RemoteRange, Settled, Transport, TransportError,
    TransportLease, TransportPool, TransportRegistrar,
};

/// What destinations hold before a pull. Sources never hold it.
pub(super) const CANARY: u8 = 0xC5;

/// A read, in offsets: from the source's memory into the arena.
#[derive(Clone, Debug)]
pub(super) struct Chunk {
    pub(super) from: u64,
    pub(super) into: u64,
    pub(super) run: u64,
    pub(super) dims: Dims,
    pub(super) transform: Transform,
    pub(super) bulk: bool,
}

impl Chunk {
    pub(super) fn plain(from: u64, into: u64, run: u64) -> Self {
        Self::strided(from, into, run, Dims::none())
    }

    pub(super) fn strided(from: u64, into: u64, run: u64, dims: Dims) -> Self {
        Self { from, into, run, dims, transform: Transform::Copy, bulk: false }
    }

    /// For the second engine, if there is one.
    pub(super) fn bulk(from: u64, into: u64, run: u64) -> Self {
        Self { bulk: true, ..Self::plain(from, into, run) }
    }

    pub(super) fn op(&self, source: &Memory, target: LocalRange) -> ReadOp {
        let from = self.dims.source_extent(self.run);
        let into = self.dims.target_extent(self.transform.target_bytes(self.run));
        ReadOp {
            from: RemoteRange {
                address: source.address() + self.from,
                len: from,
                kind: source.kind(),
            },
            into: LocalRange { address: target.address + self.into, len: into, kind: target.kind },
            run: self.run,
            dims: self.dims.clone(),
            transform: self.transform,
            bulk: self.bulk,
        }
    }
}

pub(super) struct Source<H: Harness> {
    pub(super) peer: Peer,
    pub(super) memory: Memory,
    pub(super) registration: Option<<H::Transport as Transport>::Registration>,
    pub(super) transport: H::Transport,
}

pub(super) struct World<'h, H: Harness> {
    pub(super) harness: &'h H,
    pub(super) pool: TransportPool<H::Transport>,
    pub(super) sources: Vec<Source<H>>,
    pub(super) target: Arc<H::Transport>,
}

pub(super) type LeaseOf<H> = TransportLease<<H as Harness>::Transport>;

impl<'h, H: Harness> World<'h, H> {
    /// A target connected to `sources` sources of so many registered bytes each.
    pub(super) fn new(harness: &'h H, sources: usize, bytes: usize) -> Result<Self, Failure> {
        Self::with_options(harness, sources, bytes, PoolOptions::default())
    }

    pub(super) fn with_options(
        harness: &'h H,
        sources: usize,
        bytes: usize,
        options: PoolOptions,
    ) -> Result<Self, Failure> {
        let target = Arc::new(harness.agent("target")?);
        let mut list = Vec::with_capacity(sources);
        for index in 0..sources {
            let transport = harness.agent(&format!("source{index}"))?;
            let mut memory = allocate_source(harness, bytes)?;
            harness.write(&mut memory, &pattern(index, bytes));
            let registration = Some(transport.register(memory.allocation())?);
            let peer = target.connect(transport.agent(), &transport.metadata()?)?;
            list.push(Source { peer, memory, registration, transport });
        }
        let registrar = TransportRegistrar::new(Arc::clone(&target));
        let pool = Pool::new(harness.allocator(), registrar, options);
        Ok(Self { harness, pool, sources: list, target })
    }

    /// A lease of an arena and one batch for each list of chunks, full of canaries.
    pub(super) fn lease(
        &self,
        key: u8,
        bytes: u64,
        chunks: &[&[Chunk]],
    ) -> Result<LeaseOf<H>, Failure> {
        let mut lease = self.pool.lease(Key::from([key; 32]), |build| {
            let arena = build.arena(bytes)?;
            let target = LocalRange { address: arena.address(), len: bytes, kind: arena.kind() };
            let batches = chunks.iter().zip(&self.sources);
            batches
                .map(|(chunks, source)| self.prepare(source, chunks, target))
                .collect::<Result<Vec<_>, _>>()
        })?;
        for arena in lease.arenas_mut() {
            self.harness.write(arena, &vec![CANARY; arena.len()]);
        }
        Ok(lease)
    }

    pub(super) fn prepare(
        &self,
        source: &Source<H>,
        chunks: &[Chunk],
        target: LocalRange,
    ) -> Result<<H::Transport as Transport>::Prepared, Failure> {
        let reads: Vec<ReadOp> =
            chunks.iter().map(|chunk| chunk.op(&source.memory, target)).collect();
        Ok(self.target.prepare(&source.peer, &reads)?)
    }

    /// Prepares reads given as they are, for refusals.
    pub(super) fn try_prepare(&self, reads: &[ReadOp]) -> Result<(), TransportError> {
        self.target.prepare(&self.sources[0].peer, reads).map(drop)
    }

    pub(super) fn pull(
        &self,
        lease: LeaseOf<H>,
        live: Vec<Memory>,
    ) -> Result<Settled<H::Transport>, PullError<H::Transport>> {
        self.pull_some(lease, live, ..)
    }

    /// Pulls these batches of the lease.
    pub(super) fn pull_some(
        &self,
        lease: LeaseOf<H>,
        live: Vec<Memory>,
        batches: impl RangeBounds<usize>,
    ) -> Result<Settled<H::Transport>, PullError<H::Transport>> {
        Pull::start(Arc::clone(&self.target), lease, live, batches)?
            .wait(Instant::now() + self.harness.patience())
    }

    /// What an arena should hold after the chunks arrived among canaries.
    pub(super) fn expected(&self, bytes: usize, chunks: &[&[Chunk]]) -> Vec<u8> {
        let mut expected = vec![CANARY; bytes];
        for (chunks, source) in chunks.iter().zip(&self.sources) {
            let source = self.harness.read(&source.memory);
            for chunk in *chunks {
                for (from, into) in chunk.dims.offsets() {
                    let [from, into, run] =
                        [chunk.from + from, chunk.into + into, chunk.run].map(size);
                    let bytes = converted(chunk.transform, &source[from..from + run]);
                    expected[into..into + bytes.len()].copy_from_slice(&bytes);
                }
            }
        }
        expected
    }

    /// Leases, pulls, and compares every byte of the arena.
    pub(super) fn check(&self, bytes: usize, chunks: &[&[Chunk]]) -> Result<(), Failure> {
        self.check_as(1, bytes, chunks)
    }

    /// The same under a key of one's own: what is leased by one key is prepared once.
    pub(super) fn check_as(
        &self,
        key: u8,
        bytes: usize,
        chunks: &[&[Chunk]],
    ) -> Result<(), Failure> {
        let settled = self.pull(self.lease(key, bytes as u64, chunks)?, Vec::new())?;
        compare(&self.harness.read(&settled.lease.arenas()[0]), &self.expected(bytes, chunks))
    }
}

pub(super) fn compare(found: &[u8], expected: &[u8]) -> Result<(), Failure> {
    super::ensure!(
        found.len() == expected.len(),
        "{} bytes where {} were expected",
        found.len(),
        expected.len()
    );
    let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
    let Some(at) = wrong else { return Ok(()) };
    let what =
        if expected[at] == CANARY { "was written and should not have been" } else { "is wrong" };
    Err(Failure(format!("byte {at} {what}: {:#04x} instead of {:#04x}", found[at], expected[at])))
}

pub(super) fn allocate<H: Harness>(harness: &H, bytes: usize) -> Result<Memory, Failure> {
    harness.allocator().allocate(bytes).map_err(|error| Failure(error.to_string()))
}

pub(super) fn allocate_source<H: Harness>(harness: &H, bytes: usize) -> Result<Memory, Failure> {
    harness.source_allocator().allocate(bytes).map_err(|error| Failure(error.to_string()))
}

/// Bytes that differ from one another, from other seeds' and from the canary.
pub(super) fn pattern(seed: usize, bytes: usize) -> Vec<u8> {
    let mut state = (seed as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let next = || {
        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        let [byte, ..] = (state >> 33).to_le_bytes();
        if byte == CANARY { 0 } else { byte }
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

pub(super) fn size(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

impl From<TransportError> for Failure {
    fn from(error: TransportError) -> Self {
        Self(error.to_string())
    }
}

impl From<PoolError> for Failure {
    fn from(error: PoolError) -> Self {
        Self(error.to_string())
    }
}

impl From<LeaseError<Self>> for Failure {
    fn from(error: LeaseError<Self>) -> Self {
        match error {
            LeaseError::Build(failure) => failure,
            other => Self(other.to_string()),
        }
    }
}

impl<T: Transport> From<PullError<T>> for Failure {
    fn from(error: PullError<T>) -> Self {
        Self(error.to_string())
    }
}
