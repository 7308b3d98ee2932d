use alloc::sync::Arc;

use crate::{Dtype, ElementMap};

/// Why a rank's layout is not a legal list of bands.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// Two parameters of one rank have the same name.
    #[error(
        "rank {rank} lists parameter `{param}` twice; every parameter has one entry, tied ones included"
    )]
    DuplicateParam {
        /// The rank.
        rank: u32,
        /// The parameter.
        param: Arc<str>,
    },
    /// Two source layouts claim the same rank.
    #[error("source rank {rank} is given twice; every rank publishes exactly one layout")]
    DuplicateRank {
        /// The rank.
        rank: u32,
    },
    /// A logical tensor is declared with two different shapes.
    #[error(
        "rank {rank} declares tensor `{tensor}` as {rows} x {cols}, elsewhere it is {other_rows} x {other_cols}: \
         the sides describe different models"
    )]
    TensorShape {
        /// The rank whose declaration differs.
        rank: u32,
        /// The logical tensor.
        tensor: Arc<str>,
        /// Rows declared by `rank`.
        rows: u64,
        /// Columns declared by `rank`.
        cols: u64,
        /// Rows declared elsewhere.
        other_rows: u64,
        /// Columns declared elsewhere.
        other_cols: u64,
    },
    /// A band or fill has no elements.
    #[error(
        "rank {rank}: a band or fill of `{param}` is empty or has a row step of 0; leave empty bands out"
    )]
    Empty {
        /// The rank.
        rank: u32,
        /// The parameter.
        param: Arc<str>,
    },
    /// A band reaches outside its logical tensor.
    #[error(
        "rank {rank}: a band of `{param}` reaches outside tensor `{tensor}`, which is {rows} x {cols}: \
         give the band or the tensor its right shape"
    )]
    OutsideTensor {
        /// The rank.
        rank: u32,
        /// The parameter.
        param: Arc<str>,
        /// The logical tensor.
        tensor: Arc<str>,
        /// Rows of the tensor.
        rows: u64,
        /// Columns of the tensor.
        cols: u64,
    },
    /// A band or fill reaches outside its parameter.
    #[error(
        "rank {rank}: a band or fill reaches outside parameter `{param}`, which is {rows} x {cols}: give the band or the \
         parameter its right shape"
    )]
    OutsideParam {
        /// The rank.
        rank: u32,
        /// The parameter.
        param: Arc<str>,
        /// Local rows of the parameter.
        rows: u64,
        /// Local columns of the parameter.
        cols: u64,
    },
    /// A band names a tensor that this layout has not declared.
    #[error(
        "rank {rank}: a band of `{param}` names tensor number {tensor}, which was never declared: declare it first"
    )]
    UnknownTensor {
        /// The rank.
        rank: u32,
        /// The parameter.
        param: Arc<str>,
        /// The number that has no declaration.
        tensor: u32,
    },
    /// Sizes that no memory could have.
    #[error(
        "rank {rank}: the size of `{name}`, or of all parameters with it, does not fit in 63 bits: correct its shape"
    )]
    TooLarge {
        /// The rank.
        rank: u32,
        /// The parameter or tensor.
        name: Arc<str>,
    },
    /// More entries than a plan can number.
    #[error("rank {rank}: more than {max} entries in one layout: describe fewer, larger boxes", max = u32::MAX)]
    TooMany {
        /// The rank.
        rank: u32,
    },
}

