//! What processes tell each other through the rendezvous: small values of plain data, each in one format and one spelling.
//!
//! Whoever reads one trusts nothing in it: its size is bounded before anything is allocated, its kind and format are named
//! in its first bytes, every field is checked, and bytes that are not exactly what [`Message::encode`] writes are refused.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

mod announcement;
mod answer;
mod codec;
mod decision;
mod member;
mod rank_state;
mod reader_lease;
mod wish;

pub use self::announcement::{Announcement, Offering};
pub use self::answer::Answer;
pub use self::decision::{Decision, Outcome, Standing};
pub use self::member::Member;
pub use self::rank_state::{Health, Prepared, RankState};
pub use self::reader_lease::ReaderLease;
pub use self::wish::Wish;

/// Most ranks of a group or a replica.
pub const MAX_RANKS: u32 = 1 << 16;

/// The longest lease: an hour.
pub const MAX_LEASE_MILLIS: u32 = 3_600_000;

/// A value of the rendezvous.
pub trait Message: Sized {
    /// Its kind.
    const KIND: Kind;

    /// The bytes that travel: magic, format, body.
    fn encode(&self) -> Vec<u8>;

    /// Reads what [`encode`](Self::encode) wrote and checks all of it. Takes at most 96 bytes of memory for every byte
    /// given, and 4 KiB.
    ///
    /// # Errors
    /// [`MessageError`].
    fn decode(bytes: &[u8]) -> Result<Self, MessageError>;
}

/// The kinds of messages. [`Kind::ALL`] is the one list of them: suites that try all kinds go through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// [`Member`].
    Member,
    /// [`Announcement`].
    Announcement,
    /// [`ReaderLease`].
    ReaderLease,
    /// [`RankState`].
    RankState,
    /// [`Decision`].
    Decision,
    /// [`Wish`].
    Wish,
    /// [`Answer`].
    Answer,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 7] = [
        Self::Member,
        Self::Announcement,
        Self::ReaderLease,
        Self::RankState,
        Self::Decision,
        Self::Wish,
        Self::Answer,
    ];

    /// What errors call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Member => "member",
            Self::Announcement => "announcement",
            Self::ReaderLease => "reader lease",
            Self::RankState => "rank state",
            Self::Decision => "decision",
            Self::Wish => "wish",
            Self::Answer => "answer",
        }
    }

    /// Its first bytes: name and format version. A change of a format must change them.
    #[must_use]
    pub fn magic(self) -> &'static [u8; 8] {
        match self {
            Self::Member => b"refit\0m1",
            Self::Announcement => b"refit\0a1",
            Self::ReaderLease => b"refit\0l1",
            Self::RankState => b"refit\0s1",
            Self::Decision => b"refit\0c1",
            Self::Wish => b"refit\0w1",
            Self::Answer => b"refit\0g1",
        }
    }

    /// No honest message of this kind is larger.
    #[must_use]
    pub fn max_bytes(self) -> usize {
        match self {
            Self::Wish => refit::MAX_REQUEST_BYTES + refit::MAX_DIGEST_REQUEST_BYTES + 64,
            // A million segments.
            Self::Answer => 16 << 20,
            Self::Member
            | Self::Announcement
            | Self::ReaderLease
            | Self::RankState
            | Self::Decision => 128,
        }
    }

    /// Reads a message of this kind and writes it again. Gives back the same bytes or an error, whatever it is given: what
    /// a suite over all kinds asserts.
    ///
    /// # Errors
    /// [`MessageError`], as [`Message::decode`].
    pub fn recode(self, bytes: &[u8]) -> Result<Vec<u8>, MessageError> {
        fn again<M: Message>(bytes: &[u8]) -> Result<Vec<u8>, MessageError> {
            M::decode(bytes).map(|message| message.encode())
        }
        match self {
            Self::Member => again::<Member>(bytes),
            Self::Announcement => again::<Announcement>(bytes),
            Self::ReaderLease => again::<ReaderLease>(bytes),
            Self::RankState => again::<RankState>(bytes),
            Self::Decision => again::<Decision>(bytes),
            Self::Wish => again::<Wish>(bytes),
            Self::Answer => again::<Answer>(bytes),
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Why bytes are not a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// Too short, or another kind, or of another format version.
    #[error(
        "not a {kind} of this format version: the first bytes differ; all processes must run the same release"
    )]
    Magic {
        /// What was expected.
        kind: Kind,
    },
    /// Larger than any message of its kind.
    #[error("{bytes} bytes are more than a {kind} may have ({most})")]
    TooLarge {
        /// What was expected.
        kind: Kind,
        /// Bytes given.
        bytes: usize,
        /// Most bytes.
        most: usize,
    },
    /// The body does not decode.
    #[error("the {kind} does not decode: {reason}; write it again")]
    Malformed {
        /// What was expected.
        kind: Kind,
        /// What the decoder says.
        reason: String,
    },
    /// The body decodes, and encodes to other bytes: there is one spelling only.
    #[error("the {kind} is not written in the one way there is")]
    Spelling {
        /// What was expected.
        kind: Kind,
    },
    /// A rank that its group or replica does not have, or a number of ranks that none has.
    #[error(
        "the {kind} is of rank {rank} of {ranks}; ranks count from 0, and there are 1 to {MAX_RANKS}"
    )]
    Rank {
        /// What was read.
        kind: Kind,
        /// The rank.
        rank: u32,
        /// How many there are said to be.
        ranks: u32,
    },
    /// A field has a value that it cannot have.
    #[error("the {kind} has a {field} of {value}, which must be {must}")]
    Field {
        /// What was read.
        kind: Kind,
        /// The field.
        field: &'static str,
        /// What it says.
        value: u64,
        /// What it may say.
        must: &'static str,
    },
    /// A wish's pack request cannot be used.
    #[error("the wish's pack request: {0}")]
    Pack(#[from] refit::RequestError),
    /// A wish's request for digests cannot be used.
    #[error("the wish's request for digests: {0}")]
    Digests(#[from] refit::DigestRequestError),
}
