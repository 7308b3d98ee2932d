use alloc::vec;
use alloc::vec::Vec;

use super::blocks::{self, Block};
use super::{Role, SourceCoords, SourceRole, TargetCoords, TargetRole, View, plus, times};
use crate::{Gdn, TranslateError};

/// How a checkpoint stores the input projections of gated delta net layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GdnLayout {
    /// Two tensors, per key head: `in_proj_qkvz` is `[q; k; v; z]` and `in_proj_ba` is `[b; a]` of that head and its
    /// value heads, head after head. Qwen3-Next.
    Interleaved,
    /// Four tensors over all heads: `in_proj_qkv` is `[q; k; v]`, then `in_proj_z`, `in_proj_b`, `in_proj_a`. Qwen3.5.
    Flat,
}

/// Input projection of a gated delta net layer as the trainer has it: `[q; k; v; z; b; a]`, each block shared out by
/// heads on its own.
///
/// A key head has `key_head_dim` rows in `q` and in `k`; a value head `value_head_dim` in `v` and in `z`, one in `b`
/// and in `a`. Logical tensors: `in_proj_qkvz`, `in_proj_ba`, or `in_proj_qkv`, `in_proj_z`, `in_proj_b`, `in_proj_a`;
/// see [`GdnLayout`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GdnInProj {
    /// Heads.
    pub sizes: Gdn,
    /// How the checkpoint stores them.
    pub layout: GdnLayout,
    /// Columns.
    pub cols: u64,
}

/// Queries, keys, values and their gates `z` as the engine has them: [`GdnInProj`] without `b` and `a`, in the
/// checkpoint's order of rows. Logical tensors: `in_proj_qkvz`, or `in_proj_qkv`, `in_proj_z`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GdnQkvz(pub GdnInProj);

/// `b` and `a` as the engine has them, in the checkpoint's order of rows. Logical tensors: `in_proj_ba`, or
/// `in_proj_b`, `in_proj_a`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GdnBa(pub GdnInProj);

pub(super) const KEY_HEADS: &str = "linear_num_key_heads";
pub(super) const VALUE_HEADS: &str = "linear_num_value_heads";
const ROWS: &str = "rows of a gated delta net input projection";

/// Rows of the checkpoint's tensors.
struct Rows {
    /// Of all query heads, which are as many as key heads.
    keys: u64,
    /// Of all value heads.
    values: u64,
    /// Value heads of a key head.
    each: u64,
    /// Their rows.
    group: u64,
    /// Of `in_proj_qkvz` for one key head.
    qkvz: u64,
    /// Of `in_proj_ba` for one key head.
    ba: u64,
}

impl GdnInProj {
    fn rows(&self) -> Result<Rows, TranslateError> {
        let Gdn { key_heads, value_heads, key_head_dim, value_head_dim, .. } = self.sizes;
        if key_heads == 0 {
            return Err(TranslateError::Zero { what: KEY_HEADS });
        }
        if !value_heads.is_multiple_of(key_heads) {
            return Err(TranslateError::Indivisible {
                what: VALUE_HEADS,
                size: value_heads,
                by_what: KEY_HEADS,
                by: key_heads,
            });
        }
        let each = value_heads / key_heads;
        let group = times(ROWS, each, value_head_dim)?;
        Ok(Rows {
            keys: times(ROWS, key_heads, key_head_dim)?,
            values: times(ROWS, value_heads, value_head_dim)?,
            each,
            group,
            qkvz: times(ROWS, plus(ROWS, key_head_dim, group)?, 2)?,
            ba: times(ROWS, each, 2)?,
        })
    }

