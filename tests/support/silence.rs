//! Peers that fall silent in the middle of a read, and may speak again: over the in-process transport, whose bytes move
//! when it is polled.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex, MutexGuard};
use refit_planner::Capabilities;
use refit_pool::Region;
use refit_transport::local::LocalTransport;
use refit_transport::{Cause, Peer, ReadOp, Status, Transport, TransportError, Written};

/// What befalls which peers, by the first part of their agents' names.
#[derive(Clone, Debug, Default)]
pub struct Silence(Arc<(Mutex<Befallen>, Condvar)>);

#[derive(Debug, Default)]
struct Befallen {
    /// After how many polls of reads from them.
    silent: Vec<(String, usize)>,
    blocking: Vec<String>,
    lost: Vec<String>,
}

impl Silence {
    /// From so many polls on, peers whose names begin like this say nothing.
    pub fn fall(&self, peers: &str, polls: usize) {
        self.state().silent.push((peers.to_owned(), polls));
    }

    /// A call that connects to such peers, or posts reads from them, does not return.
    pub fn block(&self, peers: &str) {
        self.state().blocking.push(peers.to_owned());
    }

    /// Reads from such peers can no longer be watched.
    pub fn lose(&self, peers: &str) {
        self.state().lost.push(peers.to_owned());
    }

    /// Whether any has, so that reads from it are under way.
    #[must_use]
    pub fn has_fallen(&self) -> bool {
        self.state().silent.iter().any(|(_, left)| *left == 0)
    }

    /// All go on where they stopped.
    pub fn end(&self) {
        *self.state() = Befallen::default();
        self.0.1.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, Befallen> {
        self.0.0.lock()
    }

    fn holds(&self, peer: &str) -> bool {
        let mut state = self.state();
        let Some((_, left)) = state.silent.iter_mut().find(|(peers, _)| peer.starts_with(peers))
        else {
            return false;
        };
        let holds = *left == 0;
        *left = left.saturating_sub(1);
        holds
    }

    fn wait(&self, peer: &str) {
        let blocks = |state: &mut Befallen| state.blocking.iter().any(|it| peer.starts_with(it));
        self.0.1.wait_while(&mut self.state(), blocks);
    }

    fn loses(&self, peer: &str) -> bool {
        self.state().lost.iter().any(|it| peer.starts_with(it))
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
        self.silence.wait(name);
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
        self.silence.wait(&prepared.peer);
        // SAFETY: the caller's promise is what this asks for.
        unsafe { self.inner.post(&mut prepared.inner) }
    }

    fn poll(&self, prepared: &mut HushedReads) -> Result<Status, TransportError> {
        if self.silence.loses(&prepared.peer) {
            let (agent, peer) = (self.agent().to_owned(), prepared.peer.clone());
            return Err(TransportError::Lost { agent, peer, cause: Cause::PeerGone });
        }
        if self.silence.holds(&prepared.peer) {
            return Ok(Status::Pending);
        }
        self.inner.poll(&mut prepared.inner)
    }

    fn suspect(&self, prepared: &HushedReads) {
        self.inner.suspect(&prepared.inner);
    }
}
