//! One row: rounds of indexing the source, planning and lowering every target rank.

use std::rc::Rc;
use std::time::{Duration, Instant};

use refit::RefitError;
use refit::planner::{Capabilities, LowerOptions, PlanOptions, SourceLayout, lower, plan};
use serde::Serialize;

use super::sides::Sides;
use crate::error::CliError;
use crate::memory;

/// What `refit plan` assumes where nothing is said.
const CAPABILITIES: Capabilities = Capabilities::plain(2_000, 5_000);

/// What one size costs. Times are medians, in seconds.
#[derive(Debug, Serialize)]
pub(super) struct Measured {
    pub(super) source_ranks: u32,
    pub(super) target_ranks: u32,
    /// Parameters of all target ranks.
    pub(super) params: usize,
    /// Indexing the source, once for all target ranks.
    pub(super) index_s: f64,
    /// Planning all target ranks.
    pub(super) plan_s: f64,
    /// Lowering all plans.
    pub(super) lower_s: f64,
    pub(super) plan_s_per_rank: f64,
    /// Indexing and planning, per target parameter.
    pub(super) ns_per_param: f64,
    /// The process at its largest, the layouts of the source and one target rank's included.
    pub(super) peak_bytes: u64,
    pub(super) segments: usize,
    pub(super) reads: usize,
    pub(super) wire_bytes: u64,
    /// Bytes that the source rank that is asked most is asked for, by all target ranks together, over the mean.
    pub(super) most_asked_of_mean: f64,
}

#[derive(Default)]
struct Round {
    index: Duration,
    plan: Duration,
    lower: Duration,
    params: usize,
    segments: usize,
    reads: usize,
    wire_bytes: u64,
    /// By source rank.
    asked_bytes: Vec<u64>,
}

pub(super) fn measure(sides: &Sides, rounds: u32) -> Result<Measured, CliError> {
    memory::forget_peak();
    let rounds: Vec<Round> = (0..rounds).map(|_| round(sides)).collect::<Result<_, _>>()?;
    let seconds = |part: fn(&Round) -> Duration| {
        let mut all: Vec<f64> = rounds.iter().map(|round| part(round).as_secs_f64()).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    let (index_s, plan_s) = (seconds(|round| round.index), seconds(|round| round.plan));
    let last = &rounds[rounds.len() - 1];
    #[allow(clippy::cast_precision_loss, reason = "ratios for people")]
    let (ns_per_param, most_asked_of_mean) = {
        let most = last.asked_bytes.iter().max().copied().unwrap_or_default() as f64;
        let all = last.asked_bytes.iter().sum::<u64>() as f64;
        let ns = (index_s + plan_s) * 1e9;
        (ns / last.params as f64, most * last.asked_bytes.len() as f64 / all)
    };
    Ok(Measured {
        source_ranks: sides.source_ranks(),
        target_ranks: sides.target_ranks(),
        params: last.params,
        index_s,
        plan_s,
        lower_s: seconds(|round| round.lower),
        plan_s_per_rank: plan_s / f64::from(sides.target_ranks()),
        ns_per_param,
        peak_bytes: memory::peak_bytes()?,
        segments: last.segments,
        reads: last.reads,
        wire_bytes: last.wire_bytes,
        most_asked_of_mean,
    })
}

fn round(sides: &Sides) -> Result<Round, CliError> {
    let mut round = Round::default();
    let source = index(sides, &mut round.index)?;
    round.asked_bytes = (0..sides.source_ranks()).map(|_| 0).collect();
    for rank in 0..sides.target_ranks() {
        let target = sides.target(rank)?;
        let started = Instant::now();
        let plan = plan(&source, &target, &PlanOptions::default()).map_err(RefitError::from)?;
        round.plan += started.elapsed();
        let started = Instant::now();
        let program =
            lower(&plan, &CAPABILITIES, &LowerOptions::default()).map_err(RefitError::from)?;
        round.lower += started.elapsed();

        round.params += target.params().len();
        round.segments += plan.segments().len();
        round.reads += program.reads().len();
        round.wire_bytes += program.wire_bytes();
        for (source, bytes) in plan.bytes_by_source() {
            round.asked_bytes[source as usize] += bytes;
        }
    }
    Ok(round)
}

/// Joins the source's layouts. Making them, and dropping them again, is not counted.
fn index(sides: &Sides, counted: &mut Duration) -> Result<SourceLayout, CliError> {
    let mut elsewhere = Duration::ZERO;
    let mut held = None;
    let mut failed = None;
    let layouts = (0..sides.source_ranks()).map_while(|rank| {
        let started = Instant::now();
        held = None;
        match sides.source(rank) {
            Ok(layout) => held = Some(Rc::new(layout)),
            Err(error) => failed = Some(error),
        }
        elsewhere += started.elapsed();
        held.clone()
    });
    let started = Instant::now();
    let source = SourceLayout::new(layouts);
    *counted = started.elapsed().saturating_sub(elsewhere);
    match failed {
        Some(error) => Err(error),
        None => Ok(source.map_err(RefitError::from)?),
    }
}