    /// The trainer's blocks.
    fn blocks(&self) -> Result<[Block; 6], TranslateError> {
        let Gdn { key_heads, value_heads, key_head_dim, value_head_dim, .. } = self.sizes;
        let rows = self.rows()?;
        Ok(match self.layout {
            GdnLayout::Interleaved => {
                let qkvz = |each, start| {
                    Block::new(0, KEY_HEADS, (key_heads, each), start).every(rows.qkvz)
                };
                let ba =
                    |start| Block::new(1, KEY_HEADS, (key_heads, rows.each), start).every(rows.ba);
                let values = plus(ROWS, key_head_dim, key_head_dim)?;
                [
                    qkvz(key_head_dim, 0),
                    qkvz(key_head_dim, key_head_dim),
                    qkvz(rows.group, values),
                    qkvz(rows.group, plus(ROWS, values, rows.group)?),
                    ba(0),
                    ba(rows.each),
                ]
            }
            GdnLayout::Flat => {
                let (keys, values) = ((key_heads, key_head_dim), (value_heads, value_head_dim));
                [
                    Block::new(0, KEY_HEADS, keys, 0),
                    Block::new(0, KEY_HEADS, keys, rows.keys),
                    Block::new(0, VALUE_HEADS, values, plus(ROWS, rows.keys, rows.keys)?),
                    Block::new(1, VALUE_HEADS, values, 0),
                    Block::new(2, VALUE_HEADS, (value_heads, 1), 0),
                    Block::new(3, VALUE_HEADS, (value_heads, 1), 0),
                ]
            }
        })
    }
}

impl Role for GdnInProj {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        Ok([GdnQkvz(*self).logical()?, GdnBa(*self).logical()?].concat())
    }
}

impl SourceRole for GdnInProj {
    fn megatron(&self, at: &SourceCoords, _: Option<&[u64]>) -> Result<View, TranslateError> {
        let formula = "(2 * linear_num_key_heads * linear_key_head_dim + 2 * linear_num_value_heads \
                       * (linear_value_head_dim + 1)) / tp_size rows";
        blocks::view(&self.blocks()?, Some(self.cols), &at.tp, formula)
    }
}

impl Role for GdnQkvz {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        let Self(GdnInProj { sizes, layout, cols }) = *self;
        let rows = self.0.rows()?;
        Ok(match layout {
            GdnLayout::Interleaved => vec![(times(ROWS, sizes.key_heads, rows.qkvz)?, cols)],
            GdnLayout::Flat => {
                let qkv = plus(ROWS, times(ROWS, rows.keys, 2)?, rows.values)?;
                vec![(qkv, cols), (rows.values, cols)]
            }
        })
    }
}

impl TargetRole for GdnQkvz {
    fn vllm(&self, at: &TargetCoords) -> Result<View, TranslateError> {
        let Self(GdnInProj { sizes, layout, cols }) = *self;
        let formula = "2 * (linear_num_key_heads * linear_key_head_dim + linear_num_value_heads \
                       * linear_value_head_dim) / tp_size rows";
        match layout {
            GdnLayout::Interleaved => {
                let heads = (sizes.key_heads, self.0.rows()?.qkvz);
                blocks::view(&[Block::new(0, KEY_HEADS, heads, 0)], Some(cols), &at.tp, formula)
            }
            GdnLayout::Flat => {
                let [q, k, v, z, _, _] = self.0.blocks()?;
                blocks::view(&[q, k, v, z], Some(cols), &at.tp, formula)
            }
        }
    }
}

impl Role for GdnBa {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        let Self(GdnInProj { sizes, layout, cols }) = *self;
        let rows = self.0.rows()?;
        Ok(match layout {
            GdnLayout::Interleaved => vec![(times(ROWS, sizes.key_heads, rows.ba)?, cols)],
            GdnLayout::Flat => vec![(sizes.value_heads, cols); 2],
        })
    }
}

impl TargetRole for GdnBa {
    fn vllm(&self, at: &TargetCoords) -> Result<View, TranslateError> {
        let Self(GdnInProj { sizes, layout, cols }) = *self;
        let formula = "2 * linear_num_value_heads / tp_size rows";
        let block = |tensor, heads| Block::new(tensor, VALUE_HEADS, (heads, 1), 0);
        match layout {
            GdnLayout::Interleaved => {
                let heads = (sizes.key_heads, self.0.rows()?.ba);
                blocks::view(&[Block::new(0, KEY_HEADS, heads, 0)], Some(cols), &at.tp, formula)
            }
            GdnLayout::Flat => {
                let ba = [block(0, sizes.value_heads), block(1, sizes.value_heads)];
                blocks::view(&ba, Some(cols), &at.tp, formula)
            }
        }
    }
}
