//! The first byte from a peer: it sets the connection up, and shows that there is one.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use refit_planner::{Dims, Transform};
use refit_pool::{Allocator, HostAllocator};

use super::transport::{NixlTransport, PeerLink};
use crate::{Cause, LocalRange, ReadOp, RemoteRange, Status, Transport, TransportError};

/// Reads one byte that the peer registered, if it registered any.
///
/// NIXL's own `make_connection` only looks the peer up; UCX exchanges addresses when the first bytes move.
pub(super) fn first_byte(
    transport: &NixlTransport,
    peer: &Arc<PeerLink>,
    wait: Duration,
) -> Result<(), TransportError> {
    let Some((kind, address, _)) = peer.ranges().iter().next() else { return Ok(()) };
    let error = |cause| TransportError::Connect {
        agent: transport.agent().into(),
        peer: peer.name.clone(),
        cause,
    };
    let memory = HostAllocator.allocate(1).map_err(|failure| {
        error(Cause::Call { call: "allocate a byte", status: failure.to_string() })
    })?;
    let region = memory.allocation();
    let registration = transport.register(region)?;
    let read = ReadOp {
        from: RemoteRange { address, len: 1, kind },
        into: LocalRange { address: region.address(), len: 1, kind: region.kind() },
        run: 1,
        dims: Dims::none(),
        transform: Transform::Copy,
        bulk: false,
    };
    let mut batch = transport.build(Arc::clone(peer), &[read])?;
    let deadline = Instant::now() + wait;
    // SAFETY: nobody accesses `memory`, which the batch keeps allocated and registered even where it is leaked.
    let mut status = unsafe { transport.post(&mut batch) };
    while matches!(status, Ok(Status::Pending)) && Instant::now() < deadline {
        thread::sleep(Duration::from_micros(100));
        status = transport.poll(&mut batch);
    }
    drop(registration);
    match status {
        Ok(Status::Done) => Ok(()),
        // The batch leaks itself and its byte.
        Ok(Status::Pending) => {
            let millis = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
            Err(error(Cause::Silent { millis }))
        }
        Err(TransportError::Failed { cause, .. } | TransportError::Lost { cause, .. }) => {
            Err(error(cause))
        }
        Err(other) => Err(other),
    }
}
