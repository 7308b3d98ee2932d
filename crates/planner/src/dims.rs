#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use smallvec::SmallVec;

/// One repetition of a strided pattern: `count` steps, each this many bytes further on either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Dim {
    /// How often the inner pattern occurs; at least 2 in anything the planner emits.
    pub count: u64,
    /// Bytes between occurrences on the side that is read.
    pub source_stride: u64,
    /// Bytes between occurrences on the side that is written.
    pub target_stride: u64,
}

/// The repetitions of a contiguous run, outermost first. Empty: the run occurs once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Dims(SmallVec<[Dim; 2]>);

impl Dims {
    /// No repetition.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// One repetition.
    #[must_use]
    pub fn one(dim: Dim) -> Self {
        Self(SmallVec::from_slice(&[dim]))
    }

    /// The repetitions, outermost first.
    #[must_use]
    pub fn as_slice(&self) -> &[Dim] {
        &self.0
    }

    /// Whether the run occurs exactly once.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.0.is_empty()
    }

    /// How many contiguous runs the pattern has (the product of the counts, saturating).
    #[must_use]
    pub fn runs(&self) -> u64 {
        self.0.iter().fold(1, |product: u64, dim| product.saturating_mul(dim.count))
    }

    /// Bytes from the first byte read to one past the last, for a run of `run` bytes (saturating).
    #[must_use]
    pub fn source_extent(&self, run: u64) -> u64 {
        self.extent(run, |dim| dim.source_stride)
    }

    /// Bytes from the first byte written to one past the last, for a run of `run` bytes (saturating).
    #[must_use]
    pub fn target_extent(&self, run: u64) -> u64 {
        self.extent(run, |dim| dim.target_stride)
    }

    /// The `(source, target)` byte offsets of every run, relative to the first, outermost dimension slowest.
    #[must_use]
    pub fn offsets(&self) -> Offsets<'_> {
        Offsets { dims: &self.0, index: 0, runs: self.runs() }
    }

    pub(crate) fn outer(&self, dim: Dim) -> Self {
        let mut dims = SmallVec::new();
        dims.push(dim);
        dims.extend_from_slice(&self.0);
        Self(dims)
    }

    pub(crate) fn first_mut(&mut self) -> Option<&mut Dim> {
        self.0.first_mut()
    }

    /// The same pattern with the source side laid out densely, run after run, as a staging buffer holds it.
    pub(crate) fn packed_source(&self, run: u64) -> Self {
        let mut dims = self.clone();
        let mut stride = run;
        for dim in dims.0.iter_mut().rev() {
            dim.source_stride = stride;
            stride = stride.saturating_mul(dim.count);
        }
        dims
    }

    fn extent(&self, run: u64, stride: impl Fn(&Dim) -> u64) -> u64 {
        self.0.iter().fold(run, |extent, dim| {
            extent.saturating_add(dim.count.saturating_sub(1).saturating_mul(stride(dim)))
        })
    }
}

impl FromIterator<Dim> for Dims {
    fn from_iter<I: IntoIterator<Item = Dim>>(dims: I) -> Self {
        Self(dims.into_iter().collect())
    }
}

/// Iterator over run offsets; see [`Dims::offsets`].
#[derive(Clone, Debug)]
pub struct Offsets<'a> {
    dims: &'a [Dim],
    index: u64,
    runs: u64,
}

impl Iterator for Offsets<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        if self.index >= self.runs {
            return None;
        }
        let mut rest = self.index;
        let mut offsets = (0u64, 0u64);
        for dim in self.dims.iter().rev() {
            // None of them is 0, for then there are no runs.
            let step = rest.checked_rem(dim.count).unwrap_or(0);
            rest = rest.checked_div(dim.count).unwrap_or(0);
            offsets.0 = offsets.0.wrapping_add(step.wrapping_mul(dim.source_stride));
            offsets.1 = offsets.1.wrapping_add(step.wrapping_mul(dim.target_stride));
        }
        self.index = self.index.saturating_add(1);
        Some(offsets)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = usize::try_from(self.runs.saturating_sub(self.index)).ok();
        (left.unwrap_or(usize::MAX), left)
    }
}
