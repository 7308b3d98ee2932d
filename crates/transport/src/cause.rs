use refit_planner::Transform;

/// What was wrong, below the operation that a [`TransportError`](crate::TransportError) names.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// A call of the backend failed.
    #[error("{call} answered `{status}`")]
    Call {
        /// The backend's function.
        call: &'static str,
        /// Its answer.
        status: String,
    },
    /// A call of the backend failed while it read from a peer.
    #[error(
        "{call} answered `{status}`: most likely the peer has ended, and if so connect to its next incarnation and \
         prepare again"
    )]
    Connection {
        /// The backend's function.
        call: &'static str,
        /// Its answer.
        status: String,
    },
    /// A name that backends or logs could not carry.
    #[error("agent names are 1 to {max} characters of A-Z a-z 0-9 . _ -")]
    Name {
        /// Most characters.
        max: usize,
    },
    /// An agent of that name exists.
    #[error("the name is taken; names are never reused, add an incarnation")]
    NameTaken,
    /// A backend parameter that would break what this crate relies on.
    #[error(
        "parameter `{key}` is not taken: reads are told finished by the order of one worker's requests"
    )]
    Parameter {
        /// The parameter.
        key: String,
    },
    /// UCX may not take the ways to a peer that it would.
    #[cfg(feature = "nixl")]
    #[error(transparent)]
    Lanes(Box<crate::nixl::LaneError>),
    /// Metadata of an agent that nobody is to read from.
    #[error(
        "the agent only reads and publishes nothing; make one that does (`NixlOptions::with_publishing`) if others are to \
         read from it"
    )]
    Unpublished,
    /// The metadata is another agent's, or another backend's.
    #[error("the metadata was published by `{found}`; ask the rendezvous for fresh metadata")]
    Published {
        /// Agent and backend that published it.
        found: String,
    },
    /// The metadata is truncated, damaged or not metadata at all.
    #[error("the metadata is damaged or was written by another version ({part}); publish it again")]
    Metadata {
        /// The part that could not be read.
        part: &'static str,
    },
    /// Larger than this side is willing to read.
    #[error("{len} bytes of metadata, at most {max} are read; register fewer, larger regions")]
    TooLarge {
        /// Bytes.
        len: usize,
        /// Most bytes.
        max: usize,
    },
    /// Nobody of that name is connected.
    #[error("the peer is not connected; connect to it first")]
    UnknownPeer,
    /// An agent was asked to read from itself.
    #[error("an agent cannot be its own peer; give source and target agents of their own")]
    Itself,
    /// The peer was connected once and is gone.
    #[error("the peer is gone; connect to its next incarnation and prepare again")]
    PeerGone,
    /// The peer deregistered memory that is read.
    #[error(
        "read {read} reads memory that the peer has deregistered; prepare again from fresh metadata"
    )]
    Deregistered {
        /// Index of the read.
        read: usize,
    },
    /// Reads from this peer have not settled.
    #[error("{batches} batches of reads from it have not settled; wait for them first")]
    InFlight {
        /// How many.
        batches: usize,
    },
    /// No answer in time.
    #[error(
        "no answer within {millis} ms; is the peer alive, and reachable over the transports in use?"
    )]
    Silent {
        /// How long it was waited for.
        millis: u64,
    },
    /// A region or read without bytes.
    #[error("it has no bytes; leave empty ones out")]
    Empty,
    /// A range that runs over the end of the address space.
    #[error("the range leaves the address space; ask for fresh metadata")]
    Wraps,
    /// A region that crosses the border of another registration.
    #[error(
        "it crosses the border of memory that is registered already; register whole allocations, once"
    )]
    RegisteredInPart,
    /// Memory this backend does not handle.
    #[error("this backend does not handle that kind of memory; give it to one that does")]
    Kind,
    /// Strided reads on a transport that does not declare them.
    #[error(
        "read {read} is strided, this transport reads contiguous runs only; lower with its capabilities"
    )]
    Strided {
        /// Index of the read.
        read: usize,
    },
    /// A cast or map on a transport that does not declare them.
    #[error(
        "read {read} is to change elements on their way ({transform:?}), this transport copies only; lower with its \
         capabilities"
    )]
    Transform {
        /// Index of the read.
        read: usize,
        /// What is to happen.
        transform: Transform,
    },
    /// A run that is not made of whole elements.
    #[error(
        "read {read} has runs of {len} bytes, no whole elements for {transform:?}; please report this"
    )]
    Elements {
        /// Index of the read.
        read: usize,
        /// Bytes of a run.
        len: u64,
        /// What is to happen to the elements.
        transform: Transform,
    },
    /// Lengths of a read that disagree.
    #[error(
        "read {read} says {len} bytes on the {side} side, its runs span {extent}; please report this"
    )]
    Extent {
        /// Index of the read.
        read: usize,
        /// Which of its two ranges.
        side: crate::Side,
        /// Bytes it says.
        len: u64,
        /// Bytes its runs span.
        extent: u64,
    },
    /// More reads than a batch can hold.
    #[error(
        "{reads} reads in one batch, at most {max} are taken; lower with this transport's capabilities"
    )]
    TooMany {
        /// Reads in the batch.
        reads: usize,
        /// Most reads.
        max: u64,
    },
    /// A batch built by another agent.
    #[error("it was made by another agent; use it with the agent that made it")]
    Foreign,
    /// A batch in the wrong state for the call.
    #[error("the batch is {state}; post it once, and poll it until it has settled")]
    State {
        /// Its state.
        state: &'static str,
    },
    /// CUDA refused.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] refit_pool::cuda::CudaError),
    /// An agent of another host, where GPUs' memory would have to be mapped.
    #[error(
        "the peer is on another host, and GPUs map one another's memory within one host only; read from it over NIXL"
    )]
    OtherHost,
    /// Devices without a path between them.
    #[error(
        "our GPU cannot access the memory of the peer's (no NVLink, and no peer access over the bus); read from it \
         over NIXL"
    )]
    NoAccess,
    /// Memory that other processes cannot map.
    #[error(
        "other processes cannot map this memory ({call} answered `{status}`): allocate it with cudaMalloc, for torch \
         without `expandable_segments:True` and `backend:cudaMallocAsync` in PYTORCH_CUDA_ALLOC_CONF"
    )]
    NotExportable {
        /// The driver's function.
        call: &'static str,
        /// Its answer.
        status: String,
    },
    /// Memory of a peer that cannot be mapped here.
    #[error(
        "the peer's memory cannot be mapped ({call} answered `{status}`): either it has been freed and fresh metadata \
         is needed, or the two processes run in containers that are kept apart (share their IPC and process \
         namespaces), or it is to be read over NIXL"
    )]
    NotMappable {
        /// The driver's function.
        call: &'static str,
        /// Its answer.
        status: String,
    },
    /// Memory that is mapped, and smaller than the peer said.
    #[error("the peer's allocation has {found} bytes here and {len} there; ask for fresh metadata")]
    Shrunk {
        /// Bytes that the peer published.
        len: u64,
        /// Bytes that were mapped.
        found: u64,
    },
    /// Memory of another device than the agent's.
    #[error("the agent serves CUDA device {agent}; give memory of others to agents of theirs")]
    Device {
        /// The agent's device.
        agent: u32,
    },
    /// A read that is cut where two allocations meet, within an element that is to be changed.
    #[error(
        "read {read} has an element that lies in two allocations; align what is published to its elements"
    )]
    Divided {
        /// Index of the read.
        read: usize,
    },
    /// Several backends, and none that reaches the peer.
    #[error("no way to the peer: {why}")]
    NoRoute {
        /// What each of them says.
        why: String,
    },
    /// A call into the backend panicked.
    #[error("{call} panicked; start this worker anew, and report this")]
    Panicked {
        /// The backend's function.
        call: &'static str,
    },
}

#[cfg(feature = "nixl")]
impl From<crate::nixl::LaneError> for Cause {
    fn from(error: crate::nixl::LaneError) -> Self {
        Self::Lanes(Box::new(error))
    }
}
