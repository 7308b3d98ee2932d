use alloc::vec;
use alloc::vec::Vec;

use super::blocks::{self, Block};
use super::gdn_in_proj::{KEY_HEADS, VALUE_HEADS};
use super::{Role, Shard, SourceCoords, SourceRole, TargetCoords, TargetRole, View, times};
use crate::{Gdn, TranslateError};

/// Convolution of a gated delta net layer, `[channels, 1, conv_kernel]`. Logical tensors: that of all ranks.
///
/// The channels are `[q; k; v]` on both sides, each block shared out by heads on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GdnConv {
    /// Heads and the width of the convolution.
    pub sizes: Gdn,
}

const ROWS: &str = "channels of a gated delta net convolution";

impl GdnConv {
    /// The blocks, and the channels of all of them.
    fn blocks(&self) -> Result<([Block; 3], u64), TranslateError> {
        let Gdn { key_heads, value_heads, key_head_dim, value_head_dim, .. } = self.sizes;
        let keys = times(ROWS, key_heads, key_head_dim)?;
        let values = times(ROWS, value_heads, value_head_dim)?;
        let ([q, k, v], rows) = blocks::starts(ROWS, [keys, keys, values])?;
        let blocks = [
            Block::new(0, KEY_HEADS, (key_heads, key_head_dim), q),
            Block::new(0, KEY_HEADS, (key_heads, key_head_dim), k),
            Block::new(0, VALUE_HEADS, (value_heads, value_head_dim), v),
        ];
        Ok((blocks, rows))
    }

    fn view(&self, tp: &Shard) -> Result<View, TranslateError> {
        let kernel = Some(self.sizes.conv_kernel);
        let formula = "(2 * linear_num_key_heads * linear_key_head_dim + linear_num_value_heads \
                       * linear_value_head_dim) / tp_size channels";
        Ok(blocks::view(&self.blocks()?.0, kernel, tp, formula)?.depthwise(kernel))
    }
}

impl Role for GdnConv {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        Ok(vec![(self.blocks()?.1, self.sizes.conv_kernel)])
    }
}

impl SourceRole for GdnConv {
    fn megatron(&self, at: &SourceCoords, _: Option<&[u64]>) -> Result<View, TranslateError> {
        self.view(&at.tp)
    }
}

impl TargetRole for GdnConv {
    fn vllm(&self, at: &TargetCoords) -> Result<View, TranslateError> {
        self.view(&at.tp)
    }
}
