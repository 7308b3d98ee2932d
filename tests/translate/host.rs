//! Landing on the host: casts against an independent rounding, strided copies against a loop over elements.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use half::{bf16, f16};
use proptest::prelude::*;
use refit::planner::{Dim, Dims, Dtype, ElementMap, Fill, Landing, Transform};
use refit_tests::floats;
use refit_translate::host::{LandError, fill, land};

const NARROW: Transform = Transform::Cast { from: Dtype::F32, to: Dtype::Bf16 };
const NARROW_F16: Transform = Transform::Cast { from: Dtype::F32, to: Dtype::F16 };
const WIDEN: Transform = Transform::Cast { from: Dtype::Bf16, to: Dtype::F32 };
const WIDEN_F16: Transform = Transform::Cast { from: Dtype::F16, to: Dtype::F32 };

fn landing(
    staging_offset: u64,
    offset: u64,
    run: u64,
    dims: Dims,
    transform: Transform,
) -> Landing {
    Landing { staging_offset, target: 0, offset, run, dims, transform }
}

/// All elements in one run, from an odd address to an odd address.
fn cast(transform: Transform, source: &[u8]) -> Vec<u8> {
    let mut staging = vec![0xee];
    staging.extend_from_slice(source);
    let bytes = transform.target_bytes(source.len() as u64);
    let mut param = vec![0xee; usize::try_from(bytes).unwrap() + 1];
    land(&landing(1, 1, source.len() as u64, Dims::none(), transform), &staging, &mut param)
        .unwrap();
    assert_eq!(param[0], 0xee);
    param.split_off(1)
}

fn narrowed(transform: Transform, values: &[f32]) -> Vec<u16> {
    let source: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    cast(transform, &source).as_chunks().0.iter().map(|two| u16::from_le_bytes(*two)).collect()
}

fn widened(transform: Transform, codes: &[u16]) -> Vec<f32> {
    let source: Vec<u8> = codes.iter().flat_map(|code| code.to_le_bytes()).collect();
    cast(transform, &source).as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect()
}

/// Every upper half of an f32 with lower halves around a tie, and random ones by multiplication.
fn interesting() -> Vec<f32> {
    let lower =
        [0u32, 1, 2, 0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff];
    let upper = |code: u32| lower.map(move |low| f32::from_bits(code << 16 | low));
    let scattered = (0..1u32 << 18).map(|index| f32::from_bits(index.wrapping_mul(0x9e37_79b9)));
    (0..=0xffff_u32).flat_map(upper).chain(scattered).collect()
}

#[test]
fn narrowing_rounds_to_nearest_even() {
    let values = interesting();
    let (bf16s, f16s) = (narrowed(NARROW, &values), narrowed(NARROW_F16, &values));
    for ((&value, bf), f) in values.iter().zip(bf16s).zip(f16s) {
        assert_eq!(bf, bf16::from_f32(value).to_bits(), "{value:e} to bf16");
        assert_eq!(f, f16::from_f32(value).to_bits(), "{value:e} to f16");
        if value.is_nan() {
            // Still a NaN, a quiet one, of the same sign.
            assert!(bf16::from_bits(bf).is_nan() && bf & 0x0040 != 0);
            assert!(f16::from_bits(f).is_nan() && f & 0x0200 != 0);
            assert_eq!(value.is_sign_negative(), bf & 0x8000 != 0);
            assert_eq!(value.is_sign_negative(), f & 0x8000 != 0);
        } else {
            let bits = |dtype| floats::encode(dtype, f64::from(value));
            assert_eq!(bf.to_le_bytes().as_slice(), bits(Dtype::Bf16), "{value:e} to bf16");
            assert_eq!(f.to_le_bytes().as_slice(), bits(Dtype::F16), "{value:e} to f16");
        }
    }
}

