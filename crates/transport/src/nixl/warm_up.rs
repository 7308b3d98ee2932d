//! Reads whose bytes nobody wants: they set a connection up, show that there is a peer, and have UCX map its memory.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

#[cfg(feature = "cuda")]
use refit_pool::cuda::CudaAllocator;
use refit_pool::{Allocator, HostAllocator, Memory, MemoryKind};

use super::NixlOptions;
use super::agent::{Agent, Piece, Registration, place};
use super::batch::{Destination, Failure, NixlReads, Requests};
use super::link::Place;
use super::transport::{NixlTransport, PeerLink, Strays};
use crate::{Cause, Status, TransportError};

/// Bytes read of an allocation to have it mapped. UCX may have the peer send a few bytes instead, which maps nothing;
/// so many it copies by the device, in 6 us.
#[cfg(feature = "cuda")]
const TOUCH: usize = 64 << 10;

/// Memory that is read into and that nobody looks at: reads into it may overlap, and come when they like.
///
/// NIXL knows it and peers do not: it is not in what an agent publishes.
pub(super) struct Scratch {
    /// Before the memory.
    _registration: Registration,
    memory: Memory,
}

impl Scratch {
    fn new(agent: &Agent, allocator: &dyn Allocator, bytes: usize) -> Result<Arc<Self>, Cause> {
        let failed = |error: refit_pool::AllocateError| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            let status = format!("{error}: {}", cause.unwrap_or_default());
            Cause::Call { call: "allocate memory to warm up with", status }
        };
        let memory = allocator.allocate(bytes).map_err(failed)?;
        let registration = agent.register(memory.allocation())?;
        Ok(Arc::new(Self { _registration: registration, memory }))
    }

    /// Of the agent's device, if it has one.
    #[cfg(feature = "cuda")]
    pub(super) fn of_device(
        agent: &Agent,
        options: &NixlOptions,
    ) -> Result<Option<Arc<Self>>, Cause> {
        let device = options.device.as_ref();
        device
            .map(|device| Self::new(agent, &CudaAllocator::new(device.clone()), TOUCH))
            .transpose()
    }

    /// Of the agent's device: without the feature `cuda` it has none.
    #[cfg(not(feature = "cuda"))]
    #[allow(clippy::unnecessary_wraps, reason = "with the feature it can fail")]
    pub(super) fn of_device(
        _agent: &Agent,
        _options: &NixlOptions,
    ) -> Result<Option<Arc<Self>>, Cause> {
        Ok(None)
    }

    pub(super) fn kind(&self) -> MemoryKind {
        self.memory.kind()
    }
}

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scratch").field("memory", &self.memory).finish_non_exhaustive()
    }
}

/// Reads the first of what the peer registered, if it registered any: of its devices' memory where we have a device.
///
/// NIXL's own `make_connection` only looks the peer up; UCX exchanges addresses when the first bytes move.
pub(super) fn first_byte(
    transport: &NixlTransport,
    peer: &Arc<PeerLink>,
    wait: Duration,
) -> Result<(), TransportError> {
    transport.not_suspect()?;
    let error = |cause| TransportError::Connect {
        agent: transport.handle().name.clone(),
        peer: peer.name.clone(),
        cause,
    };
    let (agent, ranges) = (transport.handle(), peer.ranges());
    let on_device = |place: &Place| matches!(place.0, MemoryKind::Cuda(_));
    if let Some(scratch) = transport.scratch()
        && let Some(place) = ranges.iter().find(on_device)
    {
        read(agent, transport.strays(), peer, scratch, &[place], wait).map_err(error)?;
        peer.link.touch(&[place]);
        return Ok(());
    }
    let Some(place) = ranges.iter().next() else { return Ok(()) };
    let byte = Scratch::new(agent, &HostAllocator, 1).map_err(error)?;
    read(agent, transport.strays(), peer, &byte, &[place], wait).map_err(error)
}

/// Reads a little of each place, which are of one type of memory.
pub(super) fn read(
    agent: &Arc<Agent>,
    strays: &Strays,
    peer: &Arc<PeerLink>,
    scratch: &Arc<Scratch>,
    places: &[Place],
    wait: Duration,
) -> Result<(), Cause> {
    let (into_type, into_device) = place(scratch.kind())?;
    let into = scratch.memory.address();
    let mut from_type = into_type;
    let mut pieces = Vec::with_capacity(places.len());
    for &(kind, from, len) in places {
        let from_device;
        (from_type, from_device) = place(kind)?;
        let len = len.min(scratch.memory.len() as u64);
        pieces.push(Piece { from, from_device, into, into_device, len });
    }
    // One by itself first: see `NixlReads::post`.
    let (first, rest) = pieces.split_at(pieces.len().min(1));
    let list = [first, rest]
        .into_iter()
        .filter(|pieces| !pieces.is_empty())
        .map(|pieces| agent.request(&peer.name, from_type, into_type, pieces))
        .collect::<Result<_, _>>()?;
    let requests = Requests { list, probed: false };
    let into = Destination::Scratch(Arc::clone(scratch));
    let mut batch = NixlReads::new(
        requests,
        into,
        Arc::clone(agent),
        Arc::clone(peer),
        Vec::new(),
        places.len(),
    );
    // None where it lies beyond what the clock counts.
    let deadline = Instant::now().checked_add(wait);
    // SAFETY: nobody accesses the scratch memory, which the batch keeps allocated and registered even where it is
    // leaked.
    let mut status = unsafe { batch.post(Duration::ZERO) };
    while matches!(status, Ok(Status::Pending))
        && deadline.is_none_or(|deadline| Instant::now() < deadline)
    {
        thread::sleep(Duration::from_micros(100));
        status = batch.poll();
    }
    match status {
        Ok(Status::Done) => Ok(()),
        Ok(Status::Pending) => {
            strays.lock().push(batch);
            Err(Cause::Silent { millis: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX) })
        }
        Err(Failure { cause, .. }) => Err(cause),
    }
}
