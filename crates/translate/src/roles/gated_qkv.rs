use alloc::vec::Vec;

use super::{
    Part, Qkv, Role, Shard, SourceCoords, SourceRole, TargetCoords, TargetRole, View, times,
};
use crate::TranslateError;
use crate::config::MAX_HEADS;

/// Query, output gate, key and value projection in one parameter: attention whose output is gated per element.
///
/// Logical tensors: Q, K, V. Q has the gate in it: per head `[query; gate]`, `head_dim` rows each. With
/// `m = heads / kv_heads`:
///
/// - Trainer: as [`Qkv`], with blocks `[m query heads; m gate heads; K head; V head]`.
/// - Engine: as [`Qkv`] with twice the query heads, a query and its gate being two of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatedQkv {
    /// Query heads, without gates.
    pub heads: u64,
    /// KV groups.
    pub kv_heads: u64,
    /// Elements of a head.
    pub head_dim: u64,
    /// Columns; `None` for biases.
    pub cols: Option<u64>,
}

const Q: usize = 0;
const HEADS: &str = "num_attention_heads";

impl GatedQkv {
    /// The projection with queries and gates counted alike.
    fn doubled(&self) -> Result<Qkv, TranslateError> {
        let Self { kv_heads, head_dim, cols, .. } = *self;
        Ok(Qkv { heads: times(HEADS, self.heads, 2)?, kv_heads, head_dim, cols })
    }

    /// Refuses sizes that neither framework takes: a query stays with its gate.
    fn check(&self, tp: &Shard) -> Result<(), TranslateError> {
        if self.heads > MAX_HEADS.into() {
            return Err(TranslateError::TooLarge { what: HEADS, limit: MAX_HEADS.into() });
        }
        let Self { heads, kv_heads, head_dim, cols } = *self;
        Qkv { heads, kv_heads, head_dim, cols }.check(tp)
    }

    /// Cuts a part of Q, as if a group's rows were its rows in the logical tensor, into the heads that they are.
    fn heads_of(&self, part: &Part) -> Vec<Part> {
        // No product can overflow: all are at most the rows of all heads.
        let queries = self.heads / self.kv_heads * self.head_dim;
        let mut parts = Vec::new();
        let mut row = part.rows.start;
        while row < part.rows.end {
            let within = row % (2 * queries);
            let (gate, head, element) =
                (within / queries, within % queries / self.head_dim, row % self.head_dim);
            let height = (self.head_dim - element).min(part.rows.end - row);
            let logical = row - within + (2 * head + gate) * self.head_dim + element;
            let at_row = part.at_row + (row - part.rows.start);
            parts.push(Part::new(Q, logical..logical + height, part.cols.clone()).at_row(at_row));
            row += height;
        }
        parts
    }
}

impl Role for GatedQkv {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        self.doubled()?.logical()
    }
}

impl SourceRole for GatedQkv {
    fn megatron(&self, at: &SourceCoords, held: Option<&[u64]>) -> Result<View, TranslateError> {
        self.check(&at.tp)?;
        let mut view = self.doubled()?.megatron(at, held)?;
        let mut parts = Vec::new();
        for part in view.parts {
            if part.tensor == Q {
                parts.extend(self.heads_of(&part));
            } else {
                parts.push(part);
            }
        }
        view.parts = parts;
        view.formula =
            "(2 * num_attention_heads + 2 * num_key_value_heads) * head_dim / tp_size rows";
        Ok(view)
    }
}

impl TargetRole for GatedQkv {
    fn vllm(&self, at: &TargetCoords) -> Result<View, TranslateError> {
        self.check(&at.tp)?;
        let view = self.doubled()?.vllm(at)?;
        let formula = "(2 * num_attention_heads / tp_size + 2 * max(1, num_key_value_heads \
                       / tp_size)) * head_dim rows";
        Ok(View { formula, ..view })
    }
}
