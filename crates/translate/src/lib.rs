//! What a Megatron-Core rank holds and what a vLLM rank wants, as bands; and the host reference of landing.
//!
//! A model is a list of *slots*. A slot is a [role](roles::Role) together with the names that its logical tensors
//! (Hugging Face), its trainer parameter (Megatron-Core) and its engine parameter (vLLM) go by. A role knows how
//! either framework shards one kind of parameter; a family (`families`) is nothing but a table of slots.
//!
//! ```text
//! config.json ──► ModelConfig ──► family: slots ─┬─► megatron::layout(held tensors) ─► RankLayout ─┐
//!                                                └─► vllm::layout(held tensors) ─────► RankLayout ─┴─► plan
//! ```
//!
//! A new family is a new file of slots; a new way to shard is a new file with a [`roles::Role`]. Neither touches
//! [`megatron`] or [`vllm`], which only resolve names, check shapes and element types, and see to it that every tensor
//! of both sides is accounted for.
//!
//! # Architecture invariants
//!
//! - Layouts are checked against what the frameworks report, never assumed: a tensor that no slot knows, a slot
//!   without its tensor, or a shape that the sizes do not give is an error that names it.
//! - Nothing here has seen a pointer, a file or a process: `no_std`, no unsafe, no hash map. Equal inputs give equal
//!   layouts.
//! - No input from outside panics or overflows.
//!
//! # Example
//!
//! One tensor-parallel rank of two on the trainer, the whole model on one engine rank:
//!
//! ```
//! use refit_planner::{PlanOptions, SourceLayout, plan};
//! use refit_translate::megatron::{self, SourceRank, TrainerOptions};
//! use refit_translate::vllm::{self, TargetRank};
//! use refit_translate::{Family, ModelConfig};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut config = ModelConfig::new(Family::Qwen3);
//! (config.hidden_size, config.intermediate_size, config.vocab_size) = (64, 176, 500);
//! (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) = (2, 8, 4, 16);
//!
//! let mut source = Vec::new();
//! for rank in SourceRank::grid(config.num_layers, 2, 1, 1)? {
//!     // A trainer reports what it holds; here we work out what it would.
//!     let held = megatron::expected(&config, &rank, &TrainerOptions::default())?;
//!     source.push(megatron::layout(&config, &rank, &held)?);
//! }
//! let rank = TargetRank::new(0, 0, 1);
//! let target = vllm::layout(&config, &rank, &vllm::expected(&config, &rank)?)?;
//! let plan = plan(&SourceLayout::new(source)?, &target, &PlanOptions::default())?;
//! assert_eq!(plan.coverage().target_bytes, target.bytes());
//! # Ok(()) }
//! ```

#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

extern crate alloc;

mod config;
mod error;
mod families;
mod inventory;
mod slot;
mod spec;

#[cfg(feature = "serde")]
#[cfg_attr(docsrs, doc(cfg(feature = "serde")))]
pub mod bands;
pub mod host;
pub mod megatron;
pub mod roles;
pub mod vllm;

pub use config::{Family, ModelConfig};
pub use error::{Side, TranslateError};
pub use spec::TensorSpec;
