//! Proof that the bands and fills of a target parameter claim each of its elements exactly once.
//!
//! Claims with equal row steps fall into *lanes*, the rows of one residue: lanes share no row, and inside one a claim
//! is a plain rectangle, so a sweep finds overlaps in `n log n`. Claims with different steps are compared one by one,
//! on the budget: layouts have one or two different steps.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use super::PlanOptions;
use super::budget::Budget;
use crate::PlanError;
use crate::layout::Param;

/// What comparing two progressions costs, in looks.
const COMPARISON: u64 = 32;

/// A claimed box of the local view: `count` rows from `row`, `step` apart, and the columns `cols.0..cols.1`.
struct Claim {
    row: u64,
    step: u64,
    count: u64,
    cols: (u64, u64),
}

impl Claim {
    /// One row has no step; calling it 1 keeps lanes few.
    fn new(row: u64, step: u64, count: u64, cols: (u64, u64)) -> Self {
        Self { row, step: if count == 1 { 1 } else { step }, count, cols }
    }

    fn last_row(&self) -> u64 {
        self.row + (self.count - 1) * self.step
    }

    fn elements(&self) -> u64 {
        self.count * (self.cols.1 - self.cols.0)
    }

    fn lane(&self) -> (u64, u64) {
        (self.step, if self.step == 1 { 0 } else { self.row % self.step })
    }

    /// The first column that both claims have, if any.
    fn common_col(&self, other: &Self) -> Option<u64> {
        let first = self.cols.0.max(other.cols.0);
        (first < self.cols.1.min(other.cols.1)).then_some(first)
    }

    /// A row that both claims hold, if any: where two arithmetic progressions meet.
    fn common_row(&self, other: &Self) -> Option<u64> {
        let from = self.row.max(other.row);
        let to = self.last_row().min(other.last_row());
        let row = common_term((self.row, self.step), (other.row, other.step), from)?;
        (row <= to).then_some(row)
    }
}

/// The smallest `x >= from` with `x = a (mod p)` and `x = b (mod q)`: the Chinese remainder theorem for moduli that
/// may share factors. Products of two `u64` are taken in `i128`, which holds them.
fn common_term((a, p): (u64, u64), (b, q): (u64, u64), from: u64) -> Option<u64> {
    let (a, p, b, q, from) =
        (i128::from(a), i128::from(p), i128::from(b), i128::from(q), i128::from(from));
    let (gcd, inverse) = extended_gcd(p, q);
    if (b - a) % gcd != 0 {
        return None;
    }
    let turns = ((b - a) / gcd % (q / gcd)) * (inverse % (q / gcd)) % (q / gcd);
    let x = a + p * turns.rem_euclid(q / gcd);
    let period = p / gcd * q;
    let x = from + (x - from).rem_euclid(period);
    u64::try_from(x).ok()
}

/// `(g, x)` with `g = gcd(a, b)` and `a * x = g (mod b)`.
fn extended_gcd(a: i128, b: i128) -> (i128, i128) {
    let (mut r, mut x) = ((a, b), (1, 0));
    while r.1 != 0 {
        let quotient = r.0 / r.1;
        r = (r.1, r.0 - quotient * r.1);
        x = (x.1, x.0 - quotient * x.1);
    }
    (r.0, x.0)
}

/// Checks what [`plan`](crate::plan) demands of a target's parameters before it looks at any source: that bands and
/// fills of each claim each of its elements exactly once.
///
/// # Errors
/// [`PlanError::Overlap`], [`PlanError::Gap`], and [`PlanError::TooComplex`] beyond [`PlanOptions::max_pieces`].
pub fn prove_tiling<'a>(
    params: impl IntoIterator<Item = &'a Param>,
    options: &PlanOptions,
) -> Result<(), PlanError> {
    let mut budget = Budget::new(options.max_pieces);
    params.into_iter().try_for_each(|param| prove(param, &mut budget))
}

