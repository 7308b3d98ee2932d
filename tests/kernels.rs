//! The kernel, compiled for the host and run thread after thread, against a loop over runs.
//!
//! Needs g++. What only a device can show is in the tests of feature `cuda`.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

#[path = "kernels/host.rs"]
mod host;

use std::mem::{offset_of, size_of};

use proptest::prelude::*;
use refit::planner::{Dim, Dims, Dtype, ElementMap, Transform};
use refit_kernels::internal::{Entry, Launch, Placed};
use refit_kernels::{Effect, KernelError, Move, Side, Table};
use refit_tests::floats;
use refit_tests::moves::{Case, case, noise, transforms};

use crate::host::{Kernel, Shape};

const SHAPES: [Shape; 4] = [
    Shape { blocks: 1, threads: 32, lanes: 32 },
    Shape { blocks: 3, threads: 64, lanes: 32 },
    Shape { blocks: 2, threads: 256, lanes: 128 },
    Shape { blocks: 1, threads: 256, lanes: 256 },
];

/// Runs a case and compares all of both memories.
fn check(case: &Case, shape: Shape, seed: u64) -> Result<(), TestCaseError> {
    let source = noise(case.source, seed);
    let mut expected = noise(case.target, seed + 1);
    let (got, stored) = Kernel::get().run(case, shape, &source, &expected);
    case.carry_out(&source, &mut expected);
    prop_assert_eq!(stored, case.written(), "every byte is written once");
    let differs = got.iter().zip(&expected).position(|(got, expected)| got != expected);
    prop_assert_eq!(differs, None, "the first byte that differs");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn tables_do_what_a_loop_over_runs_does(case in case(), shape in 0usize..4, seed in any::<u32>()) {
        check(&case, SHAPES[shape], seed.into())?;
    }

    /// Whatever the numbers: a table or an error, soon.
    #[test]
    fn nothing_panics(
        from in number(), into in number(), run in number(),
        dims in prop::collection::vec((number(), number(), number()), 0..6),
        effect in prop::sample::select(effects()),
    ) {
        let dims = dims
            .into_iter()
            .map(|(count, source_stride, target_stride)| Dim { count, source_stride, target_stride })
            .collect();
        if let Ok(table) = Table::new(&[Move { from, into, run, dims, effect }]) {
            prop_assert!(!table.is_empty());
        }
    }
}

/// Small, large, or hopeless.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0u64..9,
        1 => (0u32..40).prop_map(|power| 1 << power),
        1 => any::<u64>().prop_map(|number| number >> 24),
        1 => any::<u64>(),
        1 => Just(u64::MAX),
    ]
}

fn effects() -> Vec<Effect> {
    transforms().into_iter().map(Effect::Transform).chain([Effect::Zero]).collect()
}

/// A single move over memory of its own.
fn alone(run: u64, dims: Dims, effect: Effect) -> Case {
    let written = match effect {
        Effect::Transform(transform) => transform.target_bytes(run),
        _ => run,
    };
    let size = |bytes: u64| usize::try_from(bytes).unwrap() + 64;
    let (source, target) = (size(dims.source_extent(run)), size(dims.target_extent(written)));
    let one = Move { from: 0, into: 0, run, dims, effect };
    Case { tables: vec![vec![one]], source, target }
}

fn dim(count: u64, source_stride: u64, target_stride: u64) -> Dim {
    Dim { count, source_stride, target_stride }
}

#[test]
fn runs_at_the_borders_of_tiles_and_units() {
    let copy = Effect::Transform(Transform::Copy);
    for units in [255, 256, 257, 511, 512, 513, 4095, 4096, 4097, 8191, 8192, 8193] {
        for bytes in [units * 16, units * 16 + 8, units * 4, units * 2, units] {
            check(&alone(bytes, Dims::none(), copy), SHAPES[2], units).unwrap();
        }
        let dims = Dims::one(dim(units, 48, 32));
        check(&alone(16, dims.clone(), copy), SHAPES[1], units).unwrap();
        check(&alone(16, dims, Effect::Zero), SHAPES[2], units).unwrap();
    }
    // Large enough for tiles of the largest size, of whole runs and of parts of runs.
    for run in [3 << 20, 1000, 16] {
        let dims = Dims::one(dim((40 << 20) / run, run + 16, run));
        check(&alone(run, dims, copy), SHAPES[2], run).unwrap();
    }
}

