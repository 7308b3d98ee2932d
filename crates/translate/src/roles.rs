//! How each kind of parameter is sharded by either framework.
//!
//! One file per role. A [`Role`] holds the extents of its logical tensors and gives, for a rank's coordinates, the
//! shape that rank must hold and the [`Part`]s of the logical tensors in it. Roles know no names.

mod column;
mod gated_mlp;
mod qkv;
mod replicated;
mod row;
mod vocab;

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use refit_planner::{Band, Dtype, LayoutBuilder, Param, TensorId};

use crate::TranslateError;

pub use column::Column;
pub use gated_mlp::GatedMlp;
pub use qkv::Qkv;
pub use replicated::Replicated;
pub use row::Row;
pub use vocab::Vocab;

/// Sizes have at most 63 bits, as in the planner.
const LIMIT: u64 = i64::MAX as u64;

/// A rank's place in a group that shares out a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shard {
    group: &'static str,
    rank: u32,
    size: u32,
}

impl Shard {
    /// Place `rank` in a group of `size`; `group` names the size in errors.
    ///
    /// # Errors
    /// [`TranslateError::Zero`] and [`TranslateError::Rank`].
    pub fn new(group: &'static str, rank: u32, size: u32) -> Result<Self, TranslateError> {
        match size {
            0 => Err(TranslateError::Zero { what: group }),
            _ if rank >= size => Err(TranslateError::Rank { group, rank, size }),
            _ => Ok(Self { group, rank, size }),
        }
    }

    /// The place, from 0.
    #[must_use]
    pub fn rank(&self) -> u64 {
        self.rank.into()
    }

    /// How many places there are.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size.into()
    }

    /// What the size is called.
    #[must_use]
    pub fn group(&self) -> &'static str {
        self.group
    }

    /// This place's part of `total`: `[total / size * rank, total / size * (rank + 1))`.
    ///
    /// # Errors
    /// [`TranslateError::Indivisible`], which calls `total` by the name `what`.
    pub fn cut(&self, what: &'static str, total: u64) -> Result<Range<u64>, TranslateError> {
        let size = self.size();
        if !total.is_multiple_of(size) {
            return Err(TranslateError::Indivisible {
                what,
                size: total,
                by_what: self.group,
                by: size,
            });
        }
        let each = total / size;
        Ok(each * self.rank()..each * self.rank() + each)
    }
}

/// Where a trainer rank stands in the groups that share out parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct SourceCoords {
    /// Tensor parallelism of dense parameters.
    pub tp: Shard,
    /// Rows of the padded vocabulary over all ranks, where no held tensor says it. `None`: as few as divide evenly.
    pub padded_vocab: Option<u64>,
}

impl SourceCoords {
    /// Tensor-parallel rank `tp_rank` of `tp_size`.
    ///
    /// # Errors
    /// [`TranslateError::Zero`] and [`TranslateError::Rank`].
    pub fn new(tp_rank: u32, tp_size: u32) -> Result<Self, TranslateError> {
        Ok(Self { tp: Shard::new("megatron tp_size", tp_rank, tp_size)?, padded_vocab: None })
    }

    /// These coordinates with a known padded vocabulary.
    #[must_use]
    pub fn with_padded_vocab(mut self, rows: Option<u64>) -> Self {
        self.padded_vocab = rows;
        self
    }
}

/// Where an engine rank stands in the groups that share out parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct TargetCoords {
    /// Tensor parallelism of dense parameters.
    pub tp: Shard,
}

impl TargetCoords {
    /// Tensor-parallel rank `tp_rank` of `tp_size`.
    ///
    /// # Errors
    /// [`TranslateError::Zero`] and [`TranslateError::Rank`].
    pub fn new(tp_rank: u32, tp_size: u32) -> Result<Self, TranslateError> {
        Ok(Self { tp: Shard::new("vllm tp_size", tp_rank, tp_size)? })
    }
}

/// One way in which both frameworks lay out a kind of parameter.
pub trait Role: fmt::Debug {
    /// Rows and columns of the logical tensors, in the order in which [`Part::tensor`] counts them.
    ///
    /// # Errors
    /// [`TranslateError::TooLarge`].
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError>;

