use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use super::{
    Part, Role, Shard, SourceCoords, SourceRole, TargetCoords, TargetRole, View, plus, times, width,
};
use crate::TranslateError;
use crate::config::MAX_HEADS;

/// Query, key and value projection in one parameter, or their biases. Logical tensors: Q, K, V.
///
/// With `m = heads / kv_heads`, `hd = head_dim`:
///
/// - Trainer: rows of all ranks joined are one block per KV group, `[m query heads; K head; V head]`. A rank holds an
///   even, contiguous share of these rows, whatever it cuts: with more ranks than groups it begins inside a group,
///   maybe inside a head. Nothing is replicated.
/// - Engine: `[query heads; K heads; V heads]` of the rank. With more ranks than groups, `tp_size / kv_heads`
///   neighbouring ranks hold the same K and V head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Qkv {
    /// Query heads.
    pub heads: u64,
    /// KV groups.
    pub kv_heads: u64,
    /// Elements of a head.
    pub head_dim: u64,
    /// Columns; `None` for biases.
    pub cols: Option<u64>,
}

const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;

const HEADS: &str = "num_attention_heads";
const KV_HEADS: &str = "num_key_value_heads";
const ROWS: &str = "(num_attention_heads + 2 * num_key_value_heads) * head_dim";

impl Qkv {
    /// Refuses heads that cannot be grouped, and sizes that neither framework takes.
    pub(super) fn check(&self, tp: &Shard) -> Result<(), TranslateError> {
        let sizes = [(HEADS, self.heads), (KV_HEADS, self.kv_heads), ("head_dim", self.head_dim)];
        if let Some((what, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(TranslateError::Zero { what });
        }
        if self.kv_heads > u64::from(MAX_HEADS) {
            return Err(TranslateError::TooLarge { what: KV_HEADS, limit: MAX_HEADS.into() });
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(TranslateError::Indivisible {
                what: HEADS,
                size: self.heads,
                by_what: KV_HEADS,
                by: self.kv_heads,
            });
        }
        tp.cut(HEADS, self.heads)?;
        let by = tp.size();
        if !self.kv_heads.is_multiple_of(by) && !by.is_multiple_of(self.kv_heads) {
            return Err(TranslateError::KvHeads {
                kv_heads: self.kv_heads,
                by_what: tp.group(),
                by,
            });
        }
        Ok(())
    }

    fn part(&self, tensor: usize, rows: Range<u64>, at_row: u64) -> Part {
        Part::new(tensor, rows, 0..width(self.cols)).at_row(at_row)
    }

    /// Rows of all heads: Q, K and V together.
    fn rows(&self) -> Result<u64, TranslateError> {
        let heads = plus(ROWS, self.heads, times(ROWS, self.kv_heads, 2)?)?;
        times(ROWS, heads, self.head_dim)
    }
}

impl Role for Qkv {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        let q = times(ROWS, self.heads, self.head_dim)?;
        let kv = times(ROWS, self.kv_heads, self.head_dim)?;
        let cols = width(self.cols);
        Ok(vec![(q, cols), (kv, cols), (kv, cols)])
    }
}

impl SourceRole for Qkv {
    fn megatron(&self, at: &SourceCoords, _: Option<&[u64]>) -> Result<View, TranslateError> {
        self.check(&at.tp)?;
        // No product below can overflow: all are at most the rows of all heads.
        let share = at.tp.cut(ROWS, self.rows()?)?;
        let queries = self.heads / self.kv_heads * self.head_dim;
        let block = queries + 2 * self.head_dim;
        let mut parts = Vec::new();
        for group in share.start / block..share.end.div_ceil(block) {
            let start = group * block;
            let pieces = [
                (Q, start, queries, group * queries),
                (K, start + queries, self.head_dim, group * self.head_dim),
                (V, start + queries + self.head_dim, self.head_dim, group * self.head_dim),
            ];
            for (tensor, joined, height, logical) in pieces {
                let from = joined.max(share.start);
                let to = (joined + height).min(share.end);
                if from < to {
                    let rows = logical + (from - joined)..logical + (to - joined);
                    parts.push(self.part(tensor, rows, from - share.start));
                }
            }
        }
        let formula = "(num_attention_heads + 2 * num_key_value_heads) * head_dim / tp_size rows";
        Ok(View::new(share.end - share.start, self.cols, formula, parts))
    }
}

impl TargetRole for Qkv {
    fn vllm(&self, at: &TargetCoords) -> Result<View, TranslateError> {
        self.check(&at.tp)?;
        self.rows()?;
        let (tp, rank) = (at.tp.size(), at.tp.rank());
        let queries = self.heads / tp * self.head_dim;
        let replicas = (tp / self.kv_heads).max(1);
        let kv = (self.kv_heads / tp).max(1) * self.head_dim;
        let (q_start, kv_start) = (rank * queries, rank / replicas * kv);
        let parts = vec![
            self.part(Q, q_start..q_start + queries, 0),
            self.part(K, kv_start..kv_start + kv, queries),
            self.part(V, kv_start..kv_start + kv, queries + kv),
        ];
        let formula = "(num_attention_heads / tp_size + 2 * max(1, num_key_value_heads / tp_size)) \
                       * head_dim rows";
        Ok(View::new(queries + 2 * kv, self.cols, formula, parts))
    }
}
