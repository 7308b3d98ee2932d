//! One rank's parameters as bands of logical tensors.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use crate::encode::Encoder;
use crate::{Dtype, ElementMap, Hash, LayoutError};

/// Only compared within one process.
const DIGEST_CONTEXT: &str = "refit-planner layout";

/// A logical tensor: the coordinate system that both sides share.
///
/// The name is the Hugging Face name. Tensors with more than two dimensions are flattened to two.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tensor {
    /// Hugging Face name.
    pub name: Arc<str>,
    /// Rows.
    pub rows: u64,
    /// Columns; 1 for a vector.
    pub cols: u64,
}

/// A tensor's number within one layout; only meaningful there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(transparent))]
pub struct TensorId(pub(crate) u32);

/// A box of a logical tensor and where it sits in a parameter's local, row-major, two-dimensional view.
///
/// Logical row `rows.start + i` lies at local row `at_row + i * row_step`; logical column `cols.start + j` at local
/// column `at_col + j`. All numbers are elements.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Band {
    pub(crate) tensor: TensorId,
    pub(crate) rows: Range<u64>,
    pub(crate) cols: Range<u64>,
    pub(crate) at_row: u64,
    pub(crate) at_col: u64,
    pub(crate) row_step: u64,
}

impl Band {
    /// The box `rows` x `cols` of `tensor`, placed at the local origin.
    #[must_use]
    pub fn new(tensor: TensorId, rows: Range<u64>, cols: Range<u64>) -> Self {
        Self { tensor, rows, cols, at_row: 0, at_col: 0, row_step: 1 }
    }

    /// Places the band's first element at this local row and column.
    #[must_use]
    pub fn at(mut self, row: u64, col: u64) -> Self {
        self.at_row = row;
        self.at_col = col;
        self
    }

    /// Spreads the band's rows: consecutive logical rows lie `step` local rows apart.
    #[must_use]
    pub fn row_step(mut self, step: u64) -> Self {
        self.row_step = step;
        self
    }
}

/// A box of a parameter's local view that holds zeros and comes from no source (vocabulary padding, say).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct FillBox {
    /// Local rows.
    pub rows: Range<u64>,
    /// Local columns.
    pub cols: Range<u64>,
}

/// One parameter as a rank holds it: contiguous, row-major, viewed as `rows` x `cols` elements.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Param {
    pub(crate) name: Arc<str>,
    pub(crate) dtype: Dtype,
    pub(crate) rows: u64,
    pub(crate) cols: u64,
    pub(crate) map: ElementMap,
    pub(crate) bands: Vec<Band>,
    pub(crate) fills: Vec<FillBox>,
}

impl Param {
    /// A parameter without bands yet. Vectors have 1 column; trailing dimensions are flattened into columns.
    pub fn new(name: impl Into<Arc<str>>, dtype: Dtype, rows: u64, cols: u64) -> Self {
        Self {
            name: name.into(),
            dtype,
            rows,
            cols,
            map: ElementMap::Identity,
            bands: Vec::new(),
            fills: Vec::new(),
        }
    }

    /// Declares how the elements of its bands are stored: on the source side `map` leads from what is stored to the
    /// logical value, on the target side from the logical value to what is stored. Boxes of zeros stay zeros.
    #[must_use]
    pub fn map(mut self, map: ElementMap) -> Self {
        self.map = map;
        self
    }

    /// Adds a band.
    #[must_use]
    pub fn band(mut self, band: Band) -> Self {
        self.bands.push(band);
        self
    }

    /// Adds several bands.
    #[must_use]
    pub fn bands(mut self, bands: impl IntoIterator<Item = Band>) -> Self {
        self.bands.extend(bands);
        self
    }

    /// Declares a box of zeros.
    #[must_use]
    pub fn fill(mut self, rows: Range<u64>, cols: Range<u64>) -> Self {
        self.fills.push(FillBox { rows, cols });
        self
    }

    /// The rank's own name for it.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// How its elements are stored; see [`Param::map`].
    #[must_use]
    pub fn element_map(&self) -> ElementMap {
        self.map
    }

    /// Local rows.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Local columns.
    #[must_use]
    pub fn cols(&self) -> u64 {
        self.cols
    }

    /// The boxes of zeros, as local rows and columns.
    pub fn fill_boxes(&self) -> impl Iterator<Item = (Range<u64>, Range<u64>)> {
        self.fills.iter().map(|fill| (fill.rows.clone(), fill.cols.clone()))
    }

    /// Size in bytes. Cannot overflow once the parameter is part of a [`RankLayout`].
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.rows.saturating_mul(self.cols).saturating_mul(self.dtype.size())
    }
}