#[test]
fn widening_is_exact_and_undone_by_narrowing() {
    let codes: Vec<u16> = (0..=u16::MAX).collect();
    let values = widened(WIDEN, &codes);
    for ((&code, value), back) in codes.iter().zip(&values).zip(narrowed(NARROW, &values)) {
        if bf16::from_bits(code).is_nan() {
            assert!(value.is_nan() && bf16::from_bits(back).is_nan());
        } else {
            assert_eq!(value.to_bits(), u32::from(code) << 16);
            assert_eq!(back, code);
        }
    }
    let values = widened(WIDEN_F16, &codes);
    for ((&code, value), back) in codes.iter().zip(&values).zip(narrowed(NARROW_F16, &values)) {
        if f16::from_bits(code).is_nan() {
            assert!(value.is_nan() && f16::from_bits(back).is_nan());
        } else {
            assert_eq!(value.to_bits(), f16::from_bits(code).to_f32().to_bits());
            assert_eq!(back, code);
        }
    }
}

const MAPS: [ElementMap; 2] = [ElementMap::AddOne, ElementMap::NegExp];

/// Every map between every pair of types that has one.
fn maps() -> Vec<Transform> {
    let types = [Dtype::F32, Dtype::Bf16, Dtype::F16, Dtype::F64, Dtype::I32, Dtype::U8];
    let pairs = types.iter().flat_map(|&from| types.iter().map(move |&to| (from, to)));
    MAPS.iter()
        .flat_map(|&map| {
            pairs.clone().filter_map(move |(from, to)| Transform::mapping(map, from, to))
        })
        .collect()
}

#[test]
fn maps_equal_the_rounded_exact_value() {
    assert_eq!(maps().len(), 14);
    let codes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    // The upper halves of an f32, and what lies around their ties with one.
    let singles = (0..=u16::MAX).flat_map(|code| {
        [0u32, 1, 0x7fff, 0x8000, 0x8001].map(|low| (u32::from(code) << 16 | low).to_le_bytes())
    });
    let singles: Vec<u8> = singles.flatten().collect();
    for transform in maps() {
        let Transform::Map { from, to, .. } = transform else { panic!("{transform:?}") };
        let source = if from == Dtype::F32 { &singles } else { &codes };
        let (size, wide) =
            (usize::try_from(from.size()).unwrap(), usize::try_from(to.size()).unwrap());
        let got = cast(transform, source);
        for (element, got) in source.chunks_exact(size).zip(got.chunks_exact(wide)) {
            if floats::decode(from, element).is_nan() {
                assert!(floats::decode(to, got).is_nan(), "{transform:?} of {element:?}");
                let sign = |bytes: &[u8]| bytes.last().unwrap() & 0x80;
                assert_eq!(sign(got), sign(element), "{transform:?} of {element:?}");
            } else {
                assert_eq!(
                    got,
                    floats::transformed(transform, element),
                    "{transform:?} of {element:?}"
                );
            }
        }
    }
}

/// The f32 whose exponentials lie closest to the middle between two f32, and the borders of overflow and underflow;
/// the values were computed with 400 bits.
#[test]
fn exponentials_are_correctly_rounded_where_it_is_hardest() {
    let cases: [(u32, u32); 19] = [
        (0xc169_12cd, 0xb4fd_331b),
        (0xbbf0_edf1, 0xbf7e_1fe9),
        (0x377e_ff81, 0xbf80_0080),
        (0xbae0_e25c, 0xbf7f_8fa7),
        (0xb300_0000, 0xbf80_0000),
        (0x3380_0000, 0xbf80_0001),
        (0x39c6_be5b, 0xbf80_0c6d),
        (0x38e6_9cc1, 0xbf80_039a),
        (0x383a_3ef1, 0xbf80_0175),
        (0x3d1a_274e, 0xbf84_e8ba),
        (0x4031_5b33, 0xc17f_a47d),
        (0x42b1_7217, 0xff7f_ff84),
        (0x42b1_7218, 0xff80_0000),
        (0xc2cf_f1b4, 0x8000_0001),
        (0xc2cf_f1b5, 0x8000_0000),
        (0xc2ae_ac50, 0x807f_ffe6),
        (0x0000_0001, 0xbf80_0000),
        (0x7f80_0000, 0xff80_0000),
        (0xff80_0000, 0x8000_0000),
    ];
    let transform = Transform::Map { map: ElementMap::NegExp, from: Dtype::F32, to: Dtype::F32 };
    for (x, expected) in cases {
        let got = cast(transform, &x.to_le_bytes());
        assert_eq!(got, expected.to_le_bytes(), "-exp({})", f32::from_bits(x));
    }
}

