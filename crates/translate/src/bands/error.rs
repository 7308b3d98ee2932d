use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use refit_planner::{LayoutError, PlanError, RankLayout};

use super::{MAX_BANDS_PER_COPY, MAX_CAPTURED_BANDS, MAX_DIMS, MAX_TEXT_BYTES, SCHEMA};

/// Why a text does not describe one side's layouts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BandsError {
    /// More text than is taken.
    #[error(
        "{bytes} bytes of text, {MAX_TEXT_BYTES} are the most; give the side's ranks in several files"
    )]
    TooLong {
        /// Bytes given.
        bytes: usize,
    },
    /// The text is not JSON of this format: a wrong type, an unknown or missing key, a list or name that is too long.
    #[error("line {line}, column {column}: {message}")]
    Json {
        /// Line, from 1; 0 when unknown.
        line: usize,
        /// Column, from 1; 0 when unknown.
        column: usize,
        /// What the parser says.
        message: String,
    },
    /// Another version of the format.
    #[error(
        "schema {found}, this release knows {SCHEMA}; write the file anew, or use the release it was written for"
    )]
    Schema {
        /// The version found.
        found: u64,
    },
    /// A logical tensor's shape.
    #[error("tensor `{tensor}`: {problem}")]
    TensorShape {
        /// The logical tensor.
        tensor: Arc<str>,
        /// What is wrong with it.
        problem: ShapeProblem,
    },
    /// A logical tensor that is declared twice.
    #[error("tensor `{tensor}` is listed twice in `tensors`; leave one of them out")]
    DuplicateTensor {
        /// The logical tensor.
        tensor: Arc<str>,
    },
    /// A parameter's shape.
    #[error("rank {rank}, parameter `{param}`: {problem}")]
    ParamShape {
        /// The rank.
        rank: u32,
        /// The parameter.
        param: Arc<str>,
        /// What is wrong with it.
        problem: ShapeProblem,
    },
    /// An element type that no plan knows.
    #[error(
        "rank {rank}, parameter `{param}`: element type `{found}` is not known; write it as safetensors does: BF16, \
         F16, F32, F64, F8_E4M3, F8_E5M2, I64, I32, U8"
    )]
    Dtype {
        /// The rank.
        rank: u32,
        /// The parameter.
        param: Arc<str>,
        /// What the text says.
        found: String,
    },
    /// A parameter in both forms, or in none.
    #[error(
        "rank {rank}, parameter `{param}`: give either `bands` or `copies` (`\"bands\": []` where it holds nothing \
         that is known)"
    )]
    Form {
        /// The rank.
        rank: u32,
        /// The parameter.
        param: Arc<str>,
    },
    /// A box of zeros in the other form than its parameter.
    #[error(
        "rank {rank}, parameter `{param}`, fill {number}: beside `bands` give `rows` and `cols`, beside `copies` give \
         `offset`, `shape` and `stride`"
    )]
    FillForm {
        /// The rank.
        rank: u32,
        /// The parameter.
        param: Arc<str>,
        /// Which of its fills, from 0.
        number: usize,
    },
    /// A band or copy of a tensor that is not declared.
    #[error("{place}: `tensors` does not list this tensor; add it there with its shape")]
    UnknownTensor {
        /// Where.
        place: Box<Place>,
    },
    /// A band or a box of zeros that is not legal.
    #[error("{place}: {source}{}", advice(.source))]
    Band {
        /// Where.
        place: Box<Place>,
        /// What is wrong with it.
        source: LayoutError,
    },
    /// A copy that bands cannot say, or that cannot have happened.
    #[error("{place}: {problem}")]
    Copy {
        /// Where.
        place: Box<Place>,
        /// What is wrong with it.
        problem: CopyProblem,
    },
    /// Two bands, copies or boxes of zeros of a target that write the same element.
    #[error(
        "rank {rank}, parameter `{param}`: {} are both written to row {row}, column {col}; leave out what the engine \
         overwrites", Claims(.claims)
    )]
    Overlap {
        /// The rank.
        rank: u32,
        /// The parameter.
        param: Arc<str>,
        /// Local row of the element, in the view that was used.
        row: u64,
        /// Local column of the element.
        col: u64,
        /// What claims it.
        claims: Vec<Claim>,
    },
    /// Elements of a target that nothing writes.
    #[error(
        "rank {rank}, parameter `{param}`: {claimed} of its {elements} elements are written; add the bands that are \
         missing, or a `fill` where the engine holds zeros"
    )]
    Gap {
        /// The rank.
        rank: u32,
        /// The parameter.
        param: Arc<str>,
        /// Elements that something writes.
        claimed: u64,
        /// Elements of the parameter.
        elements: u64,
    },
    /// A target whose tiling cannot be proven.
    #[error("rank {rank}: {source}")]
    Plan {
        /// The rank.
        rank: u32,
        /// Why.
        source: PlanError,
    },
    /// A rank that is not legal as a whole.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// One entry of a parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Place {
    /// The rank.
    pub rank: u32,
    /// The parameter.
    pub param: Arc<str>,
    /// The key of the list: `bands`, `copies` or `fill`.
    pub list: &'static str,
    /// Which entry, from 0.
    pub number: usize,
    /// The logical tensor; a fill has none.
    pub tensor: Option<Arc<str>>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rank, param, list, number, tensor } = self;
        write!(f, "rank {rank}, parameter `{param}`, {list}[{number}]")?;
        tensor.iter().try_for_each(|tensor| write!(f, " of tensor `{tensor}`"))
    }
}