/// The parameters of one rank, sorted by name and checked: every band lies inside its tensor and its parameter.
///
/// Two layouts built from the same parameters in any order are equal.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(
    feature = "serde",
    serde(into = "crate::raw::RawLayout", try_from = "crate::raw::RawLayout")
)]
pub struct RankLayout {
    pub(crate) rank: u32,
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) params: Vec<Param>,
    /// Of everything but the rank: equal for ranks that hold the same.
    pub(crate) digest: Hash,
}

impl RankLayout {
    /// The rank this layout belongs to, unique on its side.
    #[must_use]
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// The parameters, sorted by name.
    #[must_use]
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// The logical tensors named here, sorted by name.
    #[must_use]
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Bytes of all parameters.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.params.iter().fold(0, |sum: u64, param| sum.saturating_add(param.bytes()))
    }

    /// The parameter with this name.
    #[must_use]
    pub fn param(&self, name: &str) -> Option<&Param> {
        let index = self.params.binary_search_by(|param| (*param.name).cmp(name)).ok()?;
        self.params.get(index)
    }

    /// Every band of every parameter as `(parameter, tensor, band)`: what an independent check walks.
    pub fn bands(&self) -> impl Iterator<Item = (&Param, &Tensor, &Band)> {
        self.params.iter().flat_map(move |param| {
            param.bands.iter().map(move |band| (param, &self.tensors[band.tensor.0 as usize], band))
        })
    }
}

impl Band {
    /// Logical rows of the box.
    #[must_use]
    pub fn logical_rows(&self) -> Range<u64> {
        self.rows.clone()
    }

    /// Logical columns of the box.
    #[must_use]
    pub fn logical_cols(&self) -> Range<u64> {
        self.cols.clone()
    }

    /// Local row and column of the first element.
    #[must_use]
    pub fn origin(&self) -> (u64, u64) {
        (self.at_row, self.at_col)
    }

    /// Local rows between consecutive logical rows.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.row_step
    }
}

/// Builds a [`RankLayout`], refusing what is not legal as it is added.
#[derive(Clone, Debug)]
pub struct LayoutBuilder {
    rank: u32,
    tensors: Vec<Tensor>,
    ids: BTreeMap<Arc<str>, TensorId>,
    params: BTreeMap<Arc<str>, Param>,
    /// Of all parameters.
    bytes: u64,
}

impl LayoutBuilder {
    /// An empty layout for `rank`.
    #[must_use]
    pub fn new(rank: u32) -> Self {
        Self { rank, tensors: Vec::new(), ids: BTreeMap::new(), params: BTreeMap::new(), bytes: 0 }
    }

    /// Declares a logical tensor, or returns its number when it is declared already.
    ///
    /// # Errors
    /// [`LayoutError::TensorShape`] when it was declared with another shape; [`LayoutError::TooLarge`] and
    /// [`LayoutError::TooMany`] for sizes that cannot be.
    pub fn tensor(&mut self, name: &str, rows: u64, cols: u64) -> Result<TensorId, LayoutError> {
        let rank = self.rank;
        if let Some(&id) = self.ids.get(name) {
            let known = &self.tensors[id.0 as usize];
            if (known.rows, known.cols) == (rows, cols) {
                return Ok(id);
            }
            return Err(LayoutError::TensorShape {
                rank,
                tensor: name.into(),
                rows,
                cols,
                other_rows: known.rows,
                other_cols: known.cols,
            });
        }
        let name: Arc<str> = name.into();
        if rows.checked_mul(cols).is_none_or(|elements| elements > MAX_BYTES) {
            return Err(LayoutError::TooLarge { rank, name });
        }
        let id =
            TensorId(u32::try_from(self.tensors.len()).map_err(|_| LayoutError::TooMany { rank })?);
        self.tensors.push(Tensor { name: name.clone(), rows, cols });
        self.ids.insert(name, id);
        Ok(id)
    }

    /// Adds a parameter.
    ///
    /// # Errors
    /// Every variant of [`LayoutError`] that names a parameter.
    pub fn param(&mut self, param: Param) -> Result<&mut Self, LayoutError> {
        self.check(&param)?;
        if self.params.contains_key(&param.name) {
            return Err(LayoutError::DuplicateParam { rank: self.rank, param: param.name });
        }
        let bytes = self.bytes.checked_add(param.bytes()).filter(|&bytes| bytes <= MAX_BYTES);
        let Some(bytes) = bytes else {
            return Err(LayoutError::TooLarge { rank: self.rank, name: param.name });
        };
        self.bytes = bytes;
        self.params.insert(param.name.clone(), param);
        Ok(self)
    }