#[test]
fn long_runs_are_cut_where_units_can_be_large() {
    for (from, into) in [(0, 0), (3, 3), (3, 19), (3, 4), (8, 8), (12, 4), (1, 9)] {
        for run in [1023, 1024, 1025, 5000] {
            for effect in [Effect::Transform(Transform::Copy), Effect::Zero] {
                let mut case = alone(run, Dims::one(dim(9, 6016, 5024)), effect);
                (case.tables[0][0].from, case.tables[0][0].into) = (from, into);
                (case.source, case.target) = (case.source + 32, case.target + 32);
                check(&case, SHAPES[0], run).unwrap();
            }
        }
    }
    // Which is what they are cut for.
    let one = Move {
        from: 0x1003,
        into: 0x2003,
        run: 1 << 20,
        dims: Dims::none(),
        effect: Effect::Transform(Transform::Copy),
    };
    let table = Table::new(&[one]).unwrap();
    let units: u64 = table.entries().iter().map(|entry| entry.run * u64::from(entry.runs)).sum();
    assert!(units < (1 << 16) + 16, "{units}");
}

/// Every half-precision value, and singles of every kind, whole and unaligned.
#[test]
fn every_transform_has_the_bits_of_the_reference() {
    let halves: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let hard = [
        0xc169_12cd_u32,
        0xbbf0_edf1,
        0x377e_ff81,
        0xbae0_e25c,
        0xb300_0000,
        0x3380_0000,
        0x39c6_be5b,
        0x38e6_9cc1,
        0x383a_3ef1,
        0x3d1a_274e,
        0x4031_5b33,
        0x42b1_7217,
        0x42b1_7218,
        0xc2cf_f1b4,
        0xc2cf_f1b5,
        0xc2ae_ac50,
        0x0000_0001,
        0x7f80_0000,
        0xff80_0000,
        0x477f_efff,
        0x477f_f000,
        0x3300_0000,
        0x3300_0001,
        0x337f_ffff,
        0x3380_0001,
        0x387f_e000,
        0x387f_f000,
        0x387f_ffff,
    ];
    let lower = [0u32, 1, 0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff];
    let singles = (0..=0xffff_u32).flat_map(|upper| lower.map(|low| upper << 16 | low));
    let singles: Vec<u8> = singles.chain(hard).flat_map(u32::to_le_bytes).collect();
    for transform in transforms() {
        let (Transform::Cast { from, to } | Transform::Map { from, to, .. }) = transform else {
            continue;
        };
        let values = if from == Dtype::F32 { &singles } else { &halves };
        for shift in [0, 2] {
            let mut case = alone(values.len() as u64, Dims::none(), Effect::Transform(transform));
            case.tables[0][0].from += shift;
            case.tables[0][0].into += shift;
            case.source += 64;
            case.target += 64;
            let mut source = noise(case.source, 1);
            let at = usize::try_from(shift).unwrap();
            source[at..at + values.len()].copy_from_slice(values);
            let mut expected = noise(case.target, 2);
            let (got, _) = Kernel::get().run(&case, SHAPES[2], &source, &expected);
            case.carry_out(&source, &mut expected);
            let size = |dtype: Dtype| usize::try_from(dtype.size()).unwrap();
            let elements = values.chunks(size(from));
            let pairs = got[at..].chunks(size(to)).zip(expected[at..].chunks(size(to)));
            for (element, (got, expected)) in elements.zip(pairs) {
                assert_eq!(got, expected, "{transform:?} of {element:?}");
                if shift == 0 && !floats::decode(from, element).is_nan() {
                    assert_eq!(
                        got,
                        floats::transformed(transform, element),
                        "{transform:?} of {element:?}"
                    );
                }
            }
            assert_eq!(got, expected);
        }
    }
}

#[test]
fn more_tables_than_a_launch_holds() {
    let dims = Dims::one(dim(5, 100, 200));
    let one = |at: u64| Move {
        from: at * 1000,
        into: at * 1000,
        run: 33,
        dims: dims.clone(),
        effect: Effect::Transform(Transform::Copy),
    };
    let tables = (0..150).map(|at| if at % 7 == 0 { vec![] } else { vec![one(at)] }).collect();
    let case = Case { tables, source: 160_000, target: 160_000 };
    check(&case, SHAPES[1], 5).unwrap();
}

