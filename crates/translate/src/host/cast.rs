//! Conversions between floats over bytes of any alignment.

use half::{bf16, f16};
use refit_planner::{Dtype, Transform};

/// A conversion that exists. Narrowing rounds to nearest even, overflow gives infinity, NaN stays a (quiet) NaN;
/// widening is exact.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cast {
    pub(super) from: Dtype,
    convert: fn(&[u8], &mut [u8]),
}

impl Cast {
    pub(super) fn new(transform: Transform) -> Option<Self> {
        let Transform::Cast { from, to } = transform else { return None };
        let convert: fn(&[u8], &mut [u8]) = match (from, to) {
            (Dtype::F32, Dtype::Bf16) => |source, target| {
                each(source, target, |four| bf16_bits(f32::from_le_bytes(four)).to_le_bytes());
            },
            (Dtype::F32, Dtype::F16) => |source, target| {
                each(source, target, |four| f16::from_f32(f32::from_le_bytes(four)).to_le_bytes());
            },
            (Dtype::Bf16, Dtype::F32) => |source, target| {
                each(source, target, |two| bf16::from_le_bytes(two).to_f32().to_le_bytes());
            },
            (Dtype::F16, Dtype::F32) => |source, target| {
                each(source, target, |two| f16::from_le_bytes(two).to_f32().to_le_bytes());
            },
            _ => return None,
        };
        Some(Self { from, convert })
    }

    /// Converts one run; both slices hold the same number of elements.
    pub(super) fn run(self, source: &[u8], target: &mut [u8]) {
        (self.convert)(source, target);
    }
}

/// `half::bf16::from_f32` as a selection of two values instead of a branch, which the compiler turns into vectors.
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let upper = bits >> 16;
    let rounded = bits.wrapping_add(0x7fff + (upper & 1)) >> 16;
    let chosen = if bits & 0x7fff_ffff > 0x7f80_0000 { upper | 0x0040 } else { rounded };
    #[allow(clippy::cast_possible_truncation, reason = "both are below 2^16 after the shift")]
    let narrow = chosen as u16;
    narrow
}

fn each<const N: usize, const M: usize>(
    source: &[u8],
    target: &mut [u8],
    convert: impl Fn([u8; N]) -> [u8; M],
) {
    let (source, _) = source.as_chunks::<N>();
    let (target, _) = target.as_chunks_mut::<M>();
    for (from, into) in source.iter().zip(target) {
        *into = convert(*from);
    }
}
