//! What a Megatron-Core rank holds and what a vLLM rank wants, as bands; and the host reference of landing.
//!
//! A model is a list of *slots*, one per parameter of a rank. A slot is a [role](roles::Role) together with the name
//! that its framework has for the parameter and the names of the logical tensors (Hugging Face) in it. A role knows how
//! a framework shards one kind of parameter; a family (`families`) is a table of slots. The two sides are separate
//! lists that meet only in logical names: the experts of a layer are many trainer parameters and one engine parameter,
//! other projections the other way round.
//!
//! ```text
//!                                     ┌─► source slots ─► megatron::layout(held tensors) ─► RankLayout ─┐
//! config.json ─► ModelConfig ─► family┤                                                                 ├─► plan
//!                                     └─► target slots ─► vllm::layout(held tensors) ─────► RankLayout ─┘
//! ```
//!
//! # Adding a family
//!
//! A family is one file in `families/`, with a role per file in `roles/` for what no role says yet. Nothing else knows
//! of it: neither touches [`megatron`] or [`vllm`], which only resolve names, check shapes and element types, and see to
//! it that every tensor of both sides is accounted for.
//!
//! 1. `families/<name>.rs` has a `Description`: the architecture and model type, `fixed` (facts that never vary), `read`
//!    (its keys of `config.json`), `check` (what it needs of [`ModelConfig`]) and three functions that fill in slots:
//!    `first` (before the layers), `layer`, `last` (behind them). `families/dense.rs` is the model to follow.
//! 2. `families.rs` gets a `mod` line and one entry in the list of families: documentation and name of the [`Family`],
//!    and the `Description`.
//! 3. Facts that dense decoders lack are a group: a struct in `config/<group>.rs` with its own `validate` and its own
//!    `read` (behind the feature `serde`), an optional field of [`ModelConfig`] and an accessor that refuses its absence
//!    ([`Moe`], [`Mla`]).
//! 4. In the tests: a line in `ROLES` of `tests/translate/roles.rs` per golden role, golden cases in
//!    `tests/golden/models`. Cases are found by themselves; those of families nobody has described are printed as not
//!    covered.
//!
//! **`read`.** `Json::keys` parses the file into a structure of options that declares the keys this file of code knows,
//! so families do not share a list of keys. What is common (sizes, type, tied head; a quantised checkpoint is refused)
//! has been read before. `required` and `refusal` make the errors. Refuse every value that would change the layout.
//!
//! **Slots.** `Slots` holds the slots of one rank of one side. Names are relative to a scope, which is set before each
//! call: for `first` and `last` none, for a layer `decoder.layers.{local}.` on the trainer's side and
//! `model.layers.{global}.` for logical names and the engine's. `Slots::scope` sets another; a model chunk's prefix is
//! taken care of.
//!
//! | to say | write |
//! |---|---|
//! | both sides have it, with the same logical tensors | `slots.pair(role, [logical, ..], megatron, vllm)` |
//! | only one side, or each in its own way | `slots.source(role, [logical, ..], megatron)`, `slots.target(role, [logical, ..], vllm)` |
//! | which experts are local, how they are called | `match slots.place() { Place::Source(at) => .., Place::Target(at) => .. }`, with [`SourceCoords::experts`](roles::SourceCoords::experts), [`TargetCoords::experts`](roles::TargetCoords::experts), [`ExpertNames::prefix`](roles::ExpertNames::prefix) |
//! | another name in Megatron's local spec, in other releases | `te("..").local("..").also("..")` in place of the name |
//! | one fused parameter or several, whichever the rank has | `slots.either(&[&\|slots\| .., &\|slots\| ..])`, trainer only |
//! | an element type of its own (fp32 in a bf16 model) | `.dtype(Dtype::F32)` behind any of them |
//! | something else is stored than the logical value (`A` for `A_log`) | `.map(ElementMap::NegExp)` on that side's slot |
//! | a second name for what another slot provides, which may be absent | `.copy()`, or `slots.copies(..)` for several |
//! | the engine derives something from it when it loads | `.refresh(Refresh::..)`, see [`PostAction`] |
//! | a trainer must not have it, for a reason | `.unwanted("..")` |
//!
//! `slots.source` adds nothing on the engine's side and `slots.target` nothing on the trainer's, so one function says
//! both. A source slot that no target wants is fine; a target slot needs every logical element from some source. Logical
//! tensors of one name must have one shape on both sides, so write each family's logical names once. Names may be
//! `&'static str` or `String`. `families/blocks.rs` has what decoders share: embedding, head, attention, dense MLP.
//! `families/blocks/experts.rs` has mixtures of experts: `Experts { score_bias: true, shared: Some(Shared { .. }),
//! ..Experts::MLP }.slots(config, slots)?`, or `PerExpert` for a layer that does not fit.
//!
//! **Roles.** [`roles::Role`] gives the logical extents, [`roles::SourceRole`] the [`roles::View`] of a trainer rank
//! (with the shape it reports, where sizes alone do not decide), [`roles::TargetRole`] that of an engine rank. A view is
//! two-dimensional; [`roles::View::shaped`] gives it the reported shape, [`roles::View::zero`] rows of zeros,
//! [`roles::Part::row_step`] interleaved rows, [`roles::Part::at_col`] a column offset. Roles see their shard as
//! `at.tp`. [`roles::Over`] gives them the experts' groups instead, and [`roles::Stack`] puts one parameter per local
//! expert into `[experts, ..]`: gated experts are `Over::routed_experts(GatedMlp { .. })` per trainer parameter and
//! `Stack { count, each: Over::routed_experts(GatedMlp { .. }) }` for `w13`; `w2` is the same with [`roles::Row`].
//!
//! **Hybrid models.** [`ModelConfig::pattern`] has the kind of every layer: `check_pattern` says which a family has,
//! `read_pattern` reads them, `kind` tells the one of a layer. Parameters of several blocks of rows, each shared out by
//! heads of its own, are lists of `roles/blocks.rs`' blocks.
//!
//! **Models beside the main one.** `Description::mtp` has the slots of a layer that predicts tokens further ahead: source
//! slots of the ranks that say they have some ([`SourceRank::mtp`](megatron::SourceRank::mtp)), target slots of the
//! engine's draft model ([`EngineModel::Draft`](vllm::EngineModel::Draft)). The main model wants none of them.
//!
//! **Blockwise FP8.** `Description::block_fp8` tells by logical name which tensors are quantised in such models. Their
//! parameters get a second one, of scales, whose bands follow from the first one's; no role and no slot says so.
//!
//! **Values.** Bytes are copied or cast between floats. Where a framework stores something else than the logical value,
//! the slot's `map` says how to get from what the trainer stores to the logical value, or from that to what the engine
//! stores; one side at most may map.
//!
//! # Architecture invariants
//!
//! - Layouts are checked against what the frameworks report, never assumed: a tensor that no slot knows, a slot
//!   without its tensor, or a shape that the sizes do not give is an error that names it. What names and shapes cannot
//!   show is reported ([`megatron::TrainerFacts`], [`vllm::EngineFacts`]) and refused for a [`Reason`].
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
//! let plan = plan(&SourceLayout::new(source)?, &target.layout, &PlanOptions::default())?;
//! assert_eq!(plan.coverage().target_bytes, target.layout.bytes());
//! # Ok(()) }
//! ```

#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

extern crate alloc;

mod blockwise;
mod config;
mod error;
mod families;
mod inventory;
mod post;
mod refusal;
mod slots;
mod spec;

#[cfg(feature = "serde")]
#[cfg_attr(docsrs, doc(cfg(feature = "serde")))]
pub mod bands;
pub mod host;
pub mod megatron;
pub mod roles;
pub mod shards;
pub mod vllm;

pub use config::{Gdn, LayerKind, Mamba, Mla, ModelConfig, Moe};
pub use error::{Side, TranslateError};
pub use families::Family;
pub use post::{PostAction, TargetLayout};
pub use refusal::{Reason, Refusal};
pub use spec::TensorSpec;
