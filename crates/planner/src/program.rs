//! What a target does in one refit: wave after wave of reads and the landing copies of what they brought, then fills.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::{Dims, Fill, Hash, SourceParam, TargetParam, Transform};

/// Where the bytes of a read arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Destination {
    /// In a live parameter, at their final place.
    Live {
        /// Index into [`Program::targets`].
        target: u32,
        /// Byte offset in the parameter.
        offset: u64,
    },
    /// In the staging area, which waves use in turn.
    Staging {
        /// Byte offset in the staging area.
        offset: u64,
    },
}

/// One one-sided read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// Index into [`Program::sources`].
    pub source: u32,
    /// Byte offset in the source parameter.
    pub offset: u64,
    /// Where the bytes go.
    pub destination: Destination,
    /// Bytes of one contiguous run.
    pub run: u64,
    /// How the run repeats: never, unless the transport declared `strided_reads`.
    pub dims: Dims,
    /// What happens to the elements: nothing, unless the transport declared `transforms`.
    pub transform: Transform,
    /// Whether the transport's second way is the cheaper one for this contiguous copy.
    pub bulk: bool,
    /// Bytes behind it, in the source's memory and in staging alike, that nobody needs and that may be read along: where
    /// they have come to an end begins the next read of the wave from the same rank, and the two can be one. 0 in all but
    /// [`Method::Gathered`].
    pub gap: u64,
}

impl Read {
    /// Bytes that cross the wire, the gap behind them apart.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.run.saturating_mul(self.dims.runs())
    }
}

/// A strided copy from staging to a live parameter, converting elements on the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Landing {
    /// Byte offset of the first run in staging.
    pub staging_offset: u64,
    /// Index into [`Program::targets`].
    pub target: u32,
    /// Byte offset of the first run in the parameter.
    pub offset: u64,
    /// Bytes of one run in staging.
    pub run: u64,
    /// How the run repeats; source strides count in staging.
    pub dims: Dims,
    /// What happens to the elements.
    pub transform: Transform,
}

/// The form in which one target parameter gets its bytes from one source parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Method {
    /// Every run is read to its final place.
    Direct,
    /// The spanned source range is read whole into staging, then copied to its place locally.
    Span,
    /// Exactly the needed runs are read into staging, densely, then copied to their place locally.
    Packed,
    /// The bytes are read into staging together with those of parameters beside it in the source's memory, then copied to
    /// their place locally.
    Gathered,
}

/// A choice the lowering made, with what it expects it to cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Index into [`Program::sources`].
    pub source: u32,
    /// Index into [`Program::targets`].
    pub target: u32,
    /// The form chosen.
    pub method: Method,
    /// Reads it takes.
    pub reads: u64,
    /// Bytes it moves over the wire, gaps to neighbours apart.
    pub wire_bytes: u64,
    /// Bytes of them that are needed.
    pub needed_bytes: u64,
    /// Expected cost in nanoseconds, landing included.
    pub cost_ns: u64,
}

/// Reads that are posted together, and the landing copies to run when all of them have settled. They must be over before
/// the reads of the wave [`Program::slots`] further on are posted: those use the same staging memory.
///
/// Reads into live parameters are all in the last wave, which stages and lands nothing: what
/// was staged before is landed while they are under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wave<'a> {
    /// Grouped by source rank. No two of them write the same byte.
    pub reads: &'a [Read],
    /// Sorted by target. No two of them write the same byte, nor one that a read writes.
    pub landings: &'a [Landing],
}

/// A plan in the form a transport executes. Offsets only: addresses enter when it is bound to registered regions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    pub(crate) hash: Hash,
    pub(crate) plan_hash: Hash,
    pub(crate) sources: Arc<[SourceParam]>,
    pub(crate) targets: Arc<[TargetParam]>,
    pub(crate) reads: Vec<Read>,
    pub(crate) landings: Vec<Landing>,
    /// Where each wave ends among the reads and among the landings. Never empty.
    pub(crate) waves: Vec<(usize, usize)>,
    /// At least 1.
    pub(crate) slots: usize,
    pub(crate) fills: Vec<Fill>,
    pub(crate) choices: Vec<Choice>,
    pub(crate) staging_bytes: u64,
    pub(crate) wire_bytes: u64,
    pub(crate) needed_bytes: u64,
}

impl Program {
    /// Digest of the plan together with the choices made: the key for memory and prepared reads.
    #[must_use]
    pub fn hash(&self) -> Hash {
        self.hash
    }

    /// Digest of the plan this came from.
    #[must_use]
    pub fn plan_hash(&self) -> Hash {
        self.plan_hash
    }

    /// The source parameters read.
    #[must_use]
    pub fn sources(&self) -> &Arc<[SourceParam]> {
        &self.sources
    }

    /// The target parameters written.
    #[must_use]
    pub fn targets(&self) -> &Arc<[TargetParam]> {
        &self.targets
    }

    /// The waves, in the order in which they have to run; at least one.
    pub fn waves(&self) -> impl ExactSizeIterator<Item = Wave<'_>> {
        (0..self.waves.len()).map(|index| self.wave(index))
    }

    /// How many waves have staging memory of their own: wave `n` uses that of wave `n - slots`. At least 1, and no more
    /// than there are waves that stage, unless none does.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// One wave.
    ///
    /// # Panics
    /// When there are not so many.
    #[must_use]
    pub fn wave(&self, index: usize) -> Wave<'_> {
        let (reads, landings) = self.waves[index];
        let (first_read, first_landing) =
            index.checked_sub(1).map_or((0, 0), |before| self.waves[before]);
        Wave {
            reads: &self.reads[first_read..reads],
            landings: &self.landings[first_landing..landings],
        }
    }

    /// The reads of all waves, one wave after the other.
    #[must_use]
    pub fn reads(&self) -> &[Read] {
        &self.reads
    }

    /// The landing copies of all waves, one wave after the other.
    #[must_use]
    pub fn landings(&self) -> &[Landing] {
        &self.landings
    }

    /// The fills, sorted by target; they depend on nothing.
    #[must_use]
    pub fn fills(&self) -> &[Fill] {
        &self.fills
    }

    /// The choices made, by target and source parameter.
    #[must_use]
    pub fn choices(&self) -> &[Choice] {
        &self.choices
    }

    /// Bytes of staging memory: what the largest wave stages, for every slot.
    #[must_use]
    pub fn staging_bytes(&self) -> u64 {
        self.staging_bytes
    }

    /// Bytes that cross the wire, gaps included.
    #[must_use]
    pub fn wire_bytes(&self) -> u64 {
        self.wire_bytes
    }

    /// Bytes of them that the target needs: `wire_bytes / needed_bytes` is the amplification.
    #[must_use]
    pub fn needed_bytes(&self) -> u64 {
        self.needed_bytes
    }
}
