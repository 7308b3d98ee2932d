//! Peers that fall silent in the middle of a read, and may speak again: over the in-process transport, whose bytes move
//! when it is polled.

use std::sync::{Arc, Mutex, PoisonError};

use refit_planner::Capabilities;
use refit_pool::Region;
use refit_transport::local::LocalTransport;
use refit_transport::{Peer, ReadOp, Status, Transport, TransportError, Written};

/// Who is silent: by the first part of an agent's name, and after how many polls of reads from it.
#[derive(Clone, Debug, Default)]
pub struct Silence(Arc<Mutex<Vec<(String, usize)>>>);

impl Silence {
    /// From so many polls on, peers whose names begin like this say nothing.
    pub fn fall(&self, peers: &str, polls: usize) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((peers.to_owned(), polls));
    }

    /// All go on where they stopped.
    pub fn end(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn holds(&self, peer: &str) -> bool {
        let mut silent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((_, left)) = silent.iter_mut().find(|(peers, _)| peer.starts_with(peers)) else {
            return false;
        };
        let holds = *left == 0;
        *left = left.saturating_sub(1);
        holds
    }
}

/// An agent whose peers may fall silent.
#[derive(Debug)]
pub struct Hushed {
    inner: LocalTransport,
    silence: Silence,
}

/// A batch of reads from one peer.
#[derive(Debug)]
pub struct HushedReads {
    peer: String,
    inner: <LocalTransport as Transport>::Prepared,
}

impl Hushed {
    /// This agent, with these silences.
    #[must_use]
    pub fn new(inner: LocalTransport, silence: &Silence) -> Self {
        Self { inner, silence: silence.clone() }
    }
}

impl Transport for Hushed {
    type Registration = <LocalTransport as Transport>::Registration;
    type Prepared = HushedReads;

    fn backend(&self) -> &'static str {
        "hushed"
    }

    fn agent(&self) -> &str {
        self.inner.agent()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn metadata(&self) -> Result<Vec<u8>, TransportError> {
        self.inner.metadata()
    }

    fn register(&self, region: &Region) -> Result<Self::Registration, TransportError> {
        self.inner.register(region)
    }

    fn deregister(&self, registration: Self::Registration) -> Result<(), TransportError> {
        self.inner.deregister(registration)
    }

    fn connect(&self, name: &str, metadata: &[u8]) -> Result<Peer, TransportError> {
        self.inner.connect(name, metadata)
    }

    fn disconnect(&self, peer: &Peer) -> Result<(), TransportError> {
        self.inner.disconnect(peer)
    }

    fn prepare(&self, peer: &Peer, reads: &[ReadOp]) -> Result<HushedReads, TransportError> {
        Ok(HushedReads { peer: peer.name.clone(), inner: self.inner.prepare(peer, reads)? })
    }

    fn written<'a>(&self, prepared: &'a HushedReads) -> &'a [Written] {
        self.inner.written(&prepared.inner)
    }

    fn reads(&self, prepared: &HushedReads) -> usize {
        self.inner.reads(&prepared.inner)
    }

    unsafe fn post(&self, prepared: &mut HushedReads) -> Result<Status, TransportError> {
        // SAFETY: the caller's promise is what this asks for.
        unsafe { self.inner.post(&mut prepared.inner) }
    }

    fn poll(&self, prepared: &mut HushedReads) -> Result<Status, TransportError> {
        if self.silence.holds(&prepared.peer) {
            return Ok(Status::Pending);
        }
        self.inner.poll(&mut prepared.inner)
    }

    fn suspect(&self, prepared: &HushedReads) {
        self.inner.suspect(&prepared.inner);
    }
}
