use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::time::Duration;

use refit::PublicationError;

use super::Wanted;
use crate::groups::Withheld;
use crate::puller::PullFailure;
use crate::rendezvous::RendezvousError;
use crate::source::SourceError;

/// Why an offer that was chosen cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OfferError {
    /// A rank is another life of itself.
    #[error("group `{group}` has restarted; take its new publications")]
    Restarted {
        /// The group.
        group: String,
    },
    /// It offers another version by now.
    #[error("group `{group}` went from version {version} to {now}; read that")]
    Moved {
        /// The group.
        group: String,
        /// What it offered.
        version: u64,
        /// What it offers.
        now: u64,
    },
    /// It offers nothing any more.
    #[error("group `{group}` withdrew version {version}: {why}; wait for its next")]
    Withdrawn {
        /// The group.
        group: String,
        /// What it offered.
        version: u64,
        /// Why nothing.
        why: Withheld,
    },
    /// It has left.
    #[error("group `{group}` has left; read another")]
    Left {
        /// The group.
        group: String,
    },
    /// There is no publication where one was announced.
    #[error(
        "the publication of rank {rank} of group `{group}` is gone; wait for it to publish anew"
    )]
    NoPublication {
        /// The group.
        group: String,
        /// The rank.
        rank: u32,
    },
    /// What lies there is not a publication.
    #[error("rank {rank} of group `{group}`: {source}")]
    Publication {
        /// The group.
        group: String,
        /// The rank.
        rank: u32,
        /// What is wrong with it.
        source: PublicationError,
    },
    /// It is another than was announced.
    #[error("rank {rank} of group `{group}` has published anew; look again")]
    Republished {
        /// The group.
        group: String,
        /// The rank.
        rank: u32,
    },
    /// It is of another rank.
    #[error(
        "rank {rank} of group `{group}` publishes the layout of rank {found}; number the ranks of a group from 0"
    )]
    OtherRank {
        /// The group.
        group: String,
        /// The rank.
        rank: u32,
        /// The layout's.
        found: u32,
    },
    /// Digests were asked for, and none came.
    #[error(
        "group `{group}` has not said in time what its bytes hash to; have it answer (`LiveSource::answer`), or wait for \
         its next commit"
    )]
    NoDigests {
        /// The group.
        group: String,
    },
}

/// One attempt to read a group.
#[derive(Debug)]
pub struct Attempt {
    /// The group.
    pub group: String,
    /// What it offered.
    pub version: u64,
    /// What went wrong.
    pub failure: PullFailure,
    /// How long it took.
    pub took: Duration,
}

/// What ended a refresh that read nothing.
#[derive(Debug)]
#[non_exhaustive]
pub enum Ended {
    /// Time.
    Deadline,
    /// Reads of an attempt are still out, or others read what would be overwritten.
    Unsettled(PullFailure),
    /// Abandoned reads keep as much memory as they may: somebody has to end the silent peer, or start this rank anew.
    Quarantined(PullFailure),
    /// Reads can no longer be watched: this rank has to start anew.
    Lost(PullFailure),
    /// The store.
    Store(RendezvousError),
}

/// Nothing was read. Lists every attempt, and why groups that were not tried had nothing to offer.
#[derive(Debug)]
pub struct RefreshError {
    /// What was wanted.
    pub wanted: Wanted,
    /// The first attempts, in their order.
    pub attempts: Vec<Attempt>,
    /// How many more there were.
    pub omitted: u64,
    /// Groups that offered nothing when this was last looked at, and why.
    pub withheld: BTreeMap<String, Withheld>,
    /// How long all of it took.
    pub took: Duration,
    /// What ended it.
    pub ended: Ended,
}

impl RefreshError {
    /// Whether the reader's session has ended: [`Reader::reseat`](super::Reader::reseat) goes on from here.
    #[must_use]
    pub fn is_session_ended(&self) -> bool {
        match &self.ended {
            Ended::Store(error) => matches!(error, RendezvousError::SessionEnded),
            // A relay closes what it offers before it reads.
            Ended::Unsettled(failure) => {
                let source = failure.reason.downcast_ref::<SourceError>();
                source.is_some_and(SourceError::is_session_ended)
            }
            _ => false,
        }
    }
}

impl fmt::Display for RefreshError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.wanted.at_least, self.wanted.at_most) {
            (least, None) => write!(f, "no version from {least} on")?,
            (least, Some(most)) => write!(f, "no version from {least} to {most}")?,
        }
        write!(f, " was read in {:?}", self.took)?;
        match &self.ended {
            Ended::Deadline => write!(f, ", when the deadline passed")?,
            Ended::Unsettled(failure) => write!(f, ", and nothing can be read yet ({failure})")?,
            Ended::Quarantined(failure) => write!(f, ", and nothing more is read: {failure}")?,
            Ended::Lost(failure) => {
                write!(
                    f,
                    ", and reads cannot be watched any more ({failure}): start this rank anew"
                )?;
            }
            Ended::Store(error) => write!(f, ": {error}")?,
        }
        let mut join = "; tried ";
        for Attempt { group, version, failure, took } in &self.attempts {
            write!(f, "{join}version {version} of group `{group}` ({took:?}): {failure}")?;
            join = ", ";
        }
        if self.omitted > 0 {
            write!(f, ", and {} more times", self.omitted)?;
        }
        for (group, why) in &self.withheld {
            write!(f, "; group `{group}` offered nothing: {why}")?;
        }
        if self.attempts.is_empty() && self.withheld.is_empty() {
            write!(f, "; no group offers one")?;
        }
        Ok(())
    }
}

impl Error for RefreshError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match (&self.ended, self.attempts.last()) {
            (Ended::Store(error), _) => Some(error),
            (Ended::Unsettled(failure) | Ended::Quarantined(failure) | Ended::Lost(failure), _)
            | (_, Some(Attempt { failure, .. })) => Some(failure),
            _ => None,
        }
    }
}
