use std::time::Duration;

use refit_planner::{LayoutError, LowerError, PackError, PlanError};
use refit_pool::{CarveError, LeaseError, PoolError};
use refit_translate::host::LandError;
use refit_transport::TransportError;

use crate::digest::DigestRequestError;
use crate::header::{Incarnation, Stamp};
use crate::publication::PublicationError;

/// What can go wrong in a refit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RefitError {
    /// The layouts of the source ranks contradict each other.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The sides cannot be joined.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The plan cannot be executed by this transport under these options.
    #[error(transparent)]
    Lower(#[from] LowerError),
    /// Boxes cannot be asked for or packed.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// The slots that were asked for take more memory than the source may give.
    #[error(
        "source rank {rank}: the slots asked for take {bytes} bytes, more than the {budget} it may give; \
         raise the budget, or go on without packing"
    )]
    SlotBudget {
        /// The rank.
        rank: u32,
        /// Bytes of the slots.
        bytes: u64,
        /// Bytes it may give.
        budget: u64,
    },
    /// The parameters were written while they were read. Nothing of them may be used.
    #[error(
        "source rank {rank}: its parameters changed while they were read: {} was to be read, and it holds {found}; \
         pull again",
        expected.map_or_else(|| "what is not being written".to_owned(), |stamp| stamp.to_string())
    )]
    Torn {
        /// The source rank.
        rank: u32,
        /// What was to be read; nothing where that was for the header to say.
        expected: Option<Stamp>,
        /// What its header says, as far as it can be read.
        found: Stamp,
    },
    /// A source is not the one that was announced or has published: it has restarted.
    #[error(
        "source rank {rank} is not the one it was: incarnation {expected} was to be read, {found} is there; \
         take its new publication"
    )]
    StaleIncarnation {
        /// The source rank.
        rank: u32,
        /// The incarnation that was to be read.
        expected: Incarnation,
        /// The incarnation found.
        found: Incarnation,
    },
    /// There is no header where one was published: the source has gone, and its memory is somebody else's.
    #[error(
        "source rank {rank} has no version header where it published one: its memory is another's by now; wait for it \
         to publish anew"
    )]
    NoHeader {
        /// The source rank.
        rank: u32,
    },
    /// Source ranks hold different versions.
    #[error(
        "source rank {rank} holds version {version} while rank {other} holds {other_version}; wait until all of them \
         hold one"
    )]
    MixedVersions {
        /// A source rank.
        rank: u32,
        /// Its version.
        version: u64,
        /// Another one.
        other: u32,
        /// Its version.
        other_version: u64,
    },
    /// A rank is read of which nothing is expected, or that is expected twice.
    #[error(
        "what to expect of source rank {rank} was said {times} times; say it once for every rank of the publications"
    )]
    NotExpected {
        /// The source rank.
        rank: u32,
        /// How often it was said.
        times: usize,
    },
    /// What has landed is not what the source holds.
    #[error(
        "bytes {start} to {end} of `{param}` are not {}: they were changed on the way or landed elsewhere; pull again, \
         and look for failing hardware if it comes again",
        rank.map_or_else(|| "zero, as they have to be".to_owned(), |rank| format!("those of source rank {rank}"))
    )]
    Corrupt {
        /// The source rank that they are of; nothing where zeros were due.
        rank: Option<u32>,
        /// The target's parameter.
        param: String,
        /// The first byte of the segment that differs.
        start: u64,
        /// One past its last.
        end: u64,
    },
    /// No answer of a rank that was read from.
    #[error(
        "source rank {rank} has not answered the request for digests; wait for every rank that it asks"
    )]
    NoDigests {
        /// The rank.
        rank: u32,
    },
    /// An answer to another request.
    #[error(
        "source rank {rank} has answered another request for digests than this plan's; ask again after every change of \
         plans"
    )]
    OtherDigests {
        /// The rank.
        rank: u32,
    },
    /// A request for digests of bytes that a parameter does not have.
    #[error(
        "source rank {rank} was asked for digests of bytes beyond the {bytes} of `{param}`; plan anew with its present publication"
    )]
    AskedOutside {
        /// The rank.
        rank: u32,
        /// The parameter.
        param: String,
        /// Its bytes.
        bytes: u64,
    },
    /// A request for digests of more bytes than any plan reads.
    #[error(
        "source rank {rank} was asked for digests of more than {most} bytes, which no plan reads; run one release on both sides"
    )]
    AskedTooMuch {
        /// The rank.
        rank: u32,
        /// Most bytes that it hashes for a request.
        most: u64,
    },
    /// Parameters that are being written have no digests.
    #[error("source rank {rank} is being updated; ask for digests after the commit")]
    BeingWritten {
        /// The rank.
        rank: u32,
    },
    /// A target that holds no version cannot be a source of one.
    #[error(
        "this target holds no version that was refitted as a whole and left as it was; refit it before lending it"
    )]
    NothingInstalled,
    /// None of a target's parameters is as its sources held it.
    #[error(
        "none of the {params} parameters of this target is what the trainer holds, byte for byte: all are converted on \
         the way; its peers have to read from the trainer"
    )]
    NothingToLend {
        /// Parameters of the target.
        params: usize,
    },
    /// More changes than there are epochs.
    #[error("source rank {rank} has used all of its epochs; make a new source of its parameters")]
    Epochs {
        /// The source rank.
        rank: u32,
    },
    /// The parameters were changed, and the slots do not hold the change.
    #[error(
        "source rank {rank}: the slots are older than the parameters; repack before publishing"
    )]
    StaleSlots {
        /// The rank.
        rank: u32,
    },
    /// Memory could not be had.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// An arena could not be cut into parameters.
    #[error(transparent)]
    Carve(#[from] CarveError),
    /// The transport refused or failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// Landing copies do not fit the memory.
    #[error(transparent)]
    Land(#[from] LandError),
    /// A publication is not one.
    #[error(transparent)]
    Publication(#[from] PublicationError),
    /// A request for digests is not one.
    #[error(transparent)]
    DigestRequest(#[from] DigestRequestError),
    /// Memory and layout disagree.
    #[error(
        "rank {rank}: parameter `{param}` has {memory} bytes of memory but its layout says {layout}; \
         is it the tensor the layout was made from?"
    )]
    Size {
        /// The rank.
        rank: u32,
        /// The parameter.
        param: String,
        /// Bytes of memory given.
        memory: u64,
        /// Bytes the layout says.
        layout: u64,
    },
    /// A parameter of the layout has no memory.
    #[error(
        "rank {rank}: no memory was given for parameter `{param}`; give one for each that the layout lists"
    )]
    NoMemory {
        /// The rank.
        rank: u32,
        /// The parameter.
        param: String,
    },
    /// Memory was given for a name the layout does not have, or twice.
    #[error(
        "rank {rank}: memory was given for `{param}`, which the layout does not have or which was given already; \
         leave it out"
    )]
    StrayMemory {
        /// The rank.
        rank: u32,
        /// The name.
        param: String,
    },
    /// A plan reads from a rank whose publication is not there.
    #[error("source rank {rank} has not published; wait for every rank before preparing")]
    MissingPublication {
        /// The rank.
        rank: u32,
    },
    /// A plan reads a parameter that the publication does not have.
    #[error(
        "source rank {rank} does not publish `{param}`, which the plan reads; plan anew with its present publication"
    )]
    UnknownSourceParam {
        /// The rank.
        rank: u32,
        /// The parameter.
        param: String,
    },
    /// A read would leave registered memory.
    #[error(
        "a read of {len} bytes from source rank {rank} would leave the registered memory of the {side}; register whole \
         allocations before publishing"
    )]
    NotRegistered {
        /// The rank that is read.
        rank: u32,
        /// Bytes of the read, as they lie on that side.
        len: u64,
        /// `source` or `target`.
        side: &'static str,
    },
    /// The program stages bytes but no staging memory was leased.
    #[error("the program stages bytes but its lease has no staging memory; please report this")]
    NoStaging,
    /// Landing needs memory that the processor can write, or a device that does it.
    #[error(
        "`{param}` is not in host memory, and bytes have to be landed in it; give the target a lander of its device \
         (`Target::with_device`, feature `cuda`)"
    )]
    NotHost {
        /// The parameter.
        param: String,
    },
    /// A device could not land.
    #[error("the device that lands failed: {source}; start this worker anew if it keeps happening")]
    Device {
        /// What it says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Reads did not settle in time. Nothing was freed; the pull can be waited on again.
    #[error(
        "reads {}into agent `{agent}` have not settled after {waited:?}; their memory stays reserved until they do: \
         wait again, or have the silent peer ended, which settles them",
        from_ranks(ranks)
    )]
    Deadline {
        /// The source ranks whose reads are out; none where all have settled and were given up.
        ranks: Vec<u32>,
        /// The agent that reads.
        agent: String,
        /// How long the pull has been waited on.
        waited: Duration,
    },
    /// A batch of reads would write memory that the target does not hold: an error of this project.
    #[error(
        "batch {batch} of reads would write {len} bytes that the target does not hold; please report this"
    )]
    NotOwned {
        /// Number of the batch.
        batch: usize,
        /// Bytes of the range outside.
        len: u64,
    },
    /// Two batches of reads would write the same byte: an error of this project.
    #[error("batches {first} and {second} of reads would write the same bytes; please report this")]
    Overlap {
        /// Number of a batch.
        first: usize,
        /// Number of another.
        second: usize,
    },
    /// Something newer than this release.
    #[error("{what}; both sides must run the same release")]
    Unsupported {
        /// What it is.
        what: &'static str,
    },
}

fn from_ranks(ranks: &[u32]) -> String {
    if ranks.is_empty() { String::new() } else { format!("from source ranks {ranks:?} ") }
}

impl RefitError {
    #[cfg(feature = "cuda")]
    pub(crate) fn device(source: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Device { source: Box::new(source) }
    }

    /// A failed lease is either the pool's error or the one its build ran into.
    pub(crate) fn from_lease(error: LeaseError<Self>) -> Self {
        match error {
            LeaseError::Pool(error) => Self::Pool(error),
            LeaseError::Build(error) => error,
            _ => Self::Unsupported { what: "a pool error that this release does not know" },
        }
    }
}