/// Why a shape is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShapeProblem {
    /// More dimensions than are taken.
    #[error("a shape of {dims} dimensions, {MAX_DIMS} are the most; join some of them")]
    Dims {
        /// Dimensions given.
        dims: usize,
    },
    /// More elements than memory could have.
    #[error("its shape has more elements than 63 bits count; correct it")]
    TooLarge,
    /// A view of another size.
    #[error(
        "a view of {rows} x {cols} does not have the shape's {elements} elements; correct one of them"
    )]
    View {
        /// Rows of the view.
        rows: u64,
        /// Columns of the view.
        cols: u64,
        /// Elements of the shape.
        elements: u64,
    },
}

/// Why a captured copy is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CopyProblem {
    /// A shape and strides of different lengths.
    #[error(
        "a shape of {shape} dimensions with {stride} strides; give one stride for each dimension"
    )]
    Strides {
        /// Dimensions of the shape.
        shape: usize,
        /// Strides given.
        stride: usize,
    },
    /// Neither a slice nor a pattern.
    #[error(
        "`from` takes either `slice`, or `offset`, `shape` and `stride`; leave `from` out for the whole tensor"
    )]
    From,
    /// More slices than dimensions.
    #[error("{slices} slices of a tensor of {dims} dimensions; give at most one for each")]
    Slices {
        /// Slices given.
        slices: usize,
        /// Dimensions of the tensor.
        dims: usize,
    },
    /// A slice outside its dimension.
    #[error(
        "slice {start}..{stop} of dimension {dim}, which has {extent}; correct it, or the tensor's shape"
    )]
    Slice {
        /// The dimension, from 0.
        dim: usize,
        /// First index.
        start: u64,
        /// One past the last index.
        stop: u64,
        /// Extent of the dimension.
        extent: u64,
    },
    /// Reads beyond its tensor.
    #[error("it reads beyond the tensor's {elements} elements; correct it, or the tensor's shape")]
    OutsideTensor {
        /// Elements of the tensor.
        elements: u64,
    },
    /// Writes beyond its parameter.
    #[error(
        "it writes beyond the parameter's {elements} elements; correct it, or the parameter's shape"
    )]
    OutsideParam {
        /// Elements of the parameter.
        elements: u64,
    },
    /// Other numbers of elements on its two sides.
    #[error("it reads {from} elements and writes {to}; a broadcast cannot be said as bands")]
    Elements {
        /// Elements read; saturated.
        from: u64,
        /// Elements written; saturated.
        to: u64,
    },
    /// A stride of 0.
    #[error(
        "a stride is 0: it reads or writes an element several times, which cannot be said as bands"
    )]
    Repeated,
    /// Rows that become columns.
    #[error(
        "it transposes: elements {from} apart in the tensor go {to} apart in the parameter; bands keep rows and \
         columns, so have the trainer hold the tensor as the engine does"
    )]
    Transposed {
        /// Distance in the tensor, in elements.
        from: u64,
        /// Distance in the parameter, in elements.
        to: u64,
    },
    /// Columns that are not next to each other.
    #[error(
        "columns {from} apart in the tensor go {to} apart in the parameter; the columns of a band are next to each \
         other, only its rows can be spread"
    )]
    Columns {
        /// Distance in the tensor, in elements.
        from: u64,
        /// Distance in the parameter, in elements.
        to: u64,
    },
    /// Dimensions that do not divide each other.
    #[error(
        "a dimension of {from} becomes one of {to}: neither is a multiple of the other, so no boxes match"
    )]
    Reshaped {
        /// Extent on the side that is read.
        from: u64,
        /// Extent on the side that is written.
        to: u64,
    },
    /// More bands than a copy may become.
    #[error(
        "it takes {bands} bands, more than one copy ({MAX_BANDS_PER_COPY}) or all copies of a text \
         ({MAX_CAPTURED_BANDS}) may become; give the parameter a `view` that fits, or write its bands by hand"
    )]
    TooMany {
        /// Bands it takes; saturated.
        bands: u64,
    },
}

