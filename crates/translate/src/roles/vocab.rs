use alloc::vec;
use alloc::vec::Vec;

use super::{LIMIT, Part, Role, SourceCoords, SourceRole, TargetCoords, TargetRole, View, times};
use crate::TranslateError;

/// vLLM pads the vocabulary to a multiple of this (`DEFAULT_VOCAB_PADDING_SIZE`).
const ENGINE_PADDING: u64 = 64;

/// Embedding and head: rows are tokens, padded by either side by its own rule.
///
/// Trainer: how far it pads depends on its arguments, so the padded size is `tp_size * local rows` of the tensor it
/// holds. Engine: `ceil(tokens / 64) * 64`. Rank `r` holds an even share, in order; rows at and above `tokens` belong
/// to no token: the trainer's are never read, the engine's are zero. A late rank may hold padding alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vocab {
    /// Tokens, without padding.
    pub tokens: u64,
    /// Columns.
    pub cols: u64,
}

impl Vocab {
    /// The share of the rank that starts at padded row `start`: the parts, and how many of its rows are tokens.
    fn parts(&self, start: u64, height: u64) -> (Vec<Part>, u64) {
        let end = start.saturating_add(height).min(self.tokens);
        if start >= end {
            return (Vec::new(), 0);
        }
        let part = Part::new(0, start..end, 0..self.cols);
        (vec![part], end - start)
    }

    /// Rows that the trainer's shard has, as far as the held tensor or the coordinates say.
    fn trainer_rows(&self, at: &SourceCoords, held: Option<&[u64]>) -> Result<u64, TranslateError> {
        match (held.and_then(<[u64]>::first), at.padded_vocab) {
            (Some(&rows), _) => Ok(rows),
            (None, Some(padded)) => {
                let share = at.tp.cut("padded_vocab", padded)?;
                Ok(share.end - share.start)
            }
            (None, None) => Ok(self.tokens.div_ceil(at.tp.size())),
        }
    }
}

impl Role for Vocab {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        Ok(vec![(self.tokens, self.cols)])
    }
}

impl SourceRole for Vocab {
    fn megatron(&self, at: &SourceCoords, held: Option<&[u64]>) -> Result<View, TranslateError> {
        let local_rows = self.trainer_rows(at, held)?;
        let padded = times("padded vocabulary", local_rows, at.tp.size())?;
        if padded < self.tokens {
            return Err(TranslateError::Vocab {
                local_rows,
                by: at.tp.size(),
                vocab_size: self.tokens,
            });
        }
        let (parts, _) = self.parts(local_rows * at.tp.rank(), local_rows);
        let formula = "[padded vocabulary / tp_size, hidden_size]";
        Ok(View::new(local_rows, Some(self.cols), formula, parts))
    }
}

impl TargetRole for Vocab {
    fn vllm(&self, at: &TargetCoords) -> Result<View, TranslateError> {
        let what = "vocab_size rounded up to a multiple of 64";
        let padded = self.tokens.checked_next_multiple_of(ENGINE_PADDING);
        let padded = padded.ok_or(TranslateError::TooLarge { what, limit: LIMIT })?;
        let share = at.tp.cut(what, padded)?;
        let height = share.end - share.start;
        let (parts, tokens) = self.parts(share.start, height);
        let formula = "[vocab_size rounded up to a multiple of 64 / tp_size, hidden_size]";
        Ok(View::new(height, Some(self.cols), formula, parts).zero(tokens..height))
    }
}
