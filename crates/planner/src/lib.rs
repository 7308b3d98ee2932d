//! Two layouts in; strided segments, a coverage proof and a stable hash out; then the lowering to reads.
//!
//! Every layout, whatever framework it comes from, is a list of [`Band`]s: a box of a *logical tensor* (the
//! coordinate system both sides share) and the place of that box in one rank's local buffer. [`plan`] intersects
//! the bands of many source ranks with those of one target rank; [`lower`] turns the plan into a [`Program`] of
//! reads, landing copies and fills for a transport of given [`Capabilities`], which [`lower_for`] takes for each source.
//!
//! # Architecture invariants
//!
//! - This crate never learns what a tensor means: there is no QKV, no expert and no vocabulary here. A rule that
//!   needs an `if` on a role belongs into the bands.
//! - It never sees an address, an agent, a step or a weight. Segments hold offsets into named parameters.
//! - It cannot do IO and cannot be random: `no_std`, no unsafe, no clock, no hash map.
//! - No float decides anything; every product of extents is checked.
//!
//! # Example
//!
//! A tensor of 4 x 2 elements, row-sharded over two source ranks, wanted whole by one target rank:
//!
//! ```
//! use refit_planner::{Band, Dtype, LayoutBuilder, Param, PlanOptions, SourceLayout, plan};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let rank = |rank: u32, rows: core::ops::Range<u64>| {
//!     let mut layout = LayoutBuilder::new(rank);
//!     let w = layout.tensor("w", 4, 2)?;
//!     let height = rows.end - rows.start;
//!     layout.param(Param::new("w", Dtype::Bf16, height, 2).band(Band::new(w, rows, 0..2)))?;
//!     Ok::<_, refit_planner::LayoutError>(layout.build())
//! };
//! let source = SourceLayout::new(vec![rank(0, 0..2)?, rank(1, 2..4)?])?;
//! let plan = plan(&source, &rank(0, 0..4)?, &PlanOptions::default())?;
//! assert_eq!(plan.segments().len(), 2);
//! assert_eq!(plan.coverage().copied_bytes, 16);
//! # Ok(()) }
//! ```

#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

extern crate alloc;

mod capabilities;
mod dims;
mod dtype;
mod encode;
mod error;
mod hash;
mod layout;
mod lower;
mod names;
mod pack;
mod plan;
mod program;
#[cfg(feature = "serde")]
mod raw;
mod source;
mod transform;

pub use capabilities::{Bulk, Capabilities};
pub use dims::{Dim, Dims, Offsets};
pub use dtype::Dtype;
pub use error::{LayoutError, LowerError, PlanError};
pub use hash::Hash;
pub use layout::{Band, FillBox, LayoutBuilder, Param, RankLayout, Tensor, TensorId};
pub use lower::{LowerOptions, Mode, Policy, Position, lower, lower_for, lower_placed};
pub use pack::{PackError, PackSlot, Packed, TensorSlice, Wish, is_scattered, pack, wish};
pub use plan::{
    Coverage, Fill, Plan, PlanOptions, Replicas, Segment, SourceParam, TargetParam, plan,
    prove_disjoint, prove_tiling,
};
pub use program::{Choice, Destination, Landing, Method, Program, Read, Wave};
pub use source::SourceLayout;
pub use transform::{ElementMap, Transform};
