//! Every source rank's layout, indexed by logical tensor.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use crate::{Band, LayoutError, Param, RankLayout, Tensor};

/// The layouts of all source ranks, joined and indexed. Built once, used to plan every target rank.
///
/// Ranks that hold the same box of a tensor (data-parallel copies, tensors replicated over TP) are grouped as
/// replicas of it. The order in which ranks are given does not matter.
#[derive(Clone, Debug)]
pub struct SourceLayout {
    ranks: Vec<RankLayout>,
    tensors: BTreeMap<Arc<str>, Held>,
    shards: Vec<Shard>,
    replicas: Vec<Replica>,
}

/// A logical tensor that at least one source rank holds some of.
#[derive(Clone, Debug)]
struct Held {
    rows: u64,
    cols: u64,
    /// The rank that declared it first, for errors.
    rank: u32,
    shards: Range<usize>,
}

/// A box of a logical tensor that one or more ranks hold.
#[derive(Clone, Debug)]
pub(crate) struct Shard {
    pub(crate) rows: Range<u64>,
    pub(crate) cols: Range<u64>,
    replicas: Range<usize>,
}

/// One copy of a shard: indices into the ranks, their parameters, and those parameters' bands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Replica {
    pub(crate) rank: u32,
    pub(crate) param: u32,
    band: u32,
}

impl SourceLayout {
    /// Joins the layouts of all source ranks.
    ///
    /// # Errors
    /// [`LayoutError::DuplicateRank`], [`LayoutError::TensorShape`] when ranks disagree about a tensor, and
    /// [`LayoutError::TooMany`].
    pub fn new(mut ranks: Vec<RankLayout>) -> Result<Self, LayoutError> {
        ranks.sort_by_key(|layout| layout.rank);
        if let Some(pair) = ranks.windows(2).find(|pair| pair[0].rank == pair[1].rank) {
            return Err(LayoutError::DuplicateRank { rank: pair[0].rank });
        }
        let mut tensors = BTreeMap::<Arc<str>, Held>::new();
        for layout in &ranks {
            for tensor in &layout.tensors {
                declare(&mut tensors, tensor, layout.rank)?;
            }
        }
        // Number the tensors by name, then sort every band by (tensor, box, owner): equal boxes become neighbours.
        let numbers: BTreeMap<&str, usize> =
            tensors.keys().enumerate().map(|(number, name)| (name.as_ref(), number)).collect();
        let mut owned = Vec::new();
        for (rank, layout) in ranks.iter().enumerate() {
            let too_many = || LayoutError::TooMany { rank: layout.rank };
            let rank = u32::try_from(rank).map_err(|_| too_many())?;
            let local: Vec<usize> =
                layout.tensors.iter().map(|tensor| numbers[tensor.name.as_ref()]).collect();
            for (index, param) in layout.params.iter().enumerate() {
                let index = u32::try_from(index).map_err(|_| too_many())?;
                for (number, band) in param.bands.iter().enumerate() {
                    let number = u32::try_from(number).map_err(|_| too_many())?;
                    let replica = Replica { rank, param: index, band: number };
                    owned.push((local[band.tensor.0 as usize], band, replica));
                }
            }
        }
        owned.sort_unstable_by_key(|(tensor, band, replica)| {
            let Band { rows, cols, .. } = band;
            (
                *tensor,
                rows.start,
                cols.start,
                rows.end,
                cols.end,
                replica.rank,
                replica.param,
                replica.band,
            )
        });

        let mut shards = Vec::<Shard>::new();
        let mut starts = Vec::with_capacity(tensors.len());
        let mut replicas = Vec::with_capacity(owned.len());
        for (tensor, band, replica) in owned {
            let first_of_tensor = starts.len() <= tensor;
            while starts.len() <= tensor {
                starts.push(shards.len());
            }
            match shards.last_mut() {
                Some(last)
                    if !first_of_tensor && last.rows == band.rows && last.cols == band.cols =>
                {
                    last.replicas.end += 1;
                }
                _ => shards.push(Shard {
                    rows: band.rows.clone(),
                    cols: band.cols.clone(),
                    replicas: replicas.len()..replicas.len() + 1,
                }),
            }
            replicas.push(replica);
        }
        for (number, held) in tensors.values_mut().enumerate() {
            let start = starts.get(number).copied().unwrap_or(shards.len());
            let end = starts.get(number + 1).copied().unwrap_or(shards.len());
            held.shards = start..end;
        }
        Ok(Self { ranks, tensors, shards, replicas })
    }

    /// The layouts, sorted by rank.
    #[must_use]
    pub fn ranks(&self) -> &[RankLayout] {
        &self.ranks
    }

    /// Shape of the tensor as the source declares it, and its shards.
    pub(crate) fn shards_of(&self, tensor: &str) -> Option<((u64, u64), &[Shard])> {
        let held = self.tensors.get(tensor)?;
        Some(((held.rows, held.cols), &self.shards[held.shards.clone()]))
    }

    pub(crate) fn replicas_of(&self, shard: &Shard) -> &[Replica] {
        &self.replicas[shard.replicas.clone()]
    }

    pub(crate) fn param_of(&self, replica: Replica) -> &Param {
        &self.ranks[replica.rank as usize].params[replica.param as usize]
    }

    pub(crate) fn band_of(&self, replica: Replica) -> &Band {
        &self.param_of(replica).bands[replica.band as usize]
    }
}

fn declare(
    tensors: &mut BTreeMap<Arc<str>, Held>,
    tensor: &Tensor,
    rank: u32,
) -> Result<(), LayoutError> {
    match tensors.get(&tensor.name) {
        None => {
            let held = Held { rows: tensor.rows, cols: tensor.cols, rank, shards: 0..0 };
            tensors.insert(tensor.name.clone(), held);
            Ok(())
        }
        Some(known) if (known.rows, known.cols) == (tensor.rows, tensor.cols) => Ok(()),
        Some(known) => Err(LayoutError::TensorShape {
            rank: known.rank,
            tensor: tensor.name.clone(),
            rows: known.rows,
            cols: known.cols,
            other_rows: tensor.rows,
            other_cols: tensor.cols,
        }),
    }
}
