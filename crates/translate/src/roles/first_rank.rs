use alloc::vec;
use alloc::vec::Vec;

use super::{Part, Role, TargetCoords, TargetRole, View};
use crate::TranslateError;

/// A vector that the first rank of the engine's group holds whole and the others hold as zeros: a bias that ranks add
/// before they sum their parts, which must not be added by each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstRank {
    /// Elements.
    pub rows: u64,
}

impl Role for FirstRank {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        Ok(vec![(self.rows, 1)])
    }
}

impl TargetRole for FirstRank {
    fn vllm(&self, at: &TargetCoords) -> Result<View, TranslateError> {
        let formula = "the whole vector on the first rank, as many zeros on the others";
        let view = |parts| View::new(self.rows, None, formula, parts);
        Ok(match at.tp.rank() {
            0 => view(vec![Part::new(0, 0..self.rows, 0..1)]),
            _ => view(Vec::new()).zero(0..self.rows),
        })
    }
}
