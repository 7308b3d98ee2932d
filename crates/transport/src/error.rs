use refit_pool::MemoryKind;

use crate::cause::Cause;

/// Which side of a read a range belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Memory of this process, which the read writes.
    Local,
    /// Memory of the peer, which the read reads.
    Remote,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Remote => "remote",
        })
    }
}

/// Why a transport refused or failed. Names agents, lengths and positions, never addresses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The backend cannot be used in this process at all.
    #[cfg(feature = "nixl")]
    #[error(transparent)]
    Unavailable(#[from] crate::nixl::NixlUnavailable),
    /// The agent could not be made.
    #[error("agent `{agent}` cannot be started: {cause}")]
    Start {
        /// The agent's name, or the prefix it would have had.
        agent: String,
        /// What went wrong.
        #[source]
        cause: Cause,
    },
    /// Memory could not be registered or deregistered.
    #[error("agent `{agent}` cannot register or deregister {len} bytes of {kind}: {cause}")]
    Register {
        /// This agent.
        agent: String,
        /// Bytes of the region.
        len: u64,
        /// Where it lives.
        kind: MemoryKind,
        /// What went wrong.
        #[source]
        cause: Cause,
    },
    /// A peer could not be made known, described or forgotten.
    #[error("agent `{agent}` cannot connect to or disconnect from `{peer}`: {cause}")]
    Connect {
        /// This agent.
        agent: String,
        /// The peer.
        peer: String,
        /// What went wrong.
        #[source]
        cause: Cause,
    },
    /// A read leaves registered memory.
    #[error(
        "read {read} from `{peer}`: {len} bytes on the {side} side are not registered memory; register the whole \
         allocation, and on the remote side publish the metadata again after registering"
    )]
    NotRegistered {
        /// The peer of the read.
        peer: String,
        /// Index of the read in its batch.
        read: usize,
        /// Which of its two ranges.
        side: Side,
        /// Bytes of the range.
        len: u64,
    },
    /// Two reads write the same byte.
    #[error(
        "reads {first} and {second} from `{peer}` write the same bytes; destinations must be disjoint"
    )]
    Overlap {
        /// The peer of the reads.
        peer: String,
        /// Index of a read.
        first: usize,
        /// Index of another, or the same one if it overlaps itself.
        second: usize,
    },
    /// A batch could not be built.
    #[error("agent `{agent}` cannot prepare reads from `{peer}`: {cause}")]
    Prepare {
        /// This agent.
        agent: String,
        /// The peer.
        peer: String,
        /// What went wrong.
        #[source]
        cause: Cause,
    },
    /// A batch failed and has settled: nothing writes local memory any more, it may be used again.
    #[error("reads from `{peer}` into agent `{agent}` failed: {cause}")]
    Failed {
        /// This agent.
        agent: String,
        /// The peer.
        peer: String,
        /// What went wrong.
        #[source]
        cause: Cause,
    },
    /// A batch failed in a way that leaves open whether it still writes local memory, for good.
    #[error(
        "reads from `{peer}` into agent `{agent}` were lost: {cause}; the memory they write stays quarantined until \
         this process ends"
    )]
    Lost {
        /// This agent.
        agent: String,
        /// The peer.
        peer: String,
        /// What went wrong.
        #[source]
        cause: Cause,
    },
    /// The agent abandoned reads that had not settled, and takes no new ones.
    #[error(
        "agent `{agent}` abandoned reads that had not settled; make a new agent and connect again"
    )]
    Suspect {
        /// This agent.
        agent: String,
    },
}

impl TransportError {
    pub(crate) fn register(agent: &str, kind: MemoryKind, len: u64, cause: Cause) -> Self {
        Self::Register { agent: agent.into(), len, kind, cause }
    }

    pub(crate) fn prepare(agent: &str, peer: &str, cause: Cause) -> Self {
        Self::Prepare { agent: agent.into(), peer: peer.into(), cause }
    }

    pub(crate) fn not_registered(peer: &str, side: Side, read: usize, len: u64) -> Self {
        Self::NotRegistered { peer: peer.into(), read, side, len }
    }

    /// Whether local memory is quiet after this error. Only [`Lost`](Self::Lost) leaves that open.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        !matches!(self, Self::Lost { .. })
    }
}
