use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use refit_planner::{Dtype, LayoutError};

use crate::Refusal;

/// Which side of a refit an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The trainer.
    Megatron,
    /// The engine.
    Vllm,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Megatron => "megatron",
            Self::Vllm => "vllm",
        })
    }
}

/// Why a model, its parallel sizes and the tensors a rank holds do not make a layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TranslateError {
    /// The text is not the JSON of a model configuration.
    #[error("config.json, line {line}, column {column}: {message}")]
    Json {
        /// Line, from 1; 0 when unknown.
        line: usize,
        /// Column, from 1; 0 when unknown.
        column: usize,
        /// What the parser says.
        message: String,
    },
    /// A model family that has no table of slots.
    #[error("model `{found}` is not supported; supported: {supported}")]
    UnsupportedModel {
        /// The architecture or model type found.
        found: String,
        /// What would have been taken.
        supported: String,
    },
    /// A configuration fact that changes the layout in a way that is not described here.
    #[error("config.json has `{key}` = {value}: {why}")]
    UnsupportedConfig {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// Why it is refused.
        why: &'static str,
    },
    /// A configuration key that cannot be done without.
    #[error(
        "config.json has no `{key}`, and its default differs between families and releases; state it"
    )]
    MissingKey {
        /// The key.
        key: &'static str,
    },
    /// A size that must not be zero.
    #[error("`{what}` is 0")]
    Zero {
        /// The size.
        what: &'static str,
    },
    /// A size beyond what any model has, or one whose products do not fit in 63 bits.
    #[error("`{what}` or a size made from it is too large (limit {limit})")]
    TooLarge {
        /// The size.
        what: &'static str,
        /// The largest value taken.
        limit: u64,
    },
    /// A size that cannot be split evenly as it has to be.
    #[error("{what} = {size} cannot be split evenly by {by_what} = {by}")]
    Indivisible {
        /// What is split.
        what: &'static str,
        /// Its size.
        size: u64,
        /// What it is split by.
        by_what: &'static str,
        /// How many parts.
        by: u64,
    },
    /// Key-value heads and tensor-parallel size of which neither divides the other.
    #[error(
        "num_key_value_heads = {kv_heads} and {by_what} = {by}: one of them must divide the other"
    )]
    KvHeads {
        /// Key-value heads.
        kv_heads: u64,
        /// Which parallel size.
        by_what: &'static str,
        /// Its value.
        by: u64,
    },
    /// A family without a group of facts that its layout follows from.
    #[error("{family} needs `ModelConfig::{group}`, which is None")]
    MissingGroup {
        /// The Hugging Face architecture.
        family: &'static str,
        /// The field of [`ModelConfig`](crate::ModelConfig).
        group: &'static str,
    },
    /// Fewer experts than ranks that share them out whole.
    #[error("{experts} experts leave some of {ranks} expert-parallel ranks without one")]
    TooFewExperts {
        /// Routed experts of a layer.
        experts: u64,
        /// Ranks.
        ranks: u64,
    },
    /// Settings that exclude each other.
    #[error("{what}: {why}")]
    Combination {
        /// What was asked for.
        what: &'static str,
        /// What it takes.
        why: &'static str,
    },
    /// A coordinate outside its group.
    #[error("rank {rank} lies outside {group} = {size}")]
    Rank {
        /// The size that counts the group's ranks.
        group: &'static str,
        /// The coordinate.
        rank: u32,
        /// The size of the group.
        size: u32,
    },
    /// A local layer that the model does not have.
    #[error("megatron rank {rank} lists layer {layer}, but the model has layers 0..{layers}")]
    LayerRange {
        /// The rank.
        rank: u32,
        /// The global index it lists.
        layer: u32,
        /// How many layers there are.
        layers: u32,
    },
    /// A layer listed twice by one rank.
    #[error("megatron rank {rank} lists layer {layer} twice")]
    DuplicateLayer {
        /// The rank.
        rank: u32,
        /// The global index.
        layer: u32,
    },
    /// A rank that holds nothing.
    #[error("{side} rank {rank} holds no tensors")]
    NoParams {
        /// The side.
        side: Side,
        /// The rank.
        rank: u32,
    },
    /// Two tensors of one name.
    #[error(
        "{side} rank {rank} lists `{param}` twice; several model chunks need their `model{{v}}.` prefixes"
    )]
    DuplicateParam {
        /// The side.
        side: Side,
        /// The rank.
        rank: u32,
        /// The name.
        param: Arc<str>,
    },
    /// A tensor that no slot of the model knows.
    #[error(
        "{side} rank {rank} holds `{param}`, and {others} more, that the model's layout does not know; \
         nothing may be left behind silently"
    )]
    UnknownParam {
        /// The side.
        side: Side,
        /// The rank.
        rank: u32,
        /// The first such tensor by name.
        param: Arc<str>,
        /// How many others there are.
        others: usize,
    },
    /// A slot whose tensor the rank does not hold.
    #[error("{side} rank {rank} holds no `{param}`{}", Alternatives(.alternatives))]
    MissingParam {
        /// The side.
        side: Side,
        /// The rank.
        rank: u32,
        /// The name it should have.
        param: Arc<str>,
        /// Other names it may have instead.
        alternatives: Vec<Arc<str>>,
    },
    /// Two tensors that are the same parameter under different specs.
    #[error("megatron rank {rank} holds both `{param}` and `{other}`, which are one parameter")]
    AmbiguousParam {
        /// The rank.
        rank: u32,
        /// One name.
        param: Arc<str>,
        /// The other.
        other: Arc<str>,
    },
    /// A head of its own where the configuration says that it is the embedding.
    #[error(
        "megatron rank {rank} holds `{param}` although config.json ties it to the embedding and there is one \
         pipeline stage: the trainer has untied it; set tie_word_embeddings to false on both sides"
    )]
    UntiedHead {
        /// The rank.
        rank: u32,
        /// The tensor.
        param: Arc<str>,
    },
    /// A tensor of another shape than the sizes give.
    #[error("{side} rank {rank}: `{param}` is {got:?}, expected {expected:?}: {why}")]
    Shape {
        /// The side.
        side: Side,
        /// The rank.
        rank: u32,
        /// The tensor.
        param: Arc<str>,
        /// The shape that configuration and parallel sizes give.
        expected: Vec<u64>,
        /// The shape it has.
        got: Vec<u64>,
        /// The formula of the expected shape.
        why: &'static str,
    },
    /// A padded vocabulary with fewer rows than there are tokens.
    #[error(
        "a shard of {local_rows} rows on each of {by} tensor-parallel ranks cannot hold vocab_size = {vocab_size}"
    )]
    Vocab {
        /// Rows of one shard.
        local_rows: u64,
        /// Tensor-parallel size.
        by: u64,
        /// Tokens.
        vocab_size: u64,
    },
    /// An element type that no cast joins with the model's.
    #[error(
        "{side} rank {rank}: `{param}` is {got}, which cannot be joined with the model's {model}"
    )]
    Dtype {
        /// The side.
        side: Side,
        /// The rank.
        rank: u32,
        /// The tensor.
        param: Arc<str>,
        /// Its element type.
        got: Dtype,
        /// The model's.
        model: Dtype,
    },
    /// A shard that cuts a block of elements with one scale.
    #[error(
        "{side} rank {rank}: `{param}` holds {axis} {start}..{end} of `{tensor}`, which must be whole blocks of 128: \
         {why}; choose parallel sizes whose shards are multiples of 128, or refit in bf16"
    )]
    Block {
        /// The side.
        side: Side,
        /// The rank.
        rank: u32,
        /// The parameter.
        param: Arc<str>,
        /// The logical tensor.
        tensor: String,
        /// Rows or columns.
        axis: &'static str,
        /// The first of them.
        start: u64,
        /// One past the last.
        end: u64,
        /// What is wrong with them.
        why: &'static str,
    },
    /// A tensor that the engine of such a model has no place for, although it changes what the model computes.
    #[error("megatron rank {rank} holds `{param}`: {why}")]
    Unwanted {
        /// The rank.
        rank: u32,
        /// The tensor.
        param: Arc<str>,
        /// What follows from it, and what to do.
        why: &'static str,
    },
    /// An engine's draft model, or a trainer's predicting layers, of a model that has none.
    #[error(
        "{side} rank {rank} asks for {got} predicting layers, the model has {known} (num_nextn_predict_layers), \
         numbered from 0, each once{}",
        if *.described { "" } else { "; this family's are not described" }
    )]
    Mtp {
        /// The side.
        side: Side,
        /// The rank.
        rank: u32,
        /// How many it has.
        got: usize,
        /// How many the model has.
        known: u32,
        /// Whether the family's are described.
        described: bool,
    },
    /// A role was given another number of logical names than it has logical tensors.
    #[error("a role with {expected} logical tensors was given {got} names for `{param}`")]
    LogicalNames {
        /// The parameter.
        param: Arc<str>,
        /// Logical tensors of the role.
        expected: usize,
        /// Names given.
        got: usize,
    },
    /// A trainer that is refused although its names and shapes are those of the model.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The bands are not a legal layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// `, nor ...` for each other name.
struct Alternatives<'a>(&'a [Arc<str>]);

impl fmt::Display for Alternatives<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|name| write!(f, ", nor `{name}`"))
    }
}
