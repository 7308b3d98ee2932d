//! The in-process transport: agents of one process read one another's memory.
//!
//! It refuses what a NIC would refuse, so that passing here means something: unregistered and overlong ranges on
//! either side, memory registered after the metadata was published or deregistered before the read, peers that are
//! unknown or gone. It copies inside [`poll`](crate::Transport::poll), a bounded number of bytes at a time, so that
//! callers really see reads that are pending.
//!
//! # Races
//!
//! A one-sided read does not ask the owner of the bytes. Here, as over RDMA, an owner that writes while it is read
//! tears what the reader gets; which version arrived is for the layer above to prove. The copies go through raw
//! pointers and make no references, so no aliasing promise of the owner's references is used; but the bytes of a torn
//! read are as undefined as a NIC's would be. Do not let owners write memory that is being read.

mod copy;
mod network;

use std::sync::Arc;

use refit_planner::Capabilities;
use refit_pool::{MemoryKind, Region};

use self::copy::Cursor;
use self::network::{Agent, Link};
use crate::envelope;
use crate::peers::{PeerState, Peers};
use crate::reads::{check_shapes, written};
use crate::registry::{Holds, Registered};
use crate::suspicion::Suspicion;
use crate::{Cause, Peer, ReadOp, Side, Status, Transport, TransportError, Written};

pub use self::network::Network;

/// Most metadata read; the limit exists so that this backend refuses what others do.
const MAX_METADATA: usize = 16 << 20;

/// How a [`LocalTransport`] behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LocalOptions {
    /// What it says it can do. With `strided_reads` it executes strided reads, without it refuses them.
    pub capabilities: Capabilities,
    /// Most bytes that one poll copies; at least 1.
    pub bytes_per_poll: u64,
}

impl Default for LocalOptions {
    /// Strided reads, the cost of a copy on one ordinary core, 16 MiB a poll.
    fn default() -> Self {
        let capabilities = Capabilities { strided_reads: true, ..Capabilities::plain(4_000, 100) };
        Self { capabilities, bytes_per_poll: 16 << 20 }
    }
}

impl LocalOptions {
    /// These options with or without strided reads.
    #[must_use]
    pub fn with_strided_reads(mut self, strided: bool) -> Self {
        self.capabilities.strided_reads = strided;
        self
    }

    /// These options with another number of bytes per poll.
    #[must_use]
    pub fn with_bytes_per_poll(mut self, bytes: u64) -> Self {
        self.bytes_per_poll = bytes;
        self
    }
}

/// An agent of a [`Network`].
#[derive(Debug)]
pub struct LocalTransport {
    agent: Arc<Agent>,
    options: LocalOptions,
    peers: Peers<Link>,
    suspect: Suspicion,
}

/// Memory registered with a [`LocalTransport`].
#[derive(Debug)]
pub struct LocalRegistration(Registered<()>);

/// A batch of reads prepared by a [`LocalTransport`].
#[derive(Debug)]
pub struct LocalReads {
    owner: u64,
    peer: Arc<PeerState<Link>>,
    reads: Vec<ReadOp>,
    written: Vec<Written>,
    /// Keeps the memory that is written registered, and so allocated.
    _holds: Holds<()>,
    /// Where the copying is; `None` unless posted.
    cursor: Option<Cursor>,
}

impl LocalTransport {
    /// An agent of this name, with the default options.
    ///
    /// # Errors
    /// As [`LocalTransport::with_options`].
    pub fn new(network: &Network, name: &str) -> Result<Self, TransportError> {
        Self::with_options(network, name, LocalOptions::default())
    }

    /// An agent of this name.
    ///
    /// # Errors
    /// [`TransportError::Start`] when the name is taken or not a plain name.
    pub fn with_options(
        network: &Network,
        name: &str,
        options: LocalOptions,
    ) -> Result<Self, TransportError> {
        let agent = network
            .join(name)
            .map_err(|cause| TransportError::Start { agent: name.into(), cause })?;
        Ok(Self { agent, options, peers: Peers::new(), suspect: Suspicion::default() })
    }

    fn connect_error(&self, peer: &str, cause: Cause) -> TransportError {
        TransportError::Connect { agent: self.agent().into(), peer: peer.into(), cause }
    }

    fn failed(&self, prepared: &LocalReads, cause: Cause) -> TransportError {
        TransportError::Failed {
            agent: self.agent().into(),
            peer: prepared.peer.name.clone(),
            cause,
        }
    }

    fn try_post(prepared: &LocalReads) -> Result<(), Cause> {
        let peer = prepared
            .peer
            .link
            .reach()
            .filter(|_| prepared.peer.is_connected())
            .ok_or(Cause::PeerGone)?;
        for (read, op) in prepared.reads.iter().enumerate() {
            if peer.registry.share(op.from.kind, op.from.address, op.from.len).is_none() {
                return Err(Cause::Deregistered { read });
            }
        }
        Ok(())
    }
}

impl Transport for LocalTransport {
    type Registration = LocalRegistration;
    type Prepared = LocalReads;