/// What claims an element.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Claim {
    /// An element of a logical tensor.
    Tensor {
        /// The logical tensor.
        tensor: Arc<str>,
        /// Its row.
        row: u64,
        /// Its column.
        col: u64,
    },
    /// A zero.
    Zero,
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tensor { tensor, row, col } => write!(f, "row {row}, column {col} of `{tensor}`"),
            Self::Zero => f.write_str("a zero"),
        }
    }
}

struct Claims<'a>(&'a [Claim]);

impl fmt::Display for Claims<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, claim) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { " and " };
            write!(f, "{separator}{claim}")?;
        }
        Ok(())
    }
}

/// The first two claims of an element of a parameter.
pub(super) fn claims(layout: &RankLayout, param: &str, row: u64, col: u64) -> Vec<Claim> {
    let bands = layout.bands().filter(|(owner, _, _)| owner.name().as_ref() == param);
    let bands = bands.filter_map(|(_, tensor, band)| {
        let (at_row, at_col) = band.origin();
        let (rows, cols) = (band.logical_rows(), band.logical_cols());
        let down = row.checked_sub(at_row).filter(|down| down.is_multiple_of(band.step()))?;
        let (row, col) = (rows.start + down / band.step(), cols.start + col.checked_sub(at_col)?);
        let held = rows.contains(&row) && cols.contains(&col);
        held.then(|| Claim::Tensor { tensor: tensor.name.clone(), row, col })
    });
    let fills = layout.param(param).into_iter().flat_map(|param| param.fill_boxes());
    let fills = fills.filter(|(rows, cols)| rows.contains(&row) && cols.contains(&col));
    bands.chain(fills.map(|_| Claim::Zero)).take(2).collect()
}

/// What to do about a band.
fn advice(error: &LayoutError) -> &'static str {
    match error {
        LayoutError::OutsideTensor { .. } => "; correct `rows` and `cols`, or the tensor's shape",
        LayoutError::OutsideParam { .. } => {
            "; correct `at`, `row_step` and the band's extents, or the parameter's shape"
        }
        _ => "",
    }
}
