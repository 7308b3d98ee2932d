//! A prepared batch, which knows whether the device may still be writing for it.

use std::collections::BTreeMap;
use std::fmt;
use std::mem::{self, ManuallyDrop};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use refit_kernels::Resident;

use super::blob::Allocation;
use super::driver::Mapping;
use super::engine::{Copy, Engine, Flight};
use super::link::{Link, Source};
use crate::peers::PeerState;
use crate::registry::Holds;
use crate::{Cause, Status, Written};

/// How long a batch that is dropped in flight waits for the device. What is queued there ends by itself, unless
/// something before it in the caller's stream does not.
const PATIENCE: Duration = Duration::from_secs(10);

/// A batch of reads prepared by a [`PeerTransport`](super::PeerTransport): a table on the device, and copies for the
/// copy engine.
///
/// Dropped in flight, it waits for the device, which ends by itself what is queued. Where that is not to be seen, it
/// leaks what the device may still read and write.
pub struct PeerReads {
    parts: ManuallyDrop<Parts>,
    state: State,
}

/// In the order in which they have to go.
pub(super) struct Parts {
    pub(super) table: Option<Resident>,
    pub(super) copies: Vec<Copy>,
    /// Memory of other processes, mapped as long as this may read it; by the peer's addresses.
    pub(super) _mappings: BTreeMap<u64, Arc<Mapping>>,
    /// Keeps what is written registered, and so allocated.
    pub(super) _holds: Holds<Allocation>,
    pub(super) engine: Arc<Engine>,
    pub(super) peer: Arc<PeerState<Link>>,
    /// What is read, in the peer's addresses.
    pub(super) sources: Vec<Source>,
    pub(super) written: Vec<Written>,
    pub(super) reads: usize,
}

#[derive(Debug)]
enum State {
    Idle,
    /// Queued. Memory of our own process that is read stays allocated by the holds.
    Running(Arc<Flight>, Option<Holds<Allocation>>),
    /// The device may write for ever.
    Lost,
}

/// How a batch failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) cause: Cause,
    /// Whether its memory is quiet.
    pub(super) settled: bool,
}

impl PeerReads {
    pub(super) fn new(parts: Parts) -> Self {
        Self { parts: ManuallyDrop::new(parts), state: State::Idle }
    }

    pub(super) fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Whether it may be queued, and what has to be held while it runs.
    pub(super) fn ready(&self) -> Result<Option<Holds<Allocation>>, Failure> {
        match self.state {
            State::Idle => {}
            State::Running(..) => {
                return Err(failure(Cause::State { state: "posted already" }, false));
            }
            State::Lost => return Err(failure(Cause::State { state: "lost" }, false)),
        }
        if !self.parts.peer.is_connected() {
            return Err(failure(Cause::PeerGone, true));
        }
        self.parts.peer.link.hold(&self.parts.sources).map_err(|cause| failure(cause, true))
    }

    /// Queued.
    pub(super) fn fly(&mut self, flight: Arc<Flight>, sources: Option<Holds<Allocation>>) {
        self.parts.peer.started();
        self.state = State::Running(flight, sources);
    }

    /// Queued in part.
    pub(super) fn lose(&mut self, sources: Option<Holds<Allocation>>) {
        self.parts.peer.started();
        // What the device may read goes no more than what it may write.
        mem::forget(sources);
        self.state = State::Lost;
    }

    pub(super) fn poll(&mut self) -> Result<Status, Failure> {
        let flight = match &self.state {
            State::Running(flight, _) => flight,
            State::Idle => return Err(failure(Cause::State { state: "not posted" }, true)),
            State::Lost => return Err(failure(Cause::State { state: "lost" }, false)),
        };
        match flight.is_done() {
            Ok(false) => Ok(Status::Pending),
            Ok(true) => {
                self.state = State::Idle;
                self.parts.peer.settled();
                Ok(Status::Done)
            }
            Err(error) => {
                // An asynchronous error is the context's: it says neither whose work failed nor that the rest, the
                // copy engine's above all, has stopped. Every later question gets the same answer.
                let State::Running(_, sources) = mem::replace(&mut self.state, State::Lost) else {
                    unreachable!("it was running");
                };
                mem::forget(sources);
                Err(failure(error.into(), false))
            }
        }
    }

    /// Waits for the device, for a while.
    fn land(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.poll() {
                Ok(Status::Done) => return true,
                Ok(Status::Pending) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_micros(50));
                }
                Ok(Status::Pending) | Err(_) => return false,
            }
        }
    }
}

fn failure(cause: Cause, settled: bool) -> Failure {
    Failure { cause, settled }
}

impl Drop for PeerReads {
    fn drop(&mut self) {
        let quiet = match self.state {
            State::Idle => true,
            State::Running(..) => self.land(),
            State::Lost => false,
        };
        // SAFETY: taken here only, and the value is not used again.
        let parts = unsafe { ManuallyDrop::take(&mut self.parts) };
        if quiet {
            return;
        }
        tracing::error!(
            peer = parts.peer.name,
            reads = parts.reads,
            bytes = parts.written.iter().map(Written::bytes).sum::<u64>(),
            "reads dropped that the device may still be doing; they are leaked with their memory"
        );
        mem::forget(parts);
        mem::forget(mem::replace(&mut self.state, State::Lost));
    }
}

impl fmt::Debug for PeerReads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerReads")
            .field("peer", &self.parts.peer.name)
            .field("reads", &self.parts.reads)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}