    fn backend(&self) -> &'static str {
        "local"
    }

    fn agent(&self) -> &str {
        &self.agent.name
    }

    fn capabilities(&self) -> Capabilities {
        self.options.capabilities
    }

    fn metadata(&self) -> Result<Vec<u8>, TransportError> {
        let blob = self.agent.incarnation.to_le_bytes();
        Ok(envelope::encode(self.backend(), self.agent(), &self.agent.registry.ranges(), &blob))
    }

    fn register(&self, region: &Region) -> Result<LocalRegistration, TransportError> {
        let make = |region: &Region| {
            if region.kind() == MemoryKind::Host { Ok(()) } else { Err(Cause::Kind) }
        };
        self.agent.registry.register(region, make).map(LocalRegistration).map_err(|cause| {
            TransportError::register(self.agent(), region.kind(), region.len(), cause)
        })
    }

    fn deregister(&self, registration: LocalRegistration) -> Result<(), TransportError> {
        self.agent.registry.check_own(self.agent(), &registration.0)
    }

    fn connect(&self, name: &str, metadata: &[u8]) -> Result<Peer, TransportError> {
        let error = |cause| self.connect_error(name, cause);
        if name == self.agent() {
            return Err(error(Cause::Itself));
        }
        let envelope =
            envelope::decode(self.backend(), name, metadata, MAX_METADATA).map_err(error)?;
        let incarnation =
            envelope.blob.try_into().map_err(|_| error(Cause::Metadata { part: "blob" }))?;
        let link = self.agent.network.find(name, u64::from_le_bytes(incarnation)).map_err(error)?;
        match self.peers.get(name) {
            Ok(state) if state.link == link => state.publish(envelope.ranges),
            _ => self.peers.insert(Arc::new(PeerState::new(name, link, envelope.ranges))),
        }
        Ok(Peer { name: name.into() })
    }

    fn disconnect(&self, peer: &Peer) -> Result<(), TransportError> {
        self.peers.remove(&peer.name).map_err(|cause| self.connect_error(&peer.name, cause))
    }

    fn prepare(&self, peer: &Peer, reads: &[ReadOp]) -> Result<LocalReads, TransportError> {
        self.suspect.check(self.agent())?;
        let error = |cause| TransportError::prepare(self.agent(), &peer.name, cause);
        let state = self.peers.get(&peer.name).map_err(error)?;
        check_shapes(reads, &self.options.capabilities).map_err(error)?;
        let published = state.ranges();
        for (read, op) in reads.iter().enumerate() {
            if !published.cover(op.from.kind, op.from.address, op.from.len, |_| {}) {
                let (name, len) = (&peer.name, op.from.len);
                return Err(TransportError::not_registered(name, Side::Remote, read, len));
            }
        }
        let holds = self.agent.registry.hold_targets(&peer.name, reads)?;
        let written = written(&peer.name, reads)?;
        let owner = self.agent.incarnation;
        Ok(LocalReads {
            owner,
            peer: state,
            reads: reads.to_vec(),
            written,
            _holds: holds,
            cursor: None,
        })
    }

    fn written<'a>(&self, prepared: &'a LocalReads) -> &'a [Written] {
        &prepared.written
    }

    fn reads(&self, prepared: &LocalReads) -> usize {
        prepared.reads.len()
    }

    unsafe fn post(&self, prepared: &mut LocalReads) -> Result<Status, TransportError> {
        self.suspect.check(self.agent())?;
        if prepared.owner != self.agent.incarnation {
            return Err(self.failed(prepared, Cause::Foreign));
        }
        if prepared.cursor.is_some() {
            return Err(TransportError::Lost {
                agent: self.agent().into(),
                peer: prepared.peer.name.clone(),
                cause: Cause::State { state: "posted already" },
            });
        }
        Self::try_post(prepared).map_err(|cause| self.failed(prepared, cause))?;
        if prepared.reads.is_empty() {
            return Ok(Status::Done);
        }
        prepared.peer.started();
        prepared.cursor = Some(Cursor::default());
        Ok(Status::Pending)
    }

    fn poll(&self, prepared: &mut LocalReads) -> Result<Status, TransportError> {
        let Some(cursor) = &mut prepared.cursor else {
            return Err(self.failed(prepared, Cause::State { state: "not posted" }));
        };
        let result = match prepared.peer.link.reach() {
            // SAFETY: the batch was posted and has not settled. By the contract of `post` nobody else accesses what
            // it writes; `_holds` keeps that registered and allocated; `prepare` found every read inside it.
            Some(peer) => unsafe {
                cursor.copy(&prepared.reads, &peer.registry, self.options.bytes_per_poll)
            },
            None => Err(Cause::PeerGone),
        };
        match result {
            Ok(Status::Pending) => Ok(Status::Pending),
            done => {
                prepared.cursor = None;
                prepared.peer.settled();
                done.map_err(|cause| self.failed(prepared, cause))
            }
        }
    }

    fn suspect(&self, _prepared: &LocalReads) {
        self.suspect.raise();
    }
}

impl Drop for LocalReads {
    fn drop(&mut self) {
        // Copies happen in `poll` only: a dropped batch is quiet.
        if self.cursor.is_some() {
            self.peer.settled();
        }
    }
}
