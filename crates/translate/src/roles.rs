//! How each kind of parameter is sharded by either framework.
//!
//! One file per role. A [`Role`] holds the extents of its logical tensors; as a [`SourceRole`] it says what a trainer
//! rank holds at its coordinates, as a [`TargetRole`] what an engine rank holds: the shape, and the [`Part`]s of the
//! logical tensors in it. Roles that both frameworks have in common are both. Roles know no names.
//!
//! [`Over`] moves a role to the experts' groups, [`Stack`] puts one parameter per expert into one of all.

mod blocks;
mod column;
mod coords;
mod first_rank;
mod gated_mlp;
mod gated_qkv;
mod gdn_conv;
mod gdn_in_proj;
mod interleaved_mlp;
mod mamba_conv;
mod mamba_in_proj;
mod over;
mod qkv;
mod replicated;
mod row;
mod stack;
mod view;
mod vocab;

use alloc::vec::Vec;
use core::fmt;

use crate::TranslateError;

pub use column::Column;
pub use coords::{ExpertNames, Group, Placement, Shard, SourceCoords, TargetCoords};
pub use first_rank::FirstRank;
pub use gated_mlp::GatedMlp;
pub use gated_qkv::GatedQkv;
pub use gdn_conv::GdnConv;
pub use gdn_in_proj::{GdnBa, GdnInProj, GdnLayout, GdnQkvz};
pub use interleaved_mlp::InterleavedMlp;
pub use mamba_conv::MambaConv;
pub use mamba_in_proj::MambaInProj;
pub use over::Over;
pub use qkv::Qkv;
pub use replicated::Replicated;
pub use row::Row;
pub use stack::Stack;
pub use view::{Part, View};
pub use vocab::Vocab;

/// Sizes have at most 63 bits, as in the planner.
const LIMIT: u64 = i64::MAX as u64;

/// One kind of parameter: which logical (Hugging Face) tensors are in it.
pub trait Role: fmt::Debug {
    /// Rows and columns of the logical tensors, in the order in which [`Part::tensor`] counts them.
    ///
    /// # Errors
    /// [`TranslateError::TooLarge`] and [`TranslateError::Zero`].
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError>;
}

/// How trainer ranks hold a kind of parameter.
pub trait SourceRole: Role {
    /// What a trainer rank holds. `held` is the shape it reports: roles that the sizes alone do not decide look at it.
    ///
    /// # Errors
    /// Those that say which sizes clash: [`TranslateError::Indivisible`], [`TranslateError::KvHeads`],
    /// [`TranslateError::Vocab`], [`TranslateError::Zero`], [`TranslateError::TooLarge`].
    fn megatron(&self, at: &SourceCoords, held: Option<&[u64]>) -> Result<View, TranslateError>;
}

/// How engine ranks hold a kind of parameter.
pub trait TargetRole: Role {
    /// What an engine rank holds.
    ///
    /// # Errors
    /// As [`SourceRole::megatron`].
    fn vllm(&self, at: &TargetCoords) -> Result<View, TranslateError>;
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
