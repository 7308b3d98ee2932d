use alloc::vec;
use alloc::vec::Vec;

use super::blocks::{self, Block};
use super::{Role, Shard, SourceCoords, SourceRole, TargetCoords, TargetRole, View, times, width};
use crate::{Mamba, TranslateError};

/// Input projection of a Mamba-2 layer: `[z; x; B; C; dt]`. Logical tensors: that of all ranks.
///
/// Every block is shared out on its own: `z` and `x` (`head_dim` rows per head) and `dt` (one) by heads, `B` and `C`
/// (`state` rows per group) by groups. An engine with a single group and several ranks holds `B` and `C` on each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MambaInProj {
    /// Heads and groups.
    pub sizes: Mamba,
    /// Columns.
    pub cols: u64,
}

pub(super) const HEADS: &str = "mamba_num_heads";
pub(super) const GROUPS: &str = "n_groups";
const ROWS: &str = "rows of a Mamba input projection";

impl MambaInProj {
    /// The blocks, and the rows of all of them.
    fn blocks(&self, whole_groups: bool) -> Result<([Block; 5], u64), TranslateError> {
        let Mamba { heads, head_dim, groups, state, .. } = self.sizes;
        let (inner, group) = (times(ROWS, heads, head_dim)?, times(ROWS, groups, state)?);
        let ([z, x, b, c, dt], rows) = blocks::starts(ROWS, [inner, inner, group, group, heads])?;
        let blocks = [
            Block::new(0, HEADS, (heads, head_dim), z),
            Block::new(0, HEADS, (heads, head_dim), x),
            Block::new(0, GROUPS, (groups, state), b).whole_if(whole_groups),
            Block::new(0, GROUPS, (groups, state), c).whole_if(whole_groups),
            Block::new(0, HEADS, (heads, 1), dt),
        ];
        Ok((blocks, rows))
    }

    fn view(&self, tp: &Shard, whole_groups: bool) -> Result<View, TranslateError> {
        let formula = "(2 * mamba_num_heads * mamba_head_dim + 2 * n_groups * ssm_state_size \
                       + mamba_num_heads) / tp_size rows; a single group whole on every engine rank";
        blocks::view(&self.blocks(whole_groups)?.0, Some(self.cols), tp, formula)
    }
}

/// Whether engine ranks hold all groups each, because there is one and several ranks.
pub(super) fn whole_groups(sizes: &Mamba, at: &TargetCoords) -> bool {
    sizes.groups == 1 && at.tp.size() > 1
}

impl Role for MambaInProj {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        Ok(vec![(self.blocks(false)?.1, width(Some(self.cols)))])
    }
}

impl SourceRole for MambaInProj {
    fn megatron(&self, at: &SourceCoords, _: Option<&[u64]>) -> Result<View, TranslateError> {
        self.view(&at.tp, false)
    }
}

impl TargetRole for MambaInProj {
    fn vllm(&self, at: &TargetCoords) -> Result<View, TranslateError> {
        self.view(&at.tp, whole_groups(&self.sizes, at))
    }
}
