//! Elements that change on their way, against an oracle that knows each type by what its bits are worth.

use refit_planner::{Dim, Dims, Dtype, ElementMap, Transform};

use super::world::{Chunk, World, allocate, pattern};
use super::{Harness, Outcome, Verdict, ensure_err};
use crate::{Cause, LocalRange, Transport, TransportError};

/// The transforms asked for. What `-exp(x)` rounds to is for the tests of those who compute it.
fn transforms() -> impl Iterator<Item = Transform> {
    use Dtype::{Bf16, F16, F32};
    let casts = [(F32, Bf16), (F32, F16), (Bf16, F32), (F16, F32)]
        .map(|(from, to)| Transform::between(from, to));
    let maps = [(F32, F32), (Bf16, Bf16), (F16, F16), (F32, Bf16), (Bf16, F32)]
        .map(|(from, to)| Transform::mapping(ElementMap::AddOne, from, to));
    casts.into_iter().chain(maps).flatten()
}

/// Casts and maps are executed if `transforms` is declared, and refused if not.
pub fn transforms_where_declared<H: Harness>(harness: &H) -> Verdict {
    const BYTES: usize = 1 << 16;
    let mut world = World::new(harness, 1, BYTES)?;
    let can = world.target.capabilities_of(&world.sources[0].peer);
    for (key, transform) in (1..).zip(transforms()) {
        let (from, to) = types(transform);
        let (read, written) = (from.size(), to.size());
        let data = without_nan(from, pattern(usize::from(key), BYTES));
        harness.write(&mut world.sources[0].memory, &data);
        let mut chunks = vec![
            // From and to places that are aligned to an element only.
            Chunk { transform, ..Chunk::plain(read, 3 * written, 1001 * read) },
            Chunk { transform, ..Chunk::plain(8192, 16_384, read) },
            // Plain copies beside them.
            Chunk::plain(1, 20_001, 333),
        ];
        if can.strided_reads {
            let dim = Dim { count: 100, source_stride: 33 * read, target_stride: 50 * written };
            let rows = Chunk::strided(5 * read, 32_768 + written, 31 * read, Dims::one(dim));
            chunks.push(Chunk { transform, ..rows });
        }
        if can.transforms {
            world.check_as(key, BYTES, &[&chunks])?;
            continue;
        }
        let memory = allocate(harness, BYTES)?;
        let _registration = world.target.register(memory.allocation())?;
        let into = LocalRange { address: memory.address(), len: BYTES as u64, kind: memory.kind() };
        ensure_err!(
            world.try_prepare(&[chunks[0].op(&world.sources[0].memory, into)]),
            TransportError::Prepare { cause: Cause::Transform { read: 0, .. }, .. },
            "a read that changes elements"
        );
    }
    if can.transforms {
        let memory = allocate(harness, BYTES)?;
        let _registration = world.target.register(memory.allocation())?;
        let into = LocalRange { address: memory.address(), len: BYTES as u64, kind: memory.kind() };
        let transform = Transform::Cast { from: Dtype::F32, to: Dtype::Bf16 };
        let mut op =
            Chunk { transform, ..Chunk::plain(0, 0, 4) }.op(&world.sources[0].memory, into);
        (op.run, op.from.len, op.into.len) = (6, 6, 2);
        ensure_err!(
            world.try_prepare(&[op]),
            TransportError::Prepare { cause: Cause::Elements { read: 0, .. }, .. },
            "one and a half elements"
        );
    }
    Ok(Outcome::Passed)
}

fn types(transform: Transform) -> (Dtype, Dtype) {
    match transform {
        Transform::Cast { from, to } | Transform::Map { from, to, .. } => (from, to),
        _ => (Dtype::U8, Dtype::U8),
    }
}

/// What a run of elements becomes.
pub(super) fn converted(transform: Transform, bytes: &[u8]) -> Vec<u8> {
    let (from, to) = types(transform);
    if let Transform::Copy = transform {
        return bytes.to_vec();
    }
    let mut out = Vec::new();
    for element in bytes.chunks_exact(super::world::size(from.size())) {
        let mut value = worth(from, bits(element));
        if let Transform::Map { map: ElementMap::AddOne, .. } = transform {
            // Twice as many digits as either has, and two: rounding to them first changes nothing.
            value = worth(from, nearest(from, value + 1.0));
        }
        let rounded = nearest(to, value).to_le_bytes();
        out.extend_from_slice(&rounded[..super::world::size(to.size())]);
    }
    out
}

fn bits(element: &[u8]) -> u32 {
    element.iter().rev().fold(0, |bits, &byte| bits << 8 | u32::from(byte))
}