    /// What a trainer rank holds. `held` is the shape it reports: roles that the sizes alone do not decide look at it.
    ///
    /// # Errors
    /// Those that say which sizes clash: [`TranslateError::Indivisible`], [`TranslateError::KvHeads`],
    /// [`TranslateError::Vocab`], [`TranslateError::Zero`], [`TranslateError::TooLarge`].
    fn megatron(&self, at: &SourceCoords, held: Option<&[u64]>) -> Result<View, TranslateError>;

    /// What an engine rank holds.
    ///
    /// # Errors
    /// As [`Role::megatron`].
    fn vllm(&self, at: &TargetCoords) -> Result<View, TranslateError>;
}

/// A box of one of a role's logical tensors and its place in the local view; the role's form of [`Band`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which of [`Role::logical`].
    pub tensor: usize,
    /// Logical rows.
    pub rows: Range<u64>,
    /// Logical columns.
    pub cols: Range<u64>,
    /// Local row of the first element; later rows follow without a gap.
    pub at_row: u64,
}

/// What one rank holds of one parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The shape the framework reports.
    pub shape: Vec<u64>,
    /// Where `shape` comes from, for people.
    pub formula: &'static str,
    /// Rows of the two-dimensional view that parts refer to.
    pub rows: u64,
    /// Columns of it; 1 for vectors.
    pub cols: u64,
    /// The logical boxes in it. Rows of padding are in none.
    pub parts: Vec<Part>,
    /// Whole local rows that must be zero.
    pub zero_rows: Option<Range<u64>>,
}

impl View {
    /// A matrix, or a vector where `cols` is `None`.
    fn new(rows: u64, cols: Option<u64>, formula: &'static str, parts: Vec<Part>) -> Self {
        let shape = cols.map_or_else(|| vec![rows], |cols| vec![rows, cols]);
        Self { shape, formula, rows, cols: width(cols), parts, zero_rows: None }
    }

    /// Adds this view to a layout as parameter `name`, the logical tensors of `role` going by the names `logical`.
    ///
    /// # Errors
    /// [`TranslateError::LogicalNames`] and [`TranslateError::Layout`].
    pub fn place(
        &self,
        layout: &mut LayoutBuilder,
        role: &dyn Role,
        name: &Arc<str>,
        dtype: Dtype,
        logical: &[impl AsRef<str>],
    ) -> Result<(), TranslateError> {
        let extents = role.logical()?;
        let wrong_names = |got| TranslateError::LogicalNames {
            param: name.clone(),
            expected: extents.len(),
            got,
        };
        if logical.len() != extents.len() {
            return Err(wrong_names(logical.len()));
        }
        let mut ids: Vec<TensorId> = Vec::with_capacity(extents.len());
        for (tensor, &(rows, cols)) in logical.iter().zip(&extents) {
            ids.push(layout.tensor(tensor.as_ref(), rows, cols)?);
        }
        let mut param = Param::new(name.clone(), dtype, self.rows, self.cols);
        for part in &self.parts {
            let id = *ids.get(part.tensor).ok_or_else(|| wrong_names(ids.len()))?;
            param =
                param.band(Band::new(id, part.rows.clone(), part.cols.clone()).at(part.at_row, 0));
        }
        if let Some(rows) = &self.zero_rows {
            param = param.fill(rows.clone(), 0..self.cols);
        }
        layout.param(param)?;
        Ok(())
    }
}

/// Columns of the two-dimensional view of a parameter whose shape may lack them.
fn width(cols: Option<u64>) -> u64 {
    cols.unwrap_or(1)
}

/// `a * b`, or an error that calls it `what`.
fn times(what: &'static str, a: u64, b: u64) -> Result<u64, TranslateError> {
    let product = a.checked_mul(b).filter(|product| *product <= LIMIT);
    product.ok_or(TranslateError::TooLarge { what, limit: LIMIT })
}

/// `a + b`, or an error that calls it `what`.
fn plus(what: &'static str, a: u64, b: u64) -> Result<u64, TranslateError> {
    let sum = a.checked_add(b).filter(|sum| *sum <= LIMIT);
    sum.ok_or(TranslateError::TooLarge { what, limit: LIMIT })
}
