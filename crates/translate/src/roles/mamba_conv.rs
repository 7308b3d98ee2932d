use alloc::vec;
use alloc::vec::Vec;

use super::blocks::{self, Block};
use super::mamba_in_proj::{GROUPS, HEADS, whole_groups};
use super::{Role, Shard, SourceCoords, SourceRole, TargetCoords, TargetRole, View, times, width};
use crate::{Mamba, TranslateError};

/// Convolution of a Mamba-2 layer, `[channels, 1, conv_kernel]`, or its bias. Logical tensors: that of all ranks.
///
/// The channels are `[x; B; C]`, shared out as in [`MambaInProj`](super::MambaInProj).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MambaConv {
    /// Heads and groups.
    pub sizes: Mamba,
    /// Width of the convolution; `None` for the bias.
    pub kernel: Option<u64>,
}

const ROWS: &str = "channels of a Mamba convolution";

impl MambaConv {
    /// The blocks, and the channels of all of them.
    fn blocks(&self, whole_groups: bool) -> Result<([Block; 3], u64), TranslateError> {
        let Mamba { heads, head_dim, groups, state, .. } = self.sizes;
        let (inner, group) = (times(ROWS, heads, head_dim)?, times(ROWS, groups, state)?);
        let ([x, b, c], rows) = blocks::starts(ROWS, [inner, group, group])?;
        let blocks = [
            Block::new(0, HEADS, (heads, head_dim), x),
            Block::new(0, GROUPS, (groups, state), b).whole_if(whole_groups),
            Block::new(0, GROUPS, (groups, state), c).whole_if(whole_groups),
        ];
        Ok((blocks, rows))
    }

    fn view(&self, tp: &Shard, whole_groups: bool) -> Result<View, TranslateError> {
        let formula = "(mamba_num_heads * mamba_head_dim + 2 * n_groups * ssm_state_size) / tp_size \
                       channels; a single group whole on every engine rank";
        Ok(blocks::view(&self.blocks(whole_groups)?.0, self.kernel, tp, formula)?
            .depthwise(self.kernel))
    }
}

impl Role for MambaConv {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        Ok(vec![(self.blocks(false)?.1, width(self.kernel))])
    }
}

impl SourceRole for MambaConv {
    fn megatron(&self, at: &SourceCoords, _: Option<&[u64]>) -> Result<View, TranslateError> {
        self.view(&at.tp, false)
    }
}

impl TargetRole for MambaConv {
    fn vllm(&self, at: &TargetCoords) -> Result<View, TranslateError> {
        self.view(&at.tp, whole_groups(&self.sizes, at))
    }
}
