use std::fmt;

use refit_planner::{Dtype, Transform};
use refit_pool::cuda::CudaError;
use refit_pool::{AllocateError, MemoryKind};

/// One of the two sides of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// What is read.
    Source,
    /// What is written.
    Target,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "reads",
            Self::Target => "writes",
        })
    }
}

/// Why moves cannot be carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A move of no bytes.
    #[error("move {index} moves nothing: its run or one of its counts is 0; leave it out")]
    Empty {
        /// Number of the move.
        index: usize,
    },
    /// A run does not hold whole elements.
    #[error("move {index}: a run of {run} bytes does not hold whole {from} elements")]
    Ragged {
        /// Number of the move.
        index: usize,
        /// Bytes of a run.
        run: u64,
        /// Element type in the source.
        from: Dtype,
    },
    /// A transform that the kernel does not know.
    #[error("move {index}: {transform:?} cannot be carried out on the device")]
    Unsupported {
        /// Number of the move.
        index: usize,
        /// The transform.
        transform: Transform,
    },
    /// A pattern that does not end before the last address.
    #[error(
        "move {index} {side} behind the last address there is; its counts, strides or run are wrong"
    )]
    Wraps {
        /// Number of the move.
        index: usize,
        /// The side that does.
        side: Side,
    },
    /// More than a table can hold.
    #[error(
        "move {index} brings the table to {needed} {what}, and it holds {most}; make several tables"
    )]
    TooMany {
        /// Number of the move.
        index: usize,
        /// Of what.
        what: &'static str,
        /// How many it would take; saturated.
        needed: u64,
        /// How many a table holds.
        most: u64,
    },
    /// A move leaves the memory that it was given.
    #[error(
        "move {index} {side} bytes outside of the memory given for that; with all that is between its runs, a move lies \
         in one region, or in several that follow each other"
    )]
    Outside {
        /// Number of the move.
        index: usize,
        /// The side that does.
        side: Side,
    },
    /// Staging memory that is not what the moves were checked against.
    #[error(
        "{staged} staged bytes of {kind} are to be landed, from a multiple of 16 on; given was {}",
        given(found)
    )]
    Staging {
        /// Bytes that the moves may read.
        staged: u64,
        /// Where they have to be.
        kind: MemoryKind,
        /// Where the memory given is, and its bytes.
        found: Option<(MemoryKind, u64)>,
    },
    /// Memory, a table or a stream of something else than the device that is to work with it.
    #[error(
        "{what} is of {found}, and the kernel was loaded on CUDA device {device}; use one of that device"
    )]
    WrongDevice {
        /// What it is.
        what: &'static str,
        /// Where it lives.
        found: MemoryKind,
        /// The device of the kernel.
        device: u32,
    },
    /// The driver does not take the kernel.
    #[error("the driver does not load the kernel: {source}; it says: {log}")]
    Load {
        /// What the driver's compiler said; empty if nothing.
        log: String,
        /// The call that failed.
        source: CudaError,
    },
    /// There is no memory for a table.
    #[error(transparent)]
    Allocate(#[from] AllocateError),
    /// The driver failed, or work on the device did.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

fn given(found: &Option<(MemoryKind, u64)>) -> String {
    found.map_or_else(|| "nothing".to_owned(), |(kind, len)| format!("{len} bytes of {kind}"))
}
