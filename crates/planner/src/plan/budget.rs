//! What planning may take: layouts come from peers and from files, and some are made to be expensive.

use crate::PlanError;
use crate::layout::Param;

/// Boxes that may be looked at for each piece that may be made. Honest layouts need a few.
const LOOKS_PER_PIECE: u64 = 64;

/// What is left for one plan: pieces, which take memory, and looks at other boxes, which take time.
#[derive(Debug)]
pub(super) struct Budget {
    max_pieces: u64,
    pieces: u64,
    looks: u64,
}

impl Budget {
    pub(super) fn new(max_pieces: u64) -> Self {
        Self { max_pieces, pieces: max_pieces, looks: max_pieces.saturating_mul(LOOKS_PER_PIECE) }
    }

    /// Takes one piece, and a look at each of the copies that it may be read from.
    pub(super) fn piece(&mut self, param: &Param, copies: usize) -> Result<(), PlanError> {
        self.pieces = self.pieces.checked_sub(1).ok_or_else(|| self.spent(param))?;
        self.look(param, copies as u64)
    }

    /// Takes a number of looks.
    pub(super) fn look(&mut self, param: &Param, count: u64) -> Result<(), PlanError> {
        self.looks = self.looks.checked_sub(count).ok_or_else(|| self.spent(param))?;
        Ok(())
    }

    fn spent(&self, param: &Param) -> PlanError {
        PlanError::TooComplex { param: param.name.clone(), max_pieces: self.max_pieces }
    }
}
