use std::time::Duration;

use refit::Report;

use crate::puller::Cause;

/// What one rank has done and met since it began, as plain data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServiceStats {
    /// Versions committed by a source.
    pub commits: u64,
    /// Times a source waited for readers before it wrote.
    pub waits: u64,
    /// For how long in all.
    pub waited: Duration,
    /// Those waits that ended with readers left, at the deadline: nothing was written, or the source has left.
    pub waits_late: u64,
    /// Leases that it waited for and that were given back, or went with their readers' sessions.
    pub leases_released: u64,
    /// Leases that ran out before their readers gave them back.
    pub leases_expired: u64,
    /// Versions read whole.
    pub refits: u64,
    /// Versions installed by a rank of a replica.
    pub installs: u64,
    /// Rounds of a replica that this rank saw aborted.
    pub aborts: u64,
    /// Times a source, a reader or a rank of a replica came back after its session had ended.
    pub rejoins: u64,
    /// Attempts to read that failed, by cause.
    pub retries: Retries,
    /// Times a group was passed over because enough others read it.
    pub crowded: u64,
    /// Gauge: bytes that were kept away because of abandoned reads when the last refresh ended.
    pub quarantined_bytes: u64,
}

/// What the pulls of one target rank came to, added up, as plain data. Pulls that failed are not among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PullTotals {
    /// Pulls that ended well.
    pub pulls: u64,
    /// Bytes that they read.
    pub wire_bytes: u64,
    /// Bytes of them that were needed.
    pub needed_bytes: u64,
    /// Reads posted, without those of the headers.
    pub reads: u64,
    /// Time spent planning and lowering.
    pub plan: Duration,
    /// Time spent on memory, connections and reads that were not there: allocating, registering, connecting, preparing.
    pub setup: Duration,
    /// From the first post until the last read settled, without what was landed until then.
    pub pull: Duration,
    /// Landing copies and fills, as far as they were waited for.
    pub land: Duration,
    /// From beginning to end.
    pub total: Duration,
}

impl PullTotals {
    pub(crate) fn add(&mut self, report: &Report) {
        self.pulls = self.pulls.saturating_add(1);
        self.wire_bytes = self.wire_bytes.saturating_add(report.wire_bytes);
        self.needed_bytes = self.needed_bytes.saturating_add(report.needed_bytes);
        self.reads = self.reads.saturating_add(report.reads);
        self.plan = self.plan.saturating_add(report.plan);
        for part in [report.allocate, report.register, report.connect, report.prepare] {
            self.setup = self.setup.saturating_add(part);
        }
        self.pull = self.pull.saturating_add(report.pull);
        self.land = self.land.saturating_add(report.land);
        self.total = self.total.saturating_add(report.total);
    }
}

/// Failed attempts to read, by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Retries {
    /// The source wrote meanwhile.
    pub torn: u64,
    /// The source had restarted.
    pub stale: u64,
    /// The offer or its ranks were gone.
    pub vanished: u64,
    /// The reads did not settle in time.
    pub late: u64,
    /// What arrived was not what the source holds.
    pub damaged: u64,
    /// The sides cannot be joined.
    pub refused: u64,
    /// The transport failed.
    pub failed: u64,
    /// Abandoned reads kept as much memory as they may.
    pub quarantined: u64,
    /// The reads cannot be watched any more.
    pub lost: u64,
}

impl Retries {
    pub(crate) fn count(&mut self, cause: Cause) {
        let counter = match cause {
            Cause::Torn => &mut self.torn,
            Cause::Stale => &mut self.stale,
            Cause::Vanished => &mut self.vanished,
            Cause::Late => &mut self.late,
            Cause::Damaged => &mut self.damaged,
            Cause::Refused => &mut self.refused,
            Cause::Failed => &mut self.failed,
            Cause::Quarantined => &mut self.quarantined,
            Cause::Lost => &mut self.lost,
        };
        *counter = counter.saturating_add(1);
    }

    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        let Self { torn, stale, vanished, late, damaged, refused, failed, quarantined, lost } =
            *self;
        [torn, stale, vanished, late, damaged, refused, failed, quarantined, lost]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}