/// More dimensions than an entry has, in an order in which none can be joined.
#[test]
fn deep_patterns_are_written_out() {
    let counts = [3, 4, 2, 5, 3, 2, 2];
    let mut end = 7;
    let dims: Vec<Dim> = counts
        .iter()
        .zip(1..)
        .map(|(&count, gap)| {
            let stride = end + gap;
            end += stride * (count - 1);
            dim(count, stride, stride)
        })
        .collect();
    let case = alone(7, dims.into_iter().rev().collect(), Effect::Transform(Transform::Copy));
    check(&case, SHAPES[0], 3).unwrap();
    let placed = case.placed(0, 0);
    // The largest counts stay: 5, 4 and 3.
    assert_eq!(Table::new(&placed[0]).unwrap().entries().len(), 3 * 2 * 2 * 2);
}

#[test]
fn what_continues_on_both_sides_is_one_run() {
    let copy = Effect::Transform(Transform::Copy);
    let cast = Effect::Transform(Transform::Cast { from: Dtype::F32, to: Dtype::Bf16 });
    let joined = |effect, run, dims: &[Dim]| {
        let one = Move { from: 0, into: 0, run, dims: dims.iter().copied().collect(), effect };
        let table = Table::new(&[one]).unwrap();
        let [entry] = table.entries() else { panic!("{table:?}") };
        (entry.run, entry.runs)
    };
    assert_eq!(joined(copy, 32, &[dim(4, 320, 320), dim(10, 32, 32)]), (80, 1));
    assert_eq!(joined(copy, 32, &[dim(4, 640, 320), dim(10, 32, 32)]), (20, 4));
    assert_eq!(joined(copy, 32, &[dim(4, 1000, 1000), dim(10, 100, 100)]), (8, 40));
    assert_eq!(joined(cast, 32, &[dim(4, 320, 160), dim(10, 32, 16)]), (80, 1));
    assert_eq!(joined(cast, 32, &[dim(10, 32, 32)]), (2, 10));
    assert_eq!(joined(Effect::Zero, 32, &[dim(4, 9, 320), dim(10, 7, 32)]), (80, 1));
}

fn refused(run: u64, dims: &[Dim], effect: Effect) -> KernelError {
    let good = Move { from: 0, into: 0, run: 8, dims: Dims::none(), effect: Effect::Zero };
    let bad = Move { from: 64, into: 64, run, dims: dims.iter().copied().collect(), effect };
    Table::new(&[good, bad]).unwrap_err()
}

#[test]
fn impossible_moves_are_refused_by_name() {
    let copy = Effect::Transform(Transform::Copy);
    let cast = Transform::Cast { from: Dtype::Bf16, to: Dtype::F32 };
    for (run, dims) in [(0, vec![]), (8, vec![dim(0, 1, 1)]), (8, vec![dim(2, 8, 8), dim(0, 1, 1)])]
    {
        let error = refused(run, &dims, copy);
        assert!(matches!(error, KernelError::Empty { index: 1 }), "{error}");
    }
    let error = refused(7, &[], Effect::Transform(cast));
    assert!(
        matches!(error, KernelError::Ragged { index: 1, run: 7, from: Dtype::Bf16 }),
        "{error}"
    );
    for transform in [
        Transform::Cast { from: Dtype::Bf16, to: Dtype::F16 },
        Transform::Cast { from: Dtype::F32, to: Dtype::F32 },
        Transform::Cast { from: Dtype::F64, to: Dtype::F32 },
        Transform::Map { map: ElementMap::Identity, from: Dtype::F32, to: Dtype::Bf16 },
        Transform::Map { map: ElementMap::AddOne, from: Dtype::I32, to: Dtype::I32 },
        Transform::Map { map: ElementMap::NegExp, from: Dtype::F64, to: Dtype::F64 },
    ] {
        let error = refused(8, &[], Effect::Transform(transform));
        assert!(matches!(error, KernelError::Unsupported { index: 1, .. }), "{error}");
    }
    for (run, dims, effect, side) in [
        (u64::MAX - 62, vec![], copy, Side::Target),
        (8, vec![dim(2, 8, u64::MAX - 60)], copy, Side::Target),
        (8, vec![dim(2, u64::MAX - 60, 8)], copy, Side::Source),
        (8, vec![dim(u64::MAX, 2, 8)], copy, Side::Target),
        (8, vec![dim(1 << 40, 1 << 20, 1 << 30)], copy, Side::Target),
        (8, vec![dim(1 << 40, 1 << 30, 1 << 20)], copy, Side::Source),
        (u64::MAX / 2 - 1, vec![], Effect::Transform(cast), Side::Target),
    ] {
        match refused(run, &dims, effect) {
            KernelError::Wraps { index: 1, side: found } => assert_eq!(found, side, "{dims:?}"),
            error => panic!("{error}"),
        }
    }
    // Zeros have no source that could wrap.
    let zero = Move {
        from: 0,
        into: 64,
        run: 8,
        dims: Dims::one(dim(2, u64::MAX, 8)),
        effect: Effect::Zero,
    };
    assert!(Table::new(&[zero]).is_ok());
    // Runs that overlap are no error by themselves, but so many are.
    let same = vec![dim(1 << 31, 0, 0); 40];
    let error = refused(8, &same, copy);
    assert!(matches!(error, KernelError::TooMany { index: 1, what: "entries", .. }), "{error}");
    let error = refused(1, &[dim(1 << 44, 2, 1)], copy);
    assert!(matches!(error, KernelError::TooMany { index: 1, what: "tiles", .. }), "{error}");
}

