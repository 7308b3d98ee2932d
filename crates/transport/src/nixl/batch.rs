//! A prepared batch, which knows whether it may still be writing memory.

use std::fmt;
use std::mem::{self, ManuallyDrop};
use std::sync::Arc;

use std::time::Duration;

use nixl_sys::XferRequest;

use super::agent::{Agent, Registration};
use super::transport::PeerLink;
use super::warm_up::Scratch;
use crate::registry::Holds;
use crate::{Cause, Status, Written};

/// A batch of reads prepared by a [`NixlTransport`](super::NixlTransport).
///
/// Dropped while its reads may still write memory, it leaks itself: its requests, the registrations they point into,
/// and with them the memory and the agent.
pub struct NixlReads {
    parts: ManuallyDrop<Parts>,
    state: State,
}

/// In the order in which they have to go.
struct Parts {
    /// Run one after the other. The first is a single byte if the batch is `probed`: see [`NixlReads::post`].
    requests: Vec<XferRequest>,
    _into: Destination,
    agent: Arc<Agent>,
    peer: Arc<PeerLink>,
    written: Vec<Written>,
    reads: usize,
    probed: bool,
}

/// What a batch posts, in this order. The first is one read, so that nothing is under way if it cannot be posted.
pub(super) struct Requests {
    pub(super) list: Vec<XferRequest>,
    /// Whether the first is there for that only.
    pub(super) probed: bool,
}

/// What keeps the memory that a batch writes registered, and so allocated.
pub(super) enum Destination {
    Registered(#[allow(dead_code, reason = "held, never read")] Holds<Registration>),
    Scratch(#[allow(dead_code, reason = "held, never read")] Arc<Scratch>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    /// The request of this index is posted; those before it are done.
    Running(usize),
    /// Reads may write for ever.
    Lost,
}

/// How a batch failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) cause: Cause,
    /// Whether its memory is quiet.
    pub(super) settled: bool,
}

impl NixlReads {
    pub(super) fn new(
        requests: Requests,
        into: Destination,
        agent: Arc<Agent>,
        peer: Arc<PeerLink>,
        written: Vec<Written>,
        reads: usize,
    ) -> Self {
        let Requests { list: requests, probed } = requests;
        let parts = Parts { requests, _into: into, agent, peer, written, reads, probed };
        Self { parts: ManuallyDrop::new(parts), state: State::Idle }
    }

    pub(super) fn peer(&self) -> &PeerLink {
        &self.parts.peer
    }

    pub(super) fn agent(&self) -> &Arc<Agent> {
        &self.parts.agent
    }

    pub(super) fn written(&self) -> &[Written] {
        &self.parts.written
    }

    pub(super) fn reads(&self) -> usize {
        self.parts.reads
    }

    /// Starts the batch.
    ///
    /// A post of many reads that fails does not say how many it had started, and NIXL offers no way to see them end.
    /// So a single byte goes first: a peer that died since the last cycle fails there, where nothing else was
    /// started, and costs an error instead of quarantined memory. A peer that was heard from within `probe_after` is
    /// taken to be alive.
    ///
    /// # Safety
    /// Nobody accesses the memory that the batch writes until it has settled.
    pub(super) unsafe fn post(&mut self, probe_after: Duration) -> Result<Status, Failure> {
        match self.state {
            State::Idle => {}
            State::Running(_) => {
                return Err(failure(Cause::State { state: "posted already" }, false));
            }
            State::Lost => return Err(failure(Cause::State { state: "lost" }, false)),
        }
        if !self.parts.peer.is_connected() {
            return Err(failure(Cause::PeerGone, true));
        }
        let known = self.parts.probed && self.parts.peer.link.heard_within(probe_after);
        self.parts.peer.started();
        // SAFETY: the caller's promise.
        unsafe { self.run(usize::from(known)) }
    }

    pub(super) fn poll(&mut self) -> Result<Status, Failure> {
        let current = match self.state {
            State::Running(current) => current,
            State::Idle => return Err(failure(Cause::State { state: "not posted" }, true)),
            State::Lost => return Err(failure(Cause::State { state: "lost" }, false)),
        };
        match self.parts.agent.status(&self.parts.requests[current]) {
            Ok(Status::Pending) => Ok(Status::Pending),
            Ok(Status::Done) => {
                self.parts.peer.link.heard();
                // SAFETY: the batch has not settled, so the promise made to `post` still holds.
                unsafe { self.run(current + 1) }
            }
            Err((cause, settled)) => Err(self.end(failure(cause, settled))),
        }
    }

    /// Posts requests from this one on, as long as they are done at once.
    ///
    /// # Safety
    /// As [`post`](Self::post).
    unsafe fn run(&mut self, first: usize) -> Result<Status, Failure> {
        let Parts { requests, agent, peer, .. } = &mut *self.parts;
        for (index, request) in requests.iter().enumerate().skip(first) {
            self.state = State::Running(index);
            // SAFETY: `_into` keeps the memory registered; nobody accesses it, says the caller; the requests before
            // this one are done.
            match unsafe { agent.post(request) } {
                Ok(Status::Done) => peer.link.heard(),
                Ok(Status::Pending) => return Ok(Status::Pending),
                Err(error) => {
                    // The first request is one read: if it could not be started, nothing was.
                    let settled = error.untouched || index == 0;
                    return Err(self.end(failure(error.cause, settled)));
                }
            }
        }
        self.state = State::Idle;
        self.parts.peer.settled();
        Ok(Status::Done)
    }

    fn end(&mut self, failure: Failure) -> Failure {
        if failure.settled {
            self.state = State::Idle;
            self.parts.peer.settled();
        } else {
            self.state = State::Lost;
        }
        failure
    }
}

fn failure(cause: Cause, settled: bool) -> Failure {
    Failure { cause, settled }
}

impl Drop for NixlReads {
    fn drop(&mut self) {
        // SAFETY: taken here only, and the value is not used again.
        let parts = unsafe { ManuallyDrop::take(&mut self.parts) };
        if self.state == State::Idle {
            let agent = Arc::clone(&parts.agent);
            let _entered = agent.context().try_enter();
            drop(parts);
            return;
        }
        // Releasing the request would not stop it, and hide it. The registrations keep the memory allocated.
        tracing::error!(
            agent = parts.agent.name,
            peer = parts.peer.name,
            reads = parts.reads,
            bytes = parts.written.iter().map(Written::bytes).sum::<u64>(),
            "reads dropped before they settled; they are leaked with their memory"
        );
        mem::forget(parts);
    }
}

impl fmt::Debug for NixlReads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NixlReads")
            .field("peer", &self.parts.peer.name)
            .field("reads", &self.parts.reads)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}
