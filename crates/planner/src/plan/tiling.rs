//! Proof that the bands and fills of a target parameter claim each of its elements exactly once.

use alloc::vec::Vec;

use crate::PlanError;
use crate::layout::Param;

/// A claimed box of the local view: `count` rows from `row`, `step` apart, and the columns `cols.0..cols.1`.
struct Claim {
    row: u64,
    step: u64,
    count: u64,
    cols: (u64, u64),
}

impl Claim {
    fn last_row(&self) -> u64 {
        self.row + (self.count - 1) * self.step
    }

    fn elements(&self) -> u64 {
        self.count * (self.cols.1 - self.cols.0)
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

/// Every claim lies inside the parameter already ([`crate::LayoutBuilder`] refuses others), so disjoint claims whose
/// sizes add up to the parameter's are a partition of it.
pub(super) fn prove(param: &Param) -> Result<(), PlanError> {
    let bands = param.bands.iter().map(|band| Claim {
        row: band.at_row,
        step: band.row_step,
        count: band.rows.end - band.rows.start,
        cols: (band.at_col, band.at_col + (band.cols.end - band.cols.start)),
    });
    let fills = param.fills.iter().map(|fill| Claim {
        row: fill.rows.start,
        step: 1,
        count: fill.rows.end - fill.rows.start,
        cols: (fill.cols.start, fill.cols.end),
    });
    let mut claims: Vec<Claim> = bands.chain(fills).collect();
    claims.sort_unstable_by_key(|claim| (claim.row, claim.cols.0));

    let mut open: Vec<&Claim> = Vec::new();
    let mut claimed: u64 = 0;
    for claim in &claims {
        open.retain(|earlier| earlier.last_row() >= claim.row);
        for earlier in &open {
            let shared = earlier.cols.0.max(claim.cols.0);
            if shared < earlier.cols.1.min(claim.cols.1)
                && let Some(row) = earlier.common_row(claim)
            {
                return Err(PlanError::Overlap { param: param.name.clone(), row, col: shared });
            }
        }
        open.push(claim);
        claimed = claimed.saturating_add(claim.elements());
    }
    let elements = param.rows * param.cols;
    if claimed != elements {
        return Err(PlanError::Gap { param: param.name.clone(), claimed, elements });
    }
    Ok(())
}