/// Checks that bands and fills of each parameter claim none of its elements twice. A source may leave some unclaimed.
///
/// # Errors
/// [`PlanError::Overlap`], and [`PlanError::TooComplex`] beyond [`PlanOptions::max_pieces`].
pub fn prove_disjoint<'a>(
    params: impl IntoIterator<Item = &'a Param>,
    options: &PlanOptions,
) -> Result<(), PlanError> {
    let mut budget = Budget::new(options.max_pieces);
    params.into_iter().try_for_each(|param| claimed(param, &mut budget).map(|_| ()))
}

/// Every claim lies inside the parameter already ([`crate::LayoutBuilder`] refuses others), so disjoint claims whose
/// sizes add up to the parameter's are a partition of it.
pub(super) fn prove(param: &Param, budget: &mut Budget) -> Result<(), PlanError> {
    let (claimed, elements) = (claimed(param, budget)?, param.rows * param.cols);
    if claimed != elements {
        return Err(PlanError::Gap { param: param.name.clone(), claimed, elements });
    }
    Ok(())
}

/// How many elements are claimed, if none is claimed twice.
fn claimed(param: &Param, budget: &mut Budget) -> Result<u64, PlanError> {
    let bands = param.bands.iter().map(|band| {
        let width = band.cols.end - band.cols.start;
        let count = band.rows.end - band.rows.start;
        Claim::new(band.at_row, band.row_step, count, (band.at_col, band.at_col + width))
    });
    let fills = param.fills.iter().map(|fill| {
        let count = fill.rows.end - fill.rows.start;
        Claim::new(fill.rows.start, 1, count, (fill.cols.start, fill.cols.end))
    });
    let mut claims: Vec<Claim> = bands.chain(fills).collect();
    if let [claim] = claims.as_slice() {
        return Ok(claim.elements());
    }
    claims.sort_unstable_by_key(|claim| (claim.lane(), claim.row, claim.cols.0));

    for lane in claims.chunk_by(|a, b| a.lane() == b.lane()) {
        sweep(param, lane)?;
    }
    if claims.first().map(|claim| claim.step) != claims.last().map(|claim| claim.step) {
        claims.sort_unstable_by_key(|claim| (claim.row, claim.cols.0));
        compare(param, &claims, budget)?;
    }
    Ok(claims.iter().fold(0, |sum: u64, claim| sum.saturating_add(claim.elements())))
}

/// Finds an overlap among claims of one lane, sorted by first row.
fn sweep(param: &Param, lane: &[Claim]) -> Result<(), PlanError> {
    if lane.len() < 2 {
        return Ok(());
    }
    // Claims by first column. Their columns are disjoint, so that only neighbours of a new one can overlap it.
    let mut open = BTreeMap::<u64, &Claim>::new();
    for claim in lane {
        while let Some((&first, earlier)) = open.range(..claim.cols.1).next_back()
            && earlier.cols.1 > claim.cols.0
        {
            if earlier.last_row() >= claim.row {
                return Err(overlap(param, claim.row, claim.cols.0.max(first)));
            }
            open.remove(&first);
        }
        open.insert(claim.cols.0, claim);
    }
    Ok(())
}

/// Finds an overlap among claims of different steps, sorted by first row.
fn compare(param: &Param, claims: &[Claim], budget: &mut Budget) -> Result<(), PlanError> {
    let mut open = BTreeMap::<u64, Vec<&Claim>>::new();
    for claim in claims {
        budget.look(param, open.len() as u64)?;
        for earlier in open.iter_mut().filter(|(step, _)| **step != claim.step).map(|(_, of)| of) {
            budget.look(param, earlier.len() as u64)?;
            earlier.retain(|earlier| earlier.last_row() >= claim.row);
            for earlier in earlier {
                let Some(col) = earlier.common_col(claim) else { continue };
                budget.look(param, COMPARISON)?;
                if let Some(row) = earlier.common_row(claim) {
                    return Err(overlap(param, row, col));
                }
            }
        }
        open.entry(claim.step).or_default().push(claim);
    }
    Ok(())
}

fn overlap(param: &Param, row: u64, col: u64) -> PlanError {
    PlanError::Overlap { param: param.name.clone(), row, col }
}
