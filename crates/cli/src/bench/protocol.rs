//! What the bench and its ranks say to each other, one JSON value a line.

use std::collections::BTreeMap;

use refit::planner::{Destination, Program};
use refit::{Expected, Report};
use serde::{Deserialize, Serialize};

/// How a cycle finds its buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Mode {
    /// Nothing kept: planned, allocated, registered and prepared in this cycle.
    Uncached,
    /// Everything kept from the cycle before.
    Cached,
    /// One read for every contiguous run. Prepared in this cycle, for an uncached one clears everything.
    ReadPerRun,
}

impl Mode {
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Uncached => "uncached",
            Self::Cached => "cached",
            Self::ReadPerRun => "read per row",
        }
    }
}

/// What a rank is told to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Command {
    /// A source: write the values of this cycle.
    Fill { cycle: u64 },
    /// A target: tell the sources what they would have to pack.
    AskToPack,
    /// A source: pack what targets have asked for.
    Pack,
    /// A target: read what sources have packed.
    MeetPacked,
    /// A target: refit what was announced.
    Refit { mode: Mode, announced: Vec<Announced> },
    /// A target: compare every byte with the values of this cycle.
    Verify { cycle: u64 },
    /// A target: say what a cached refit does, without doing it.
    Describe,
    /// A target: read as many bytes as a refit does, one read a source.
    BigRead,
    /// A target: read the same from each source by one copy of a copy engine.
    Copies,
    /// A target: copy memory.
    Memcpy,
    /// Leave.
    Stop,
}

/// What a rank answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    /// Set up.
    Ready,
    /// Done as told.
    Done,
    /// Values are written, and slots filled behind them if there are some.
    Filled { announced: Announced, packed: Option<Rate> },
    /// A refit is done.
    Refit(Box<RankReport>),
    /// What a cached refit does.
    Described(Box<Description>),
    /// A ceiling was measured.
    Rate(Rate),
    /// A ceiling cannot be measured here.
    Unmeasured { reason: String },
    /// The rank cannot go on.
    Failed { reason: String },
}

impl Reply {
    /// What a source announces, behind a change.
    pub(crate) fn announced(&self) -> Option<Announced> {
        if let Self::Filled { announced, .. } = *self { Some(announced) } else { None }
    }
}

/// What a source's header says behind a commit, told to targets as a trainer would.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Announced {
    rank: u32,
    incarnation: u128,
    version: u64,
    epoch: u64,
}

impl From<Expected> for Announced {
    fn from(Expected { rank, incarnation, version, epoch }: Expected) -> Self {
        Self { rank, incarnation, version, epoch }
    }
}

impl From<Announced> for Expected {
    fn from(Announced { rank, incarnation, version, epoch }: Announced) -> Self {
        Self { rank, incarnation, version, epoch }
    }
}

/// What one rank moved in some time.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Rate {
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
}

impl Rate {
    /// In gigabytes a second.
    #[allow(clippy::cast_precision_loss, reason = "a rate for people")]
    pub(crate) fn gbps(self) -> f64 {
        if self.seconds > 0.0 { self.bytes as f64 / self.seconds / 1e9 } else { 0.0 }
    }

    /// Of ranks that moved bytes at the same time: all bytes over the time of the slowest.
    pub(crate) fn together(rates: &[Self]) -> Self {
        Self {
            bytes: rates.iter().map(|rate| rate.bytes).sum(),
            seconds: rates.iter().map(|rate| rate.seconds).fold(0.0, f64::max),
        }
    }
}

/// A target's report in seconds, as it travels and as `--json` has it.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct RankReport {
    pub(crate) rank: u32,
    pub(crate) plan_s: f64,
    pub(crate) alloc_s: f64,
    pub(crate) register_s: f64,
    pub(crate) connect_s: f64,
    pub(crate) prepare_s: f64,
    /// From the start of `prepare` until the first wave was handed to the transport: before it, no byte moves.
    pub(crate) ready_s: f64,
    /// From then until all reads of the first wave were posted.
    pub(crate) posting_s: f64,
    pub(crate) pull_s: f64,
    pub(crate) land_s: f64,
    pub(crate) total_s: f64,
    pub(crate) wire_bytes: u64,
    pub(crate) needed_bytes: u64,
    pub(crate) staging_bytes: u64,
    pub(crate) param_bytes: u64,
    pub(crate) reads: u64,
    pub(crate) plans: u64,
    pub(crate) prepared_reads: u64,
    pub(crate) allocations: u64,
    pub(crate) registrations: u64,
    /// Most memory the process ever had resident so far, 0 where ranks share a process.
    pub(crate) peak_rss_bytes: u64,
}

impl RankReport {
    pub(crate) fn new(rank: u32, report: &Report, param_bytes: u64, peak_rss_bytes: u64) -> Self {
        Self {
            rank,
            plan_s: report.plan.as_secs_f64(),
            alloc_s: report.allocate.as_secs_f64(),
            register_s: report.register.as_secs_f64(),
            connect_s: report.connect.as_secs_f64(),
            prepare_s: report.prepare.as_secs_f64(),
            ready_s: report.ready.as_secs_f64(),
            posting_s: report.posting.as_secs_f64(),
            pull_s: report.pull.as_secs_f64(),
            land_s: report.land.as_secs_f64(),
            total_s: report.total.as_secs_f64(),
            wire_bytes: report.wire_bytes,
            needed_bytes: report.needed_bytes,
            staging_bytes: report.staging_bytes,
            param_bytes,
            reads: report.reads,
            plans: report.plans,
            prepared_reads: report.prepared_reads,
            allocations: report.allocations,
            registrations: report.registrations,
            peak_rss_bytes,
        }
    }
}

/// What the program of a target does, as `--json` has it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Description {
    pub(crate) rank: u32,
    /// How bytes come from each source rank that is read, and why, as the transport says it.
    pub(crate) routes: BTreeMap<u32, String>,
    /// Straight to their place.
    pub(crate) direct: Moved,
    /// By way of staging memory.
    pub(crate) staged: Moved,
    /// Of both, those that a copy engine carries out.
    pub(crate) bulk: Moved,
}

/// Some of a program's reads.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Moved {
    pub(crate) reads: u64,
    pub(crate) bytes: u64,
}

impl Moved {
    pub(crate) fn add(&mut self, reads: u64, bytes: u64) {
        self.reads += reads;
        self.bytes += bytes;
    }
}

impl Description {
    pub(crate) fn new(rank: u32, program: &Program) -> Self {
        let mut description = Self { rank, ..Self::default() };
        for read in program.reads() {
            let moved = match read.destination {
                Destination::Live { .. } => &mut description.direct,
                _ => &mut description.staged,
            };
            moved.add(1, read.bytes());
            if read.bulk {
                description.bulk.add(1, read.bytes());
            }
        }
        description
    }
}