/// Bits of the mantissa, and of the exponent.
fn format(dtype: Dtype) -> (u32, u32) {
    match dtype {
        Dtype::F16 => (10, 5),
        Dtype::Bf16 => (7, 8),
        _ => (23, 8),
    }
}

/// The bits of infinity.
fn infinity(dtype: Dtype) -> u32 {
    let (mantissa, exponent) = format(dtype);
    ((1 << exponent) - 1) << mantissa
}

/// The value of bits that are no NaN.
fn worth(dtype: Dtype, bits: u32) -> f64 {
    let (mantissa, exponent) = format(dtype);
    let sign = 1 << (mantissa + exponent);
    let magnitude = bits & (sign - 1);
    let value =
        if magnitude == infinity(dtype) { f64::INFINITY } else { magnitude_of(dtype, magnitude) };
    if bits & sign == 0 { value } else { -value }
}

/// The value of bits without a sign. Of those of infinity, what would come after the largest number.
fn magnitude_of(dtype: Dtype, bits: u32) -> f64 {
    let (mantissa, exponent) = format(dtype);
    let digits = f64::from(bits & ((1 << mantissa) - 1));
    let power = i32::try_from(bits >> mantissa).unwrap_or(i32::MAX);
    let bias = (1 << (exponent - 1)) - 1;
    let unit = 2f64.powi(power.max(1) - bias - i32::try_from(mantissa).unwrap_or(i32::MAX));
    let whole = if power == 0 { 0.0 } else { f64::from(1 << mantissa) };
    (whole + digits) * unit
}

/// The bits of the nearest value, of two that are equally near the even one.
fn nearest(dtype: Dtype, value: f64) -> u32 {
    let (mantissa, exponent) = format(dtype);
    let sign = u32::from(value.is_sign_negative()) << (mantissa + exponent);
    let value = value.abs();
    // Magnitudes are in the order of their bits.
    let (mut below, mut above) = (0, infinity(dtype));
    if value >= magnitude_of(dtype, above) {
        return sign | above;
    }
    while above - below > 1 {
        let middle = below + (above - below) / 2;
        if magnitude_of(dtype, middle) <= value { below = middle } else { above = middle }
    }
    let (down, up) = (value - magnitude_of(dtype, below), magnitude_of(dtype, above) - value);
    let round_up = down > up || (down == up && below % 2 == 1);
    sign | if round_up { above } else { below }
}

/// The bytes, with another number in the place of each NaN: which of them a NaN becomes is nobody's promise.
fn without_nan(dtype: Dtype, mut bytes: Vec<u8>) -> Vec<u8> {
    let (mantissa, exponent) = format(dtype);
    let sign = 1 << (mantissa + exponent);
    for element in bytes.chunks_exact_mut(super::world::size(dtype.size())) {
        if bits(element) & (sign - 1) > infinity(dtype) {
            element.fill(0x11);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oracle_agrees_with_the_processor() {
        let mut state = 1_u32;
        for _ in 0..200_000 {
            state = state.wrapping_mul(0x915F_77F5).wrapping_add(0x3039);
            let bits = state ^ state >> 15;
            let float = f32::from_bits(bits);
            if float.is_nan() {
                continue;
            }
            assert_eq!(worth(Dtype::F32, bits).to_bits(), f64::from(float).to_bits());
            assert_eq!(nearest(Dtype::F32, f64::from(float)), bits);
            let wide = f64::from(float) * 1.000_000_07;
            #[expect(clippy::cast_possible_truncation, reason = "what is looked for")]
            let narrow = wide as f32;
            assert_eq!(nearest(Dtype::F32, wide), narrow.to_bits());
            // Rounding to bfloat16, as everybody writes it.
            let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
            assert_eq!(nearest(Dtype::Bf16, f64::from(float)), rounded, "{bits:#x}");
        }
    }

    #[test]
    fn half_floats_are_those_of_the_standard() {
        for (value, bits) in [
            (0.0, 0),
            (-0.0, 0x8000),
            (1.0, 0x3C00),
            (-2.0, 0xC000),
            (65_504.0, 0x7BFF),
            (65_519.0, 0x7BFF),
            (65_520.0, 0x7C00),
            (f64::NEG_INFINITY, 0xFC00),
            // The smallest number, half of it, and a little more.
            (2f64.powi(-24), 1),
            (2f64.powi(-25), 0),
            (2f64.powi(-25) * 1.01, 1),
            (3.0 * 2f64.powi(-25), 2),
            (1.0 / 3.0, 0x3555),
        ] {
            assert_eq!(nearest(Dtype::F16, value), bits, "{value}");
        }
        for bits in (0..0x7C00).chain(0x8000..=0xFC00) {
            assert_eq!(nearest(Dtype::F16, worth(Dtype::F16, bits)), bits, "{bits:#x}");
        }
    }
}
