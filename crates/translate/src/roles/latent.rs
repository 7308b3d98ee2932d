use alloc::vec::Vec;

use super::{Part, Role, Shard, SourceCoords, SourceRole, TargetCoords, TargetRole, View, plus};
use crate::TranslateError;

/// Down projections of multi-head latent attention: one, or several on top of each other in one parameter.
///
/// - Trainer: whole on every rank (Transformer Engine's spec), or an even share of the rows of each (the local spec,
///   and the fused layer of several). The rows that the rank holds say which.
/// - Engine: whole on every rank.
///
/// Logical tensors: the projections, in the order in which they lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latent<const N: usize> {
    /// Rows of each.
    pub rows: [u64; N],
    /// Columns of all.
    pub cols: u64,
}

const WHAT: &str = "rows of a latent projection";

impl<const N: usize> Latent<N> {
    /// A share of each, one after the other.
    fn view(&self, shard: &Shard, formula: &'static str) -> Result<View, TranslateError> {
        let (mut parts, mut height) = (Vec::with_capacity(N), 0);
        for (tensor, &rows) in self.rows.iter().enumerate() {
            let rows = shard.cut(WHAT, rows)?;
            let part = Part::new(tensor, rows.clone(), 0..self.cols);
            parts.push(part.at_row(height));
            height = plus(WHAT, height, rows.end - rows.start)?;
        }
        Ok(View::new(height, Some(self.cols), formula, parts))
    }

    fn whole(&self) -> Result<View, TranslateError> {
        self.view(
            &Shard::whole("tp_size"),
            "all rows on every rank, or an even share of each projection",
        )
    }
}

impl<const N: usize> Role for Latent<N> {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        Ok(self.rows.iter().map(|&rows| (rows, self.cols)).collect())
    }
}

impl<const N: usize> SourceRole for Latent<N> {
    fn megatron(&self, at: &SourceCoords, held: Option<&[u64]>) -> Result<View, TranslateError> {
        let formula = "the rows of each projection / tp_size";
        let Some(held) = held else {
            return if at.sharded_latents { self.view(&at.tp, formula) } else { self.whole() };
        };
        let whole = self.whole()?;
        if held == whole.shape {
            return Ok(whole);
        }
        // A shape that is neither is compared with the whole one, whose formula names both.
        match self.view(&at.tp, formula) {
            Ok(share) if held == share.shape => Ok(share),
            _ => Ok(whole),
        }
    }
}

impl<const N: usize> TargetRole for Latent<N> {
    fn vllm(&self, _: &TargetCoords) -> Result<View, TranslateError> {
        self.whole()
    }
}
