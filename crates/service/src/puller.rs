//! What moves the bytes, as the protocol sees it.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use refit::{DigestRequest, Digests, Expected, Publication};

/// A version to read, under a lease: every rank of a group, and what its header has to say behind the last read.
#[derive(Clone, Copy, Debug)]
pub struct Reading<'a> {
    /// The group.
    pub group: &'a str,
    /// The version.
    pub version: u64,
    /// By rank, counted from 0.
    pub publications: &'a Arc<[Publication]>,
    /// In the same order.
    pub expected: &'a [Expected],
    /// Who vouches for the bytes, if they are to be compared with what their source says of them.
    pub vouch: Option<&'a dyn Vouch>,
}

/// Gets word from sources of what their bytes hash to.
pub trait Vouch: fmt::Debug {
    /// Asks for it, so that it may be there when the bytes are.
    ///
    /// # Errors
    /// [`PullFailure`], here and below.
    fn ask(&self, request: &DigestRequest) -> Result<(), PullFailure>;

    /// The answers of all ranks that were asked, for the version that is read. `None` where the bytes are to be taken
    /// without.
    ///
    /// # Errors
    /// See [`ask`](Self::ask); when there are none at the deadline and there have to be.
    fn answers(
        &self,
        request: &DigestRequest,
        deadline: Instant,
    ) -> Result<Option<Vec<Digests>>, PullFailure>;
}

/// One target rank's memory, and what reads into it.
pub trait Puller: fmt::Debug {
    /// Reads everything, and makes sure that it is whole: after the last byte has arrived it reads every rank's header and
    /// finds what is expected there.
    ///
    /// It returns by the deadline. An error says whether another attempt makes sense.
    ///
    /// # Errors
    /// [`PullFailure`]. Nothing of what arrived is used.
    fn pull(&mut self, reading: &Reading<'_>, deadline: Instant) -> Result<(), PullFailure>;

    /// Makes ready for the next pull, which is of `group`, at most until the deadline: until the reads of the last one have
    /// settled, or others have taken their place, and until nobody reads what will be overwritten. Called before a
    /// lease is taken, so that nobody who holds one waits.
    ///
    /// # Errors
    /// [`PullFailure`] when it may not begin: [`Cause::Late`] if it may later.
    fn make_ready(&mut self, group: &str, deadline: Instant) -> Result<(), PullFailure>;

    /// Bytes that abandoned reads may still write, and what is kept away with them.
    fn quarantined_bytes(&self) -> u64 {
        0
    }
}

/// Why an attempt to read failed, as far as it decides what is tried next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Cause {
    /// The source wrote while it was read.
    Torn,
    /// The source has restarted, or another has its memory.
    Stale,
    /// The offer, or one of its ranks, is not there any more.
    Vanished,
    /// The reads did not settle in time.
    Late,
    /// What arrived is not what the source holds.
    Damaged,
    /// The sides cannot be joined: trying the same source again is of no use.
    Refused,
    /// The transport failed.
    Failed,
    /// Memory that abandoned reads may write has reached its limit: nothing is read before some of it is back.
    Quarantined,
    /// The reads can no longer be watched: this rank reads no more.
    Lost,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Torn => "torn",
            Self::Stale => "stale",
            Self::Vanished => "vanished",
            Self::Late => "late",
            Self::Damaged => "damaged",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Quarantined => "quarantined",
            Self::Lost => "lost",
        })
    }
}

/// An attempt to read that failed.
#[derive(Debug)]
pub struct PullFailure {
    /// What kind of failure.
    pub cause: Cause,
    /// What exactly.
    pub reason: Box<dyn Error + Send + Sync>,
}

impl PullFailure {
    /// A failure of this kind.
    pub fn new(cause: Cause, reason: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { cause, reason: reason.into() }
    }
}

impl fmt::Display for PullFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.cause, self.reason)
    }
}

impl Error for PullFailure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(self.reason.as_ref())
    }
}
