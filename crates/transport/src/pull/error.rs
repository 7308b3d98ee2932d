use std::fmt;

use refit_pool::Memory;

use crate::{Pull, Transport, TransportError, TransportLease};

/// Why a pull did not end well. Holds the memory wherever that may be used again.
#[non_exhaustive]
pub enum PullError<T: Transport> {
    /// The lease has not as many batches as were asked for. Nothing was posted.
    NoBatch {
        /// The lease, untouched.
        lease: Box<TransportLease<T>>,
        /// Live memory, untouched.
        live: Vec<Memory>,
    },
    /// A batch writes memory that the pull does not own. Nothing was posted.
    NotOwned {
        /// Index of the batch in the lease.
        batch: usize,
        /// Bytes of the range that lies outside.
        len: u64,
        /// The lease, untouched.
        lease: Box<TransportLease<T>>,
        /// Live memory, untouched.
        live: Vec<Memory>,
    },
    /// Two batches write the same byte. Nothing was posted.
    Overlap {
        /// Index of a batch in the lease.
        first: usize,
        /// Index of another.
        second: usize,
        /// The lease, untouched.
        lease: Box<TransportLease<T>>,
        /// Live memory, untouched.
        live: Vec<Memory>,
    },
    /// Reads failed, and all have settled. What arrived is in place, the rest is as it was: discard or pull again.
    Failed {
        /// What went wrong, at least one.
        errors: Vec<TransportError>,
        /// The lease.
        lease: Box<TransportLease<T>>,
        /// Live memory.
        live: Vec<Memory>,
    },
    /// Reads were under way when the deadline passed.
    Deadline {
        /// The pull, to be waited for again, or parked with its memory.
        pull: Box<Pull<T>>,
    },
    /// Reads can no longer be watched, and may write the pull's memory for ever. It has been leaked.
    Lost {
        /// What went wrong, at least one.
        errors: Vec<TransportError>,
        /// Bytes that the pull would have written.
        bytes: u64,
    },
}

impl<T: Transport> fmt::Display for PullError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoBatch { lease, .. } => write!(
                f,
                "the lease has {} batches, fewer than the pull was to post; give it a range of them",
                lease.prepared().len()
            ),
            Self::NotOwned { batch, len, .. } => write!(
                f,
                "batch {batch} writes {len} bytes that neither the lease nor the live memory given holds; give the \
                 pull every memory its batches were prepared for"
            ),
            Self::Overlap { first, second, .. } => {
                write!(
                    f,
                    "batches {first} and {second} write the same bytes; destinations must be disjoint"
                )
            }
            Self::Failed { errors, .. } => {
                write!(f, "{} batches failed and all have settled", errors.len())?;
                errors.first().map_or(Ok(()), |first| write!(f, ": {first}"))
            }
            Self::Deadline { pull } => write!(
                f,
                "reads into agent `{}` have not settled by the deadline; wait again, or have the silent peer killed, \
                 which settles them",
                pull.transport().agent()
            ),
            Self::Lost { errors, bytes } => {
                write!(f, "reads were lost and the {bytes} bytes they may write are quarantined")?;
                errors.first().map_or(Ok(()), |first| write!(f, ": {first}"))
            }
        }
    }
}

impl<T: Transport> std::error::Error for PullError<T> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Failed { errors, .. } | Self::Lost { errors, .. } => {
                errors.first().map(|error| error as _)
            }
            Self::NoBatch { .. }
            | Self::NotOwned { .. }
            | Self::Overlap { .. }
            | Self::Deadline { .. } => None,
        }
    }
}

impl<T: Transport> fmt::Debug for PullError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = match self {
            Self::NoBatch { .. } => f.debug_struct("NoBatch"),
            Self::NotOwned { .. } => f.debug_struct("NotOwned"),
            Self::Overlap { .. } => f.debug_struct("Overlap"),
            Self::Failed { .. } => f.debug_struct("Failed"),
            Self::Deadline { .. } => f.debug_struct("Deadline"),
            Self::Lost { .. } => f.debug_struct("Lost"),
        };
        match self {
            Self::NoBatch { lease, .. } => f.field("batches", &lease.prepared().len()),
            Self::NotOwned { batch, len, .. } => f.field("batch", batch).field("len", len),
            Self::Overlap { first, second, .. } => f.field("first", first).field("second", second),
            Self::Failed { errors, .. } => f.field("errors", errors),
            Self::Deadline { pull } => f.field("pull", pull),
            Self::Lost { errors, bytes } => f.field("errors", errors).field("bytes", bytes),
        }
        .finish_non_exhaustive()
    }
}