/// One element after another, with the planner's own iterator over runs.
fn naive(landing: &Landing, staging: &[u8], param: &mut [u8]) {
    let at = |offset: u64| usize::try_from(offset).unwrap();
    let (from_size, to_size) = match landing.transform {
        Transform::Cast { from, to } | Transform::Map { from, to, .. } => (from.size(), to.size()),
        _ => (1, 1),
    };
    for (from, into) in landing.dims.offsets() {
        for element in 0..landing.run / from_size {
            let source = at(landing.staging_offset + from + element * from_size);
            let target = at(landing.offset + into + element * to_size);
            let bytes = &staging[source..source + at(from_size)];
            let float = || f32::from_le_bytes(bytes.try_into().unwrap());
            let code = || u16::from_le_bytes(bytes.try_into().unwrap());
            let converted = match landing.transform {
                NARROW => bf16::from_f32(float()).to_le_bytes().to_vec(),
                NARROW_F16 => f16::from_f32(float()).to_le_bytes().to_vec(),
                WIDEN => bf16::from_bits(code()).to_f32().to_le_bytes().to_vec(),
                WIDEN_F16 => f16::from_bits(code()).to_f32().to_le_bytes().to_vec(),
                // Of NaNs, another test tells what they must give.
                Transform::Map { from, .. } if floats::decode(from, bytes).is_nan() => {
                    cast(landing.transform, bytes)
                }
                Transform::Map { .. } => floats::transformed(landing.transform, bytes),
                _ => bytes.to_vec(),
            };
            param[target..target + at(to_size)].copy_from_slice(&converted);
        }
    }
}

/// A landing whose runs do not overlap in the target, with the bytes either side needs.
fn legal() -> impl Strategy<Value = (Landing, usize, usize)> {
    let transform = prop_oneof![
        Just(Transform::Copy),
        Just(NARROW),
        Just(NARROW_F16),
        Just(WIDEN),
        Just(WIDEN_F16),
        prop::sample::select(maps())
    ];
    let dims = prop::collection::vec((1u64..5, 0u64..20, 0u64..20), 0..4);
    (transform, 0u64..8, dims, 0u64..9, 0u64..9).prop_map(
        |(transform, elements, dims, staging_offset, offset)| {
            let run = match transform {
                Transform::Cast { from, .. } | Transform::Map { from, .. } => {
                    elements * from.size()
                }
                _ => elements,
            };
            let (mut source, mut target) = (run, transform.target_bytes(run));
            let mut outward = Vec::new();
            for (count, gap, target_gap) in dims {
                // Sources may overlap and lie apart; targets only lie apart.
                let dim = Dim { count, source_stride: gap, target_stride: target + target_gap };
                source += gap * (count - 1);
                target += dim.target_stride * (count - 1);
                outward.push(dim);
            }
            let dims: Dims = outward.into_iter().rev().collect();
            let landing = landing(staging_offset, offset, run, dims, transform);
            let size = |bytes: u64| usize::try_from(bytes).unwrap();
            (landing, size(staging_offset + source), size(offset + target))
        },
    )
}