#[test]
fn counts_larger_than_an_entry_holds_are_cut() {
    // (2^30 + 5) x 3 x 2 runs that nothing joins, in few entries. Too many to carry out here.
    let dims = [dim(2, 1 << 40, 1 << 41), dim(3, 1 << 36, 1 << 37), dim((1 << 30) + 5, 3, 2)];
    let one = Move {
        from: 0,
        into: 0,
        run: 1,
        dims: dims.into_iter().collect(),
        effect: Effect::Transform(Transform::Copy),
    };
    let table = Table::new(&[one]).unwrap();
    let runs: u64 = table.entries().iter().map(|entry| u64::from(entry.runs)).sum();
    assert_eq!(runs, 6 * ((1 << 30) + 5));
    assert!(table.entries().len() <= 12, "{}", table.entries().len());
    let last = |entry: &Entry| {
        let outer = entry.runs / entry.inner / entry.middle - 1;
        entry.target
            + u64::from(entry.inner - 1) * entry.target_stride[0]
            + u64::from(entry.middle - 1) * entry.target_stride[1]
            + u64::from(outer) * entry.target_stride[2]
    };
    let end = table.entries().iter().map(last).max();
    assert_eq!(end, Some((1 << 41) + 2 * (1 << 37) + ((1 << 30) + 4) * 2));
}

#[test]
fn a_table_of_nothing_is_a_table() {
    let table = Table::new(&[]).unwrap();
    assert!(table.is_empty() && table.bytes() == 0);
    check(&Case { tables: vec![vec![], vec![]], source: 64, target: 64 }, SHAPES[0], 1).unwrap();
}

#[test]
fn both_languages_lay_out_the_same_structures() {
    let expected = [
        offset_of!(Entry, source),
        offset_of!(Entry, target),
        offset_of!(Entry, source_stride),
        offset_of!(Entry, target_stride),
        offset_of!(Entry, run),
        offset_of!(Entry, piece),
        offset_of!(Entry, pieces),
        offset_of!(Entry, rows),
        offset_of!(Entry, runs),
        offset_of!(Entry, first),
        offset_of!(Entry, op),
        offset_of!(Entry, code),
        offset_of!(Entry, inner),
        offset_of!(Entry, middle),
        offset_of!(Entry, by_piece),
        offset_of!(Entry, by_inner),
        offset_of!(Entry, by_middle),
        offset_of!(Entry, shifts),
        offset_of!(Entry, reserved),
        size_of::<Entry>(),
        offset_of!(Placed, entries),
        offset_of!(Placed, owners),
        offset_of!(Placed, base),
        offset_of!(Placed, tiles),
        offset_of!(Placed, start),
        size_of::<Placed>(),
        offset_of!(Launch, tables),
        offset_of!(Launch, steps),
        offset_of!(Launch, lanes),
        offset_of!(Launch, reserved),
        offset_of!(Launch, table),
        size_of::<Launch>(),
    ];
    assert_eq!(Kernel::get().layout(), expected);
    // And so does NVRTC: the parameter has the size of ours.
    let parameter = format!("refit_move_param_0[{}]", size_of::<Launch>());
    assert!(refit_kernels::internal::PTX.contains(&parameter));
}

/// What the source asks for and no test could show: the widest loads, which do not stay in the caches, and registers
/// only.
#[test]
fn the_ptx_has_wide_loads_and_no_local_memory() {
    let ptx = refit_kernels::internal::PTX;
    for wide in ["ld.global.cs.v4.u32", "st.global.cs.v4.u32"] {
        assert!(ptx.contains(wide), "{wide}");
    }
    for slow in [".local", "call.uni", ".shared"] {
        assert!(!ptx.contains(slow), "{slow}");
    }
    // What the oldest drivers take.
    assert!(ptx.contains("\n.version 8.0\n.target sm_80\n"));
}
