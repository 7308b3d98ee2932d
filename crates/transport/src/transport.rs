//! The contract between whoever plans reads and whoever moves bytes.

use std::fmt::Debug;

use refit_planner::{Capabilities, Dims, Transform};
use refit_pool::{MemoryKind, Region};

use crate::{TransportError, Written};

/// A range of this process's registered memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LocalRange {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Where it lives, as this process names it.
    pub kind: MemoryKind,
}

/// A range of a peer's registered memory, as the peer names it. Not interchangeable with a [`LocalRange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RemoteRange {
    /// First address, in the peer's address space.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Where it lives, by the ordinal it has in the *peer's* process.
    pub kind: MemoryKind,
}

/// One read: `run` bytes, repeated as `dims` say, from a peer into local memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadOp {
    /// What is read: the whole extent of the pattern.
    pub from: RemoteRange,
    /// What is written: the whole extent of the pattern.
    pub into: LocalRange,
    /// Bytes of one contiguous run, as it is read.
    pub run: u64,
    /// How the run repeats; only for transports that declare `strided_reads`.
    pub dims: Dims,
    /// What happens to the elements; only for transports that declare `transforms`.
    pub transform: Transform,
    /// Whether a transport that declares `bulk` should use it for this contiguous copy. The others take no notice.
    pub bulk: bool,
}

impl ReadOp {
    /// Bytes of one run as it is written.
    #[must_use]
    pub fn written_run(&self) -> u64 {
        self.transform.target_bytes(self.run)
    }
}

/// A peer this transport can read from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// The peer's agent name.
    pub name: String,
}

/// Where a posted batch of reads stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Some reads may still write local memory.
    Pending,
    /// Every read has arrived; nothing writes local memory any more.
    Done,
}

/// One-sided reads from registered memory of peers into registered memory of ours.
///
/// Everything is polled. No method waits for a peer but [`connect`](Self::connect), which is bounded.
pub trait Transport: Debug + Send + Sync + 'static {
    /// Keeps memory registered until it is given to [`deregister`](Self::deregister) or dropped.
    type Registration: Send + Sync + Debug;
    /// A batch of reads from one peer, validated and built once, posted every cycle.
    ///
    /// It keeps the memory it writes registered, and so allocated, whatever becomes of the [`Registration`]s:
    /// deregistering takes effect when the last batch that needs it is gone. Dropped in flight, it leaks what its
    /// reads may still write.
    ///
    /// [`Registration`]: Self::Registration
    type Prepared: Send + Debug;

    /// The backend's name, for logs and errors.
    fn backend(&self) -> &'static str;

    /// This agent's name, unique among its peers.
    fn agent(&self) -> &str;

    /// What this transport can do; the lowering decides by it.
    fn capabilities(&self) -> Capabilities;

    /// What it can do with this peer, where that is not the same for all of them.
    fn capabilities_of(&self, _peer: &Peer) -> Capabilities {
        self.capabilities()
    }

    /// How bytes come from this peer, and why that way, for people to read.
    fn route(&self, _peer: &Peer) -> String {
        self.backend().to_owned()
    }

    /// What a peer needs to know to read from this agent. Changes with every registration.
    ///
    /// # Errors
    /// [`TransportError`] when the backend cannot describe itself.
    fn metadata(&self) -> Result<Vec<u8>, TransportError>;

    /// Makes memory readable by peers and writable by reads.
    ///
    /// A region inside one that is registered shares its registration.
    ///
    /// # Errors
    /// [`TransportError::Register`] when the backend refuses, or the region crosses the border of another one.
    fn register(&self, region: &Region) -> Result<Self::Registration, TransportError>;

    /// Undoes a registration and says whether that worked, which a drop cannot.
    ///
    /// This does not stop peers that are reading: their reads fail where hardware checks them, and where they are
    /// emulated (UCX over TCP) this process goes on reading for them and crashes if the memory is freed. Whoever
    /// publishes memory keeps it until every reader is done with it, or is known to be gone.
    ///
    /// # Errors
    /// [`TransportError::Register`] when the backend refuses; the registration is gone all the same.
    fn deregister(&self, registration: Self::Registration) -> Result<(), TransportError>;

    /// Makes the peer that published `metadata` under `name` known, and pays what the first transfer would pay.
    ///
    /// Connecting again, with the metadata that the peer published after it registered more, replaces what is known
    /// of its memory; batches prepared before stay good.
    ///
    /// # Errors
    /// [`TransportError::Connect`] when the metadata is not that peer's or the peer cannot be reached.
    fn connect(&self, name: &str, metadata: &[u8]) -> Result<Peer, TransportError>;

    /// Forgets a peer. Prepared reads from it become errors.
    ///
    /// # Errors
    /// [`TransportError::Connect`] when the peer is not known, or reads from it have not settled.
    fn disconnect(&self, peer: &Peer) -> Result<(), TransportError>;

    /// Validates and builds reads from one peer.
    ///
    /// # Errors
    /// [`TransportError::NotRegistered`] for ranges outside registrations on either side, as far as this side can
    /// tell, [`TransportError::Overlap`] when two reads write the same byte, [`TransportError::Prepare`] otherwise.
    fn prepare(&self, peer: &Peer, reads: &[ReadOp]) -> Result<Self::Prepared, TransportError>;

    /// What a batch writes: patterns that share no byte, sorted by kind and address, contiguous ones joined where they
    /// touch.
    fn written<'a>(&self, prepared: &'a Self::Prepared) -> &'a [Written];

    /// How many reads a batch posts.
    fn reads(&self, prepared: &Self::Prepared) -> usize;

    /// Starts every read of the batch. Called by [`Pull`](crate::Pull) only.
    ///
    /// # Errors
    /// [`TransportError::Lost`] when reads were started that cannot be watched: what is promised below is then owed
    /// for ever. After any other error nothing is under way.
    ///
    /// # Safety
    /// From this call until it or [`poll`](Self::poll) returns something other than [`Status::Pending`], nobody
    /// accesses the memory that the batch writes.
    unsafe fn post(&self, prepared: &mut Self::Prepared) -> Result<Status, TransportError>;

    /// Starts several batches, in their order, and ends with the first that fails. One answer for each that was tried.
    ///
    /// # Safety
    /// As [`post`](Self::post), for every one of them. No two of them write the same byte.
    unsafe fn post_all(
        &self,
        batches: &mut [Self::Prepared],
    ) -> Vec<Result<Status, TransportError>> {
        let mut answers = Vec::with_capacity(batches.len());
        for batch in batches {
            // SAFETY: the caller's promise.
            answers.push(unsafe { self.post(batch) });
            if matches!(answers.last(), Some(Err(_))) {
                break;
            }
        }
        answers
    }

    /// Asks where a posted batch stands, and moves it on.
    ///
    /// # Errors
    /// [`TransportError::Lost`] when it can no longer be seen whether the reads write local memory; they may, for
    /// ever. [`TransportError::Failed`] when the batch failed *and has settled*.
    fn poll(&self, prepared: &mut Self::Prepared) -> Result<Status, TransportError>;

    /// Told when a batch was abandoned before it settled. From then on the agent takes no new reads:
    /// [`prepare`](Self::prepare) and [`post`](Self::post) return [`TransportError::Suspect`].
    fn suspect(&self, prepared: &Self::Prepared);

    /// Polls the reads that the transport posted for itself, to set a connection up, and gave up waiting for; says how
    /// many have not settled. A transport is not to be dropped before there are none: it would leak itself.
    fn unsettled(&self) -> usize {
        0
    }
}
