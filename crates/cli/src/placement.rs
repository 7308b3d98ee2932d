//! Which rank runs on which GPU.

use std::fmt;

use serde::Serialize;

use crate::error::CliError;

/// The GPU of every rank of both sides, by the ordinal it has in every process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Placement {
    source: Vec<u32>,
    target: Vec<u32>,
}

/// What a person gave: a list that is cycled through by rank, or nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wish<'a> {
    pub(crate) source: &'a [u32],
    pub(crate) target: &'a [u32],
}

impl Placement {
    /// Places ranks on `gpus` GPUs.
    ///
    /// Where nothing is wished for: all on GPUs of their own if there are enough; else, with as many ranks on either
    /// side, every target beside its source; else sources on the first half of the GPUs and targets on the second.
    ///
    /// # Errors
    /// [`CliError::Usage`] without GPUs, and for one that there is not.
    pub(crate) fn new(
        gpus: u32,
        sources: u32,
        targets: u32,
        wish: Wish<'_>,
    ) -> Result<Self, CliError> {
        if gpus == 0 {
            let text = "this machine has no GPU that CUDA can use; leave --device cuda out, or look at nvidia-smi and \
                        CUDA_VISIBLE_DEVICES";
            return Err(CliError::Usage(text.to_owned()));
        }
        for (option, list) in [("--source-devices", wish.source), ("--target-devices", wish.target)]
        {
            if let Some(gpu) = list.iter().find(|&&gpu| gpu >= gpus) {
                return Err(CliError::Usage(format!(
                    "{option} {gpu}: this machine has {gpus}, counted from 0"
                )));
            }
        }
        let half = gpus / 2;
        let choose = |list: &[u32], rank: u32, default: u32| {
            if list.is_empty() { default } else { list[rank as usize % list.len()] }
        };
        let source = |rank| {
            let default = if sources.saturating_add(targets) <= gpus {
                rank
            } else if sources == targets {
                rank % gpus
            } else {
                rank % half.max(1)
            };
            choose(wish.source, rank, default)
        };
        let target = |rank| {
            let default = if sources.saturating_add(targets) <= gpus {
                sources + rank
            } else if sources == targets {
                (rank + 1) % gpus
            } else {
                half + rank % (gpus - half)
            };
            choose(wish.target, rank, default)
        };
        Ok(Self {
            source: (0..sources).map(source).collect(),
            target: (0..targets).map(target).collect(),
        })
    }

    pub(crate) fn source(&self, rank: u32) -> Option<u32> {
        self.source.get(rank as usize).copied()
    }

    pub(crate) fn target(&self, rank: u32) -> Option<u32> {
        self.target.get(rank as usize).copied()
    }

    /// Every GPU that has a rank, once.
    pub(crate) fn gpus(&self) -> Vec<u32> {
        let mut gpus: Vec<u32> = self.source.iter().chain(&self.target).copied().collect();
        gpus.sort_unstable();
        gpus.dedup();
        gpus
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |gpus: &[u32]| gpus.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        write!(f, "sources on GPU {}; targets on GPU {}", list(&self.source), list(&self.target))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(gpus: u32, sources: u32, targets: u32) -> (Vec<u32>, Vec<u32>) {
        let placed = Placement::new(gpus, sources, targets, Wish::default()).unwrap();
        (placed.source, placed.target)
    }

    #[test]
    fn ranks_are_apart_where_that_is_possible() {
        for (gpus, sources, targets, placed) in [
            (2, 1, 1, (vec![0], vec![1])),
            (8, 4, 2, (vec![0, 1, 2, 3], vec![4, 5])),
            (4, 2, 2, (vec![0, 1], vec![2, 3])),
            // Every rank reads from a neighbour.
            (2, 2, 2, (vec![0, 1], vec![1, 0])),
            (4, 3, 3, (vec![0, 1, 2], vec![1, 2, 3])),
            (2, 4, 4, (vec![0, 1, 0, 1], vec![1, 0, 1, 0])),
            // Halves.
            (4, 4, 2, (vec![0, 1, 0, 1], vec![2, 3])),
            (2, 2, 1, (vec![0, 0], vec![1])),
            (3, 4, 2, (vec![0, 0, 0, 0], vec![1, 2])),
            (1, 1, 1, (vec![0], vec![0])),
            (1, 4, 2, (vec![0, 0, 0, 0], vec![0, 0])),
        ] {
            assert_eq!(place(gpus, sources, targets), placed, "{gpus} {sources} {targets}");
        }
    }

    #[test]
    fn wishes_are_cycled_through() {
        let wish = Wish { source: &[2, 0], target: &[] };
        let placed = Placement::new(4, 3, 3, wish).unwrap();
        assert_eq!((placed.source, placed.target), (vec![2, 0, 2], vec![1, 2, 3]));
    }

    #[test]
    fn gpus_that_are_not_there_are_refused() {
        let error = Placement::new(0, 1, 1, Wish::default()).unwrap_err().to_string();
        assert!(error.contains("no GPU"), "{error}");
        let wish = Wish { source: &[], target: &[1, 2] };
        let error = Placement::new(2, 1, 1, wish).unwrap_err().to_string();
        assert_eq!(error, "--target-devices 2: this machine has 2, counted from 0");
    }

    /// Any legal numbers place every rank on a GPU that exists.
    #[test]
    fn every_rank_has_a_gpu() {
        for gpus in 1..9 {
            for sources in 1..9 {
                for targets in 1..9 {
                    let (source, target) = place(gpus, sources, targets);
                    assert_eq!((source.len(), target.len()), (sources as usize, targets as usize));
                    assert!(source.iter().chain(&target).all(|&gpu| gpu < gpus));
                }
            }
        }
    }
}