fn noise(len: usize, seed: u8) -> Vec<u8> {
    core::iter::successors(Some(seed), |byte| Some(byte.wrapping_mul(29).wrapping_add(7)))
        .take(len)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn landing_equals_a_loop_over_elements((landing, staged, wanted) in legal(), spare in 0usize..9) {
        let staging = noise(staged + spare, 1);
        let mut param = noise(wanted + spare, 2);
        let mut expected = param.clone();
        naive(&landing, &staging, &mut expected);
        land(&landing, &staging, &mut param).unwrap();
        prop_assert_eq!(param, expected);
    }

    #[test]
    fn a_byte_too_few_is_refused((landing, staged, wanted) in legal()) {
        prop_assume!(landing.run > 0);
        let (staging, mut param) = (noise(staged, 1), noise(wanted, 2));
        let before = param.clone();
        let short = land(&landing, &staging[1..], &mut param);
        prop_assert!(matches!(short, Err(LandError::OutsideStaging { .. })), "{:?}", short);
        let short = land(&landing, &staging, &mut param[1..]);
        prop_assert!(matches!(short, Err(LandError::OutsideParam { .. })), "{:?}", short);
        prop_assert_eq!(param, before);
    }

    #[test]
    fn filling_zeroes_the_runs_and_nothing_else((landing, _, wanted) in legal()) {
        let run = landing.transform.target_bytes(landing.run);
        let zeros = Fill { target: 0, offset: landing.offset, run, dims: landing.dims.clone() };
        let mut param = noise(wanted, 2);
        let mut expected = param.clone();
        for (_, into) in zeros.dims.offsets() {
            let at = usize::try_from(zeros.offset + into).unwrap();
            expected[at..at + usize::try_from(run).unwrap()].fill(0);
        }
        fill(&zeros, &mut param).unwrap();
        prop_assert_eq!(param, expected);
    }

    #[test]
    fn nothing_panics_and_errors_write_nothing(
        staging_offset in number(), offset in number(), run in number(),
        dims in prop::collection::vec((number(), number(), number()), 0..5),
        cast in any::<bool>(),
    ) {
        let dims: Dims = dims
            .into_iter()
            .map(|(count, source_stride, target_stride)| Dim { count, source_stride, target_stride })
            .collect();
        let transform = if cast { NARROW } else { Transform::Copy };
        let (staging, mut param) = (noise(64, 1), noise(64, 2));
        let before = param.clone();
        let zeros = Fill { target: 0, offset, run, dims: dims.clone() };
        if land(&landing(staging_offset, offset, run, dims, transform), &staging, &mut param).is_err() {
            prop_assert_eq!(&param, &before);
        }
        let before = param.clone();
        if fill(&zeros, &mut param).is_err() {
            prop_assert_eq!(param, before);
        }
    }
}

/// Mostly small, sometimes hopeless.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0u64..9, 1 => any::<u64>(), 1 => Just(u64::MAX)]
}

#[test]
fn impossible_landings_are_refused() {
    let staging = [0; 8];
    let mut param = [0; 8];
    let ragged = land(&landing(0, 0, 6, Dims::none(), NARROW), &staging, &mut param);
    assert_eq!(ragged, Err(LandError::Ragged { run: 6, from: Dtype::F32 }));
    let transform = Transform::Cast { from: Dtype::Bf16, to: Dtype::F16 };
    let unknown = land(&landing(0, 0, 4, Dims::none(), transform), &staging, &mut param);
    assert_eq!(unknown, Err(LandError::Unsupported { transform }));
    let dims = Dims::one(Dim { count: 3, source_stride: 1, target_stride: 1 });
    let overlap = land(&landing(0, 0, 2, dims, Transform::Copy), &staging, &mut param);
    assert_eq!(overlap, Err(LandError::Overlap { written: 6, extent: 4 }));
    // Many dimensions of one step each are no recursion.
    let dims: Dims =
        (0..100_000).map(|_| Dim { count: 1, source_stride: 1, target_stride: 1 }).collect();
    assert_eq!(land(&landing(0, 0, 8, dims, Transform::Copy), &staging, &mut param), Ok(()));
}
