//! Floats by their definition: values as f64, rounding by searching all codes. Slow, and independent of any cast.

use refit::planner::{Dtype, ElementMap, Transform};

/// The value of an element. Every F32, BF16 and F16 value is an f64.
#[must_use]
pub fn decode(dtype: Dtype, bytes: &[u8]) -> f64 {
    let code = || u16::from_le_bytes(bytes.try_into().unwrap());
    match dtype {
        Dtype::F32 => f64::from(f32::from_le_bytes(bytes.try_into().unwrap())),
        Dtype::Bf16 => f64::from(f32::from_bits(u32::from(code()) << 16)),
        Dtype::F16 => {
            let size = match code() & 0x7fff {
                0x7c00 => f64::INFINITY,
                0x7c01.. => f64::NAN,
                finite => f16_size(finite),
            };
            if code() & 0x8000 == 0 { size } else { -size }
        }
        other => panic!("no float values for {other}"),
    }
}

/// The element nearest to a value that is not a NaN, ties to even.
#[must_use]
pub fn encode(dtype: Dtype, value: f64) -> Vec<u8> {
    match dtype {
        // What `as` does is defined: to nearest, ties to even.
        #[allow(clippy::cast_possible_truncation)]
        Dtype::F32 => (value as f32).to_le_bytes().to_vec(),
        Dtype::Bf16 => nearest(value, 0x7f80, bf16_size).to_le_bytes().to_vec(),
        Dtype::F16 => nearest(value, 0x7c00, f16_size).to_le_bytes().to_vec(),
        other => panic!("no float values for {other}"),
    }
}

/// One element on its way; NaNs are for others to test.
#[must_use]
pub fn transformed(transform: Transform, element: &[u8]) -> Vec<u8> {
    match transform {
        Transform::Copy => element.to_vec(),
        Transform::Cast { from, to } => encode(to, decode(from, element)),
        Transform::Map { map: ElementMap::AddOne, from, to } => {
            // The f64 sum of two F32 values rounds to any of these types as their exact sum does.
            let sum = encode(from, decode(from, element) + 1.0);
            encode(to, decode(from, &sum))
        }
        Transform::Map { map: ElementMap::NegExp, from, to } => {
            let exponential = encode(Dtype::F32, -decode(from, element).exp());
            encode(to, decode(Dtype::F32, &exponential))
        }
        other => panic!("no reference for {other:?}"),
    }
}

/// The value of a positive BF16 code; infinity's is the power of two that would follow the largest finite value.
fn bf16_size(code: u16) -> f64 {
    match code {
        0x7f80 => 2f64.powi(128),
        code => f64::from(f32::from_bits(u32::from(code) << 16)),
    }
}

/// The value of a positive F16 code; infinity's is the power of two that would follow the largest finite value.
fn f16_size(code: u16) -> f64 {
    match (code >> 10, f64::from(code & 0x3ff)) {
        (0, fraction) => fraction * 2f64.powi(-24),
        (exponent, fraction) => (1024.0 + fraction) * 2f64.powi(i32::from(exponent) - 25),
    }
}

/// Round to nearest even by searching all codes: `size_of` gives the positive codes' values, in order.
fn nearest(value: f64, infinity: u16, size_of: impl Fn(u16) -> f64) -> u16 {
    let sign = if value.is_sign_negative() { 0x8000 } else { 0 };
    let size = value.abs();
    let (mut low, mut high) = (0, infinity);
    if size >= size_of(infinity) {
        return sign | infinity;
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if size_of(middle) <= size { low = middle } else { high = middle }
    }
    let (below, above) = (size - size_of(low), size_of(high) - size);
    let up = above < below || (above == below && low % 2 == 1);
    sign | if up { high } else { low }
}
