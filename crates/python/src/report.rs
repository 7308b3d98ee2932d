//! Figures as dicts.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use refit::pool::PoolStats;
use refit_service::{PullTotals, Retries, ServiceStats};

/// What has happened to a rank.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Figures {
    pub(crate) service: ServiceStats,
    /// On the side that offers what was read.
    pub(crate) relay: ServiceStats,
    pub(crate) pulls: PullTotals,
    pub(crate) pool: PoolStats,
}

impl Figures {
    pub(crate) fn to_dict<'py>(self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let Self { service, relay, pulls, pool } = self;
        let out = PyDict::new(py);
        let both = |of: fn(&ServiceStats) -> u64| of(&service).saturating_add(of(&relay));
        out.set_item("commits", both(|stats| stats.commits))?;
        out.set_item("reader_waits", both(|stats| stats.waits))?;
        let waited = service.waited.saturating_add(relay.waited);
        out.set_item("reader_wait_seconds", waited.as_secs_f64())?;
        out.set_item("leases_expired", both(|stats| stats.leases_expired))?;
        out.set_item("rejoins", service.rejoins)?;
        out.set_item("refits", service.refits)?;
        out.set_item("installs", service.installs)?;
        out.set_item("aborts", service.aborts)?;
        out.set_item("crowded", service.crowded)?;
        out.set_item("retries", retries(py, Retries::default(), service.retries)?)?;
        out.set_item("pulls", pulls.pulls)?;
        out.set_item("wire_bytes", pulls.wire_bytes)?;
        out.set_item("needed_bytes", pulls.needed_bytes)?;
        out.set_item("reads", pulls.reads)?;
        out.set_item("seconds", seconds(py, PullTotals::default(), pulls)?)?;
        out.set_item("pool_bytes", pool.bytes)?;
        out.set_item("registrations", pool.registrations.saturating_sub(pool.deregistrations))?;
        out.set_item("quarantined_bytes", service.quarantined_bytes.max(pool.quarantined_bytes))?;
        Ok(out)
    }
}

/// Causes of failed attempts between two moments, those that there were.
pub(crate) fn retries(
    py: Python<'_>,
    before: Retries,
    now: Retries,
) -> PyResult<Bound<'_, PyDict>> {
    let out = PyDict::new(py);
    for (cause, before, now) in [
        ("torn", before.torn, now.torn),
        ("stale", before.stale, now.stale),
        ("vanished", before.vanished, now.vanished),
        ("late", before.late, now.late),
        ("damaged", before.damaged, now.damaged),
        ("refused", before.refused, now.refused),
        ("failed", before.failed, now.failed),
        ("quarantined", before.quarantined, now.quarantined),
        ("lost", before.lost, now.lost),
    ] {
        let count = now.saturating_sub(before);
        if count > 0 {
            out.set_item(cause, count)?;
        }
    }
    Ok(out)
}

/// Seconds of each stage between two moments.
pub(crate) fn seconds(
    py: Python<'_>,
    before: PullTotals,
    now: PullTotals,
) -> PyResult<Bound<'_, PyDict>> {
    let out = PyDict::new(py);
    for (stage, before, now) in [
        ("transfer_planning", before.plan, now.plan),
        ("setup_registration", before.setup, now.setup),
        ("wire_transfer", before.pull, now.pull),
        ("transformation", before.land, now.land),
        ("total", before.total, now.total),
    ] {
        out.set_item(stage, now.saturating_sub(before).as_secs_f64())?;
    }
    Ok(out)
}