    /// The layout: tensors and parameters sorted by name, tensors that no band uses left out.
    #[must_use]
    pub fn build(self) -> RankLayout {
        let mut used: Vec<bool> = self.tensors.iter().map(|_| false).collect();
        for band in self.params.values().flat_map(|param| &param.bands) {
            used[band.tensor.0 as usize] = true;
        }
        // `ids` iterates in name order, so the new numbers are canonical.
        let mut renumbered: Vec<u32> = self.tensors.iter().map(|_| 0).collect();
        let mut tensors = Vec::with_capacity(self.tensors.len());
        let mut numbers = 0..;
        for id in self.ids.values() {
            let old = id.0 as usize;
            if used[old] {
                renumbered[old] = numbers.next().unwrap_or(u32::MAX);
                tensors.push(self.tensors[old].clone());
            }
        }
        let mut params: Vec<Param> = self.params.into_values().collect();
        for band in params.iter_mut().flat_map(|param| &mut param.bands) {
            band.tensor = TensorId(renumbered[band.tensor.0 as usize]);
        }
        for param in &mut params {
            param.bands.sort_unstable_by_key(|band| {
                (band.at_row, band.at_col, band.tensor, band.rows.start, band.cols.start)
            });
            param.fills.sort_unstable_by_key(|fill| (fill.rows.start, fill.cols.start));
        }
        let digest = digest(&tensors, &params);
        RankLayout { rank: self.rank, tensors, params, digest }
    }

    fn check(&self, param: &Param) -> Result<(), LayoutError> {
        let rank = self.rank;
        let name = || param.name.clone();
        let bytes = param
            .rows
            .checked_mul(param.cols)
            .and_then(|elements| elements.checked_mul(param.dtype.size()));
        if bytes.is_none_or(|bytes| bytes > MAX_BYTES) {
            return Err(LayoutError::TooLarge { rank, name: name() });
        }
        let outside = || LayoutError::OutsideParam {
            rank,
            param: name(),
            rows: param.rows,
            cols: param.cols,
        };
        for band in &param.bands {
            let Some(tensor) = self.tensors.get(band.tensor.0 as usize) else {
                return Err(LayoutError::UnknownTensor {
                    rank,
                    param: name(),
                    tensor: band.tensor.0,
                });
            };
            if band.rows.is_empty() || band.cols.is_empty() || band.row_step == 0 {
                return Err(LayoutError::Empty { rank, param: name() });
            }
            if band.rows.end > tensor.rows || band.cols.end > tensor.cols {
                return Err(LayoutError::OutsideTensor {
                    rank,
                    param: name(),
                    tensor: tensor.name.clone(),
                    rows: tensor.rows,
                    cols: tensor.cols,
                });
            }
            // Neither range is empty.
            let (rows, cols) = (length(&band.rows), length(&band.cols));
            let last_row = rows
                .saturating_sub(1)
                .checked_mul(band.row_step)
                .and_then(|span| span.checked_add(band.at_row));
            let end_col = band.at_col.checked_add(cols);
            if last_row.is_none_or(|row| row >= param.rows)
                || end_col.is_none_or(|col| col > param.cols)
            {
                return Err(outside());
            }
        }
        for fill in &param.fills {
            if fill.rows.is_empty() || fill.cols.is_empty() {
                return Err(LayoutError::Empty { rank, param: name() });
            }
            if fill.rows.end > param.rows || fill.cols.end > param.cols {
                return Err(outside());
            }
        }
        Ok(())
    }
}

fn length(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

fn digest(tensors: &[Tensor], params: &[Param]) -> Hash {
    let mut encoder = Encoder::new(DIGEST_CONTEXT);
    encoder.len(tensors.len());
    for tensor in tensors {
        encoder.bytes(tensor.name.as_bytes());
        encoder.u64(tensor.rows);
        encoder.u64(tensor.cols);
    }
    encoder.len(params.len());
    for param in params {
        encoder.bytes(param.name.as_bytes());
        encoder.bytes(param.dtype.name().as_bytes());
        encoder.bytes(param.map.name().as_bytes());
        encoder.u64(param.rows);
        encoder.u64(param.cols);
        encoder.len(param.bands.len());
        for band in &param.bands {
            encoder.u64(u64::from(band.tensor.0));
            for number in [band.rows.start, band.rows.end, band.cols.start, band.cols.end] {
                encoder.u64(number);
            }
            encoder.u64(band.at_row);
            encoder.u64(band.at_col);
            encoder.u64(band.row_step);
        }
        encoder.len(param.fills.len());
        for FillBox { rows, cols } in &param.fills {
            for number in [rows.start, rows.end, cols.start, cols.end] {
                encoder.u64(number);
            }
        }
    }
    encoder.finish()
}

/// Nothing in memory is larger, and sums of two such sizes still fit in a `u64`.
pub(crate) const MAX_BYTES: u64 = i64::MAX as u64;
