use alloc::sync::Arc;
use alloc::vec::Vec;

use refit_planner::Dtype;

/// A tensor as a rank's framework reports it: contiguous, row-major.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorSpec {
    /// The framework's own name.
    pub name: Arc<str>,
    /// Element type in memory.
    pub dtype: Dtype,
    /// Extents in elements, outermost first.
    pub shape: Vec<u64>,
}

impl TensorSpec {
    /// A tensor of this name, element type and shape.
    pub fn new(name: impl Into<Arc<str>>, dtype: Dtype, shape: impl Into<Vec<u64>>) -> Self {
        Self { name: name.into(), dtype, shape: shape.into() }
    }

    /// Size in bytes, unless it does not fit in 64 bits.
    #[must_use]
    pub fn bytes(&self) -> Option<u64> {
        self.shape.iter().try_fold(self.dtype.size(), |bytes, &extent| bytes.checked_mul(extent))
    }
}
