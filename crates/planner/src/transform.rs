//! What happens to elements on their way from a source parameter to a target parameter.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use crate::Dtype;
use crate::encode::Encoder;

/// An elementwise function between what a rank stores and the logical value.
///
/// On a source parameter it leads from what is stored to the logical value, on a target parameter from the logical
/// value to what is stored; see [`Param::map`](crate::Param::map).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum ElementMap {
    /// The logical value is what is stored.
    #[default]
    Identity,
    /// `x + 1`, in the type of `x`: a norm stored around zero, as Megatron-Core's `zero_centered_gamma` does.
    AddOne,
    /// `-exp(x)`, in f32: the `A` that vLLM keeps for a state space model, of the `A_log` of a checkpoint.
    NegExp,
}

impl ElementMap {
    /// The name, as it is hashed and printed.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::AddOne => "add-one",
            Self::NegExp => "neg-exp",
        }
    }
}

impl core::fmt::Display for ElementMap {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}

/// What happens to elements on their way.
///
/// Rounding is to nearest even, overflow gives infinity, widening is exact, and a NaN stays a NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Transform {
    /// The bytes are copied.
    Copy,
    /// Every element is converted to another type.
    Cast {
        /// Element type in the source.
        from: Dtype,
        /// Element type in the target.
        to: Dtype,
    },
    /// Every element is mapped.
    ///
    /// [`ElementMap::AddOne`] is rounded to `from` and then converted to `to`, as a trainer's `x + 1` is before anyone
    /// converts it. [`ElementMap::NegExp`] is rounded to f32 and then converted to `to`.
    Map {
        /// The function; never [`ElementMap::Identity`] in a plan.
        map: ElementMap,
        /// Element type in the source.
        from: Dtype,
        /// Element type in the target.
        to: Dtype,
    },
}

impl Transform {
    /// The transform that joins two element types, if one does.
    #[must_use]
    pub fn between(from: Dtype, to: Dtype) -> Option<Self> {
        match (from, to) {
            (from, to) if from == to => Some(Self::Copy),
            (Dtype::F32, Dtype::Bf16 | Dtype::F16) | (Dtype::Bf16 | Dtype::F16, Dtype::F32) => {
                Some(Self::Cast { from, to })
            }
            _ => None,
        }
    }

    /// The transform that maps elements on the way from one type to another, if it is defined: maps are, where both
    /// types are F32, BF16 or F16 and [`Transform::between`] joins them.
    #[must_use]
    pub fn mapping(map: ElementMap, from: Dtype, to: Dtype) -> Option<Self> {
        let joined = Self::between(from, to)?;
        match (map, from) {
            (ElementMap::Identity, _) => Some(joined),
            (_, Dtype::F32 | Dtype::Bf16 | Dtype::F16) => Some(Self::Map { map, from, to }),
            _ => None,
        }
    }

    /// Whether so many source bytes are whole elements.
    #[must_use]
    pub fn takes(self, source_bytes: u64) -> bool {
        match self {
            Self::Copy => true,
            Self::Cast { from, .. } | Self::Map { from, .. } => {
                source_bytes.is_multiple_of(from.size())
            }
        }
    }

    /// Bytes written for `source_bytes` bytes read (saturating).
    #[must_use]
    pub fn target_bytes(self, source_bytes: u64) -> u64 {
        match self {
            Self::Copy => source_bytes,
            Self::Cast { from, to } | Self::Map { from, to, .. } => {
                // No element has 0 bytes.
                let elements = source_bytes.checked_div(from.size()).unwrap_or(0);
                elements.saturating_mul(to.size())
            }
        }
    }

    pub(crate) fn encode(self, encoder: &mut Encoder) {
        match self {
            Self::Copy => encoder.u64(0),
            Self::Cast { from, to } => {
                encoder.u64(1);
                encoder.bytes(from.name().as_bytes());
                encoder.bytes(to.name().as_bytes());
            }
            Self::Map { map, from, to } => {
                encoder.u64(2);
                encoder.bytes(map.name().as_bytes());
                encoder.bytes(from.name().as_bytes());
                encoder.bytes(to.name().as_bytes());
            }
        }
    }
}
