use alloc::vec::Vec;

use super::{Part, Role, TargetCoords, TargetRole, View, plus, times};
use crate::TranslateError;
use crate::config::MAX_EXPERTS;

/// Several tensors of one role on top of each other in one engine parameter: the local experts of a layer.
///
/// Local shape `[count, ..]`, the rest being the role's own. Logical tensors: those of the first, then those of the
/// second, and so on. Which experts they are is said by their names, see [`TargetCoords::experts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stack<R> {
    /// How many.
    pub count: u64,
    /// Each of them.
    pub each: R,
}

const WHAT: &str = "experts of one rank";

impl<R> Stack<R> {
    fn check(&self) -> Result<(), TranslateError> {
        match self.count {
            0 => Err(TranslateError::Zero { what: WHAT }),
            1..=MAX_EXPERTS => Ok(()),
            _ => Err(TranslateError::TooLarge { what: WHAT, limit: MAX_EXPERTS }),
        }
    }
}

impl<R: Role> Role for Stack<R> {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        self.check()?;
        let each = self.each.logical()?;
        Ok((0..self.count).flat_map(|_| each.iter().copied()).collect())
    }
}

impl<R: TargetRole> TargetRole for Stack<R> {
    fn vllm(&self, at: &TargetCoords) -> Result<View, TranslateError> {
        self.check()?;
        let tensors = self.each.logical()?.len();
        let each = self.each.vllm(at)?;
        // No start below can overflow: all are at most the rows of all.
        let rows = times(WHAT, each.rows, self.count)?;
        let mut view = View::new(rows, Some(each.cols), each.formula, Vec::new())
            .shaped(core::iter::once(self.count).chain(each.shape).collect());
        for (slot, start) in (0..self.count).map(|number| number * each.rows).enumerate() {
            for part in &each.parts {
                let tensor = slot * tensors + part.tensor;
                let at_row = plus(WHAT, start, part.at_row)?;
                view.parts.push(Part { tensor, at_row, ..part.clone() });
            }
            for zero in &each.zero_rows {
                view = view.zero(start + zero.start..start + zero.end);
            }
        }
        Ok(view)
    }
}
