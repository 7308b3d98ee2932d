//! Casts and element maps over bytes of any alignment.

use half::{bf16, f16};
use refit_planner::{Dtype, ElementMap, Transform};

/// A transform that changes elements and can be carried out here.
#[derive(Clone, Copy, Debug)]
pub(super) struct Conversion {
    pub(super) from: Dtype,
    convert: Convert,
}

/// Converts one run; both slices hold the same number of elements.
type Convert = fn(&[u8], &mut [u8]);

impl Conversion {
    pub(super) fn new(transform: Transform) -> Option<Self> {
        let (map, from, to) = match transform {
            Transform::Cast { from, to } => (ElementMap::Identity, from, to),
            Transform::Map { map, from, to } => (map, from, to),
            _ => return None,
        };
        if Transform::mapping(map, from, to) != Some(transform) {
            return None;
        }
        let convert = match (from, to) {
            (Dtype::F32, Dtype::F32) => between::<f32, f32, 4, 4>(map),
            (Dtype::F32, Dtype::Bf16) => between::<f32, bf16, 4, 2>(map),
            (Dtype::F32, Dtype::F16) => between::<f32, f16, 4, 2>(map),
            (Dtype::Bf16, Dtype::F32) => between::<bf16, f32, 2, 4>(map),
            (Dtype::Bf16, Dtype::Bf16) => between::<bf16, bf16, 2, 2>(map),
            (Dtype::F16, Dtype::F32) => between::<f16, f32, 2, 4>(map),
            (Dtype::F16, Dtype::F16) => between::<f16, f16, 2, 2>(map),
            _ => None,
        }?;
        Some(Self { from, convert })
    }

    /// Converts one run; both slices hold the same number of elements.
    pub(super) fn run(self, source: &[u8], target: &mut [u8]) {
        (self.convert)(source, target);
    }
}

/// A float of `N` bytes whose values f32 holds exactly.
trait Float<const N: usize> {
    fn widen(bytes: [u8; N]) -> f32;

    /// Rounds to nearest even; overflow gives infinity, NaN stays a NaN.
    fn narrow(value: f32) -> [u8; N];
}

impl Float<4> for f32 {
    fn widen(bytes: [u8; 4]) -> f32 {
        Self::from_le_bytes(bytes)
    }

    fn narrow(value: f32) -> [u8; 4] {
        value.to_le_bytes()
    }
}

impl Float<2> for bf16 {
    fn widen(bytes: [u8; 2]) -> f32 {
        Self::from_le_bytes(bytes).to_f32()
    }

    /// `half::bf16::from_f32` as a selection of two values instead of a branch, which the compiler turns into vectors.
    fn narrow(value: f32) -> [u8; 2] {
        let bits = value.to_bits();
        let upper = bits >> 16;
        let rounded = bits.wrapping_add(0x7fff + (upper & 1)) >> 16;
        let chosen = if bits & 0x7fff_ffff > 0x7f80_0000 { upper | 0x0040 } else { rounded };
        #[allow(clippy::cast_possible_truncation, reason = "both are below 2^16 after the shift")]
        let narrow = chosen as u16;
        narrow.to_le_bytes()
    }
}

impl Float<2> for f16 {
    fn widen(bytes: [u8; 2]) -> f32 {
        Self::from_le_bytes(bytes).to_f32()
    }

    fn narrow(value: f32) -> [u8; 2] {
        Self::from_f32(value).to_le_bytes()
    }
}

/// The loop that maps elements of type `A` and stores them as `B`.
fn between<A: Float<N>, B: Float<M>, const N: usize, const M: usize>(
    map: ElementMap,
) -> Option<Convert> {
    match map {
        ElementMap::Identity => {
            Some(|source, target| each(source, target, |a| B::narrow(A::widen(a))))
        }
        ElementMap::AddOne => Some(|source, target| {
            each(source, target, |a| B::narrow(A::widen(A::narrow(add_one(A::widen(a))))));
        }),
        ElementMap::NegExp => {
            Some(|source, target| each(source, target, |a| B::narrow(neg_exp(A::widen(a)))))
        }
        _ => None,
    }
}

/// Rounded to f32. Narrowing the sum of a half-precision value to its type then equals rounding the exact sum once,
/// because f32 has more than twice their digits and two.
fn add_one(x: f32) -> f32 {
    // Which NaN a sum gives is not defined; the one that came is.
    if x.is_nan() { x } else { x + 1.0 }
}

/// `-exp(x)`, rounded to f32 as the exact value would be.
///
/// The f64 result is off by less than one of its last places. That could change how it rounds to f32 only where the
/// exact value lies that close to the middle between two f32 values, and no `x` leads there: of all 2^32, the closest
/// comes within 1.27 last places (`exp(-0x1.d2259ap3)`), the next within 2.42.
fn neg_exp(x: f32) -> f32 {
    if x.is_nan() {
        return x;
    }
    #[allow(clippy::cast_possible_truncation, reason = "rounding once more is the point")]
    let rounded = libm::exp(f64::from(x)) as f32;
    -rounded
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