/// Why two layouts cannot be joined.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The sides disagree about the shape of a logical tensor.
    #[error(
        "tensor `{tensor}` is {target_rows} x {target_cols} on the target and {source_rows} x {source_cols} on the \
         source: the sides hold different models; plan with layouts of one"
    )]
    TensorShape {
        /// The logical tensor.
        tensor: Arc<str>,
        /// Rows on the target side.
        target_rows: u64,
        /// Columns on the target side.
        target_cols: u64,
        /// Rows on the source side.
        source_rows: u64,
        /// Columns on the source side.
        source_cols: u64,
    },
    /// Target bytes that no source rank holds.
    #[error(
        "no source rank holds rows {rows_start}..{rows_end}, columns {cols_start}..{cols_end} of tensor `{tensor}`, \
         which `{param}` needs from byte {byte} on: a source rank is missing or its layout is incomplete; \
         wait for it, or have it publish all that it holds"
    )]
    Uncovered {
        /// The target parameter.
        param: Arc<str>,
        /// The logical tensor.
        tensor: Arc<str>,
        /// First logical row without a source.
        rows_start: u64,
        /// One past the last.
        rows_end: u64,
        /// First logical column without a source.
        cols_start: u64,
        /// One past the last.
        cols_end: u64,
        /// The first target byte without a source.
        byte: u64,
    },
    /// Two bands or fills of a target parameter claim the same byte.
    #[error(
        "two bands or fills of target parameter `{param}` both claim row {row}, column {col}; correct its layout, so that \
         each element has one source"
    )]
    Overlap {
        /// The target parameter.
        param: Arc<str>,
        /// Local row of a byte claimed twice.
        row: u64,
        /// Local column of a byte claimed twice.
        col: u64,
    },
    /// Bands and fills of a target parameter leave bytes unclaimed.
    #[error(
        "bands and fills of target parameter `{param}` claim {claimed} of its {elements} elements; correct its layout, \
         or fill the rest"
    )]
    Gap {
        /// The target parameter.
        param: Arc<str>,
        /// Elements claimed.
        claimed: u64,
        /// Elements of the parameter.
        elements: u64,
    },
    /// The element types differ and no transform joins them.
    #[error(
        "`{param}` is {to} but its source `{source_param}` on rank {rank} is {from}: no cast joins these types; hold it in \
         one type on both sides"
    )]
    Dtype {
        /// The target parameter.
        param: Arc<str>,
        /// The source parameter.
        source_param: Arc<str>,
        /// The source rank.
        rank: u32,
        /// Element type of the source.
        from: Dtype,
        /// Element type of the target.
        to: Dtype,
    },
    /// Both sides store the same tensor through an element map.
    #[error(
        "`{param}` is stored through {target_map} and its source `{source_param}` on rank {rank} through \
         {source_map}: at most one side may map; store it plainly on one of them"
    )]
    MapsMeet {
        /// The target parameter.
        param: Arc<str>,
        /// The source parameter.
        source_param: Arc<str>,
        /// The source rank.
        rank: u32,
        /// The map of the source.
        source_map: ElementMap,
        /// The map of the target.
        target_map: ElementMap,
    },
    /// An element map is not defined between these types.
    #[error(
        "`{param}` is {to} and its source `{source_param}` on rank {rank} is {from}: {map} is not defined between \
         these types; hold it in floating-point types that it is"
    )]
    MapDtype {
        /// The target parameter.
        param: Arc<str>,
        /// The source parameter.
        source_param: Arc<str>,
        /// The source rank.
        rank: u32,
        /// The map.
        map: ElementMap,
        /// Element type of the source.
        from: Dtype,
        /// Element type of the target.
        to: Dtype,
    },
    /// Bands and shards that cross in more ways than a plan may take.
    #[error(
        "planning `{param}` takes more than {max_pieces} pieces, or 64 times as many comparisons: its bands and the \
         source's cross in too many ways; describe fewer, larger boxes, or allow more with `max_pieces`"
    )]
    TooComplex {
        /// The target parameter.
        param: Arc<str>,
        /// Pieces allowed.
        max_pieces: u64,
    },
    /// More entries than a plan can number.
    #[error("the plan would have more than {max} parameters or segments; describe fewer, larger boxes", max = u32::MAX)]
    TooMany,
}

/// Why a plan cannot be turned into a program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LowerError {
    /// The transport takes fewer reads than the plan needs in any form the options allow.
    #[error(
        "the plan needs {reads} reads, the transport takes at most {max}; allow staging or amplification"
    )]
    TooManyReads {
        /// Reads needed in the smallest allowed form.
        reads: u64,
        /// Reads the transport takes.
        max: u64,
    },
    /// The options forbid staging but a transform needs it.
    #[error(
        "`{param}` needs a cast or a map, which lands from staging, but the options forbid staging; allow it"
    )]
    StagingForbidden {
        /// The target parameter.
        param: Arc<str>,
    },
    /// Staging would not fit in 63 bits.
    #[error(
        "the staging area would not fit in 63 bits; stage in waves (`LowerOptions::with_wave_bytes`)"
    )]
    StagingTooLarge,
}
