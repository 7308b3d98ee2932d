//! What every transport has to do, as cases that run against any of them. Not a stable part of the API.
//!
//! Implement [`Harness`] for a backend and look at what [`run_all`] reports, or take single cases from [`cases`].
//! Cases start their own agents, use nothing else, and wait at most [`Harness::patience`] for anything.

// A case's verdict is what it is about; each says in its documentation what it asks for.
#![allow(clippy::missing_errors_doc)]

mod elements;
mod endings;
mod moves;
mod refusals;
mod world;

use std::fmt;
use std::time::Duration;

use refit_pool::{Allocator, Memory};

use crate::{Transport, TransportError};

pub use elements::transforms_where_declared;
pub use endings::*;
pub use moves::*;
pub use refusals::*;

/// How the cases get agents of a backend, and memory.
pub trait Harness {
    /// The backend.
    type Transport: Transport;
    /// Where memory comes from that its agents can register.
    type Allocator: Allocator + 'static;

    /// Starts an agent that every other agent of this harness can connect to. `role` tells those of one case apart.
    ///
    /// # Errors
    /// What the backend says.
    fn agent(&self, role: &str) -> Result<Self::Transport, TransportError>;

    /// An allocator of memory that agents can register.
    fn allocator(&self) -> Self::Allocator;

    /// An allocator of memory that agents with the role of a source can register, where that is other memory: that of
    /// another device.
    fn source_allocator(&self) -> Self::Allocator {
        self.allocator()
    }

    /// Copies all bytes out of memory, whatever its kind. By default it has to be host memory.
    fn read(&self, memory: &Memory) -> Vec<u8> {
        memory.host_bytes().map(<[u8]>::to_vec).unwrap_or_default()
    }

    /// Copies bytes over all of the memory. By default it has to be host memory.
    fn write(&self, memory: &mut Memory, bytes: &[u8]) {
        if let Some(memory) = memory.host_bytes_mut() {
            memory.copy_from_slice(bytes);
        }
    }

    /// Longest wait for one thing.
    fn patience(&self) -> Duration {
        Duration::from_secs(30)
    }

    /// Whether reads of memory that its owner deregistered, or whose owner is gone, are certain to fail. Without
    /// hardware that checks each read they may arrive all the same; then they only have to end.
    fn reads_fail_without_owner(&self) -> bool {
        true
    }
}

/// One case.
#[derive(Debug)]
pub struct Case<H> {
    /// Its name: that of the function.
    pub name: &'static str,
    /// The case itself.
    pub run: fn(&H) -> Verdict,
}

/// How a case ended.
pub type Verdict = Result<Outcome, Failure>;

/// How a case ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The transport does it.
    Passed,
    /// The transport cannot be brought into the situation.
    Skipped(&'static str),
}

/// What a transport did wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Failure(String);

/// How the cases ended.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Report {
    /// Cases that passed.
    pub passed: Vec<&'static str>,
    /// Cases that could not be tried, and why.
    pub skipped: Vec<(&'static str, &'static str)>,
    /// Cases that failed, and how.
    pub failed: Vec<(&'static str, Failure)>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { passed, skipped, failed } = self;
        write!(f, "{} passed, {} skipped, {} failed", passed.len(), skipped.len(), failed.len())?;
        skipped.iter().try_for_each(|(name, why)| write!(f, "\n  skipped {name}: {why}"))?;
        failed.iter().try_for_each(|(name, failure)| write!(f, "\n  FAILED {name}: {failure}"))
    }
}

macro_rules! table {
    ($($case:ident),* $(,)?) => { vec![$(Case { name: stringify!($case), run: $case::<H> }),*] };
}

/// Every case there is.
#[must_use]
pub fn cases<H: Harness>() -> Vec<Case<H>> {
    table![
        bytes_arrive_between_canaries,
        many_small_reads,
        odd_sizes_and_offsets,
        no_reads,
        strided_reads_where_declared,
        transforms_where_declared,
        bulk_reads_among_others,
        many_batches_in_one_post,
        a_batch_posted_again_reads_what_is_there,
        two_peers_at_once,
        batches_in_turn_into_the_same_memory,
        live_memory_beside_the_arena,
        reads_cross_registrations,
        memory_registered_after_connecting,
        local_memory_not_registered,
        local_range_too_long,
        remote_range_not_registered,
        lengths_that_would_wrap,
        lengths_that_disagree,
        destinations_that_overlap,
        registrations_that_overlap,
        peers_that_nobody_knows,
        metadata_of_somebody_else,
        metadata_that_is_damaged,
        memory_that_the_pull_does_not_own,
        batches_of_another_agent,
        disconnected_peers,
        sources_that_deregister,
        sources_that_go_away,
        registrations_outlived_by_batches,
        pulls_dropped_in_flight,
    ]
}

/// Runs every case.
pub fn run_all<H: Harness>(harness: &H) -> Report {
    let mut report = Report::default();
    for Case { name, run } in cases::<H>() {
        match run(harness) {
            Ok(Outcome::Passed) => report.passed.push(name),
            Ok(Outcome::Skipped(why)) => report.skipped.push((name, why)),
            Err(failure) => report.failed.push((name, failure)),
        }
    }
    report
}

/// Ends the case unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err($crate::conformance::Failure(format!($($message)+)));
        }
    };
}
/// Ends the case unless the result is an error that matches.
macro_rules! ensure_err {
    ($result:expr, $pattern:pat $(if $guard:expr)?, $what:expr) => {
        match $result {
            Err($pattern) $(if $guard)? => {}
            Err(other) => {
                return Err($crate::conformance::Failure(format!("{}: refused with the wrong error: {other:?}", $what)));
            }
            Ok(_) => return Err($crate::conformance::Failure(format!("{}: accepted", $what))),
        }
    };
}
use {ensure, ensure_err};
