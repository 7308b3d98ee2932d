//! What planning costs when layouts are made to be expensive, and that being quick did not make it wrong.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::ops::Range;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use refit::planner::{
    Band, Capabilities, Dtype, LayoutBuilder, LayoutError, LowerError, LowerOptions, Mode, Param,
    Plan, PlanError, PlanOptions, Policy, RankLayout, SourceLayout, lower, plan,
};

/// Bands of one parameter: more than any model has, few enough for a message.
const MANY: u64 = 100_000;

/// Far more than any of these takes, far less than the square of [`MANY`] does.
const PATIENCE: Duration = Duration::from_secs(20);

/// A box of the tensor, and where it lies: first row, first column, rows between rows.
type Placed = (Range<u64>, Range<u64>, (u64, u64), u64);

/// A rank with one parameter of these bands. The tensor and the parameter have the same shape.
fn rank(rows: u64, cols: u64, placed: impl IntoIterator<Item = Placed>) -> RankLayout {
    let mut builder = LayoutBuilder::new(0);
    let tensor = builder.tensor("w", rows, cols).unwrap();
    let bands = placed.into_iter().map(|(rows, cols, (row, col), step)| {
        Band::new(tensor, rows, cols).at(row, col).row_step(step)
    });
    builder.param(Param::new("w", Dtype::U8, rows, cols).bands(bands)).unwrap();
    builder.build()
}

fn whole(rows: u64, cols: u64) -> RankLayout {
    rank(rows, cols, [(0..rows, 0..cols, (0, 0), 1)])
}

/// Strips of `height` rows, the last one lower.
fn row_strips(rows: u64, cols: u64, height: u64) -> RankLayout {
    let strip = |start: u64| (start..rows.min(start + height), 0..cols, (start, 0), 1);
    rank(rows, cols, (0..rows.div_ceil(height)).map(|index| strip(index * height)))
}

fn col_strips(rows: u64, cols: u64, width: u64) -> RankLayout {
    let strip = |start: u64| (0..rows, start..cols.min(start + width), (0, start), 1);
    rank(rows, cols, (0..cols.div_ceil(width)).map(|index| strip(index * width)))
}

/// Plans, in time.
fn timed(what: &str, source: RankLayout, target: &RankLayout) -> Result<Plan, PlanError> {
    let started = Instant::now();
    let source = SourceLayout::new(vec![source]).unwrap();
    // A quarter of the default, so that those who exceed it do so in a quarter of the time.
    let result = plan(&source, target, &PlanOptions::default().with_max_pieces(1 << 20));
    let took = started.elapsed();
    assert!(took < PATIENCE, "{what} took {took:?}");
    result
}

#[test]
fn many_strips_are_joined_in_time() {
    let tall = 2 * MANY;
    let cases = [
        ("whole from rows", row_strips(tall, 2, 2), whole(tall, 2)),
        ("rows from whole", whole(tall, 2), row_strips(tall, 2, 2)),
        ("rows from others", row_strips(tall, 2, 2), row_strips(tall, 2, 3)),
        ("whole from columns", col_strips(2, tall, 2), whole(2, tall)),
        ("columns from whole", whole(2, tall), col_strips(2, tall, 2)),
        ("columns from others", col_strips(2, tall, 2), col_strips(2, tall, 3)),
    ];
    for (what, source, target) in cases {
        let plan = timed(what, source, &target).unwrap();
        assert_eq!(plan.coverage().copied_bytes, target.bytes(), "{what}");
    }
}

#[test]
fn interleaved_rows_are_proven_in_time() {
    // Band `i` has every row that is `i` modulo the number of bands.
    let rows = 2 * MANY;
    let bands = (0..MANY).map(|index| (2 * index..2 * index + 2, 0..1, (index, 0), MANY));
    let target = rank(rows, 1, bands);
    let plan = timed("every row another band", whole(rows, 1), &target).unwrap();
    assert_eq!(plan.coverage().copied_bytes, target.bytes());
}

#[test]
fn what_crosses_in_too_many_ways_is_refused_in_time() {
    let too_complex = |what, source, target: &RankLayout| {
        let result = timed(what, source, target);
        assert!(matches!(result, Err(PlanError::TooComplex { .. })), "{what}: {result:?}");
    };
    too_complex("rows across columns", col_strips(MANY, MANY, 1), &row_strips(MANY, MANY, 1));

    // Every step is another: no lane has two claims, and each is compared with each.
    let pairs = (0..MANY).map(|index| (2 * index..2 * index + 2, 0..1, (index, 0), MANY + index));
    too_complex("a step each", whole(4 * MANY, 1), &rank(4 * MANY, 1, pairs));

    // The same row over and over: each copy is one that could be read.
    let copies = |_| (0..1, 0..1, (0, 0), 1);
    let source = rank(MANY, 1, (0..MANY).map(copies));
    let wanted = (0..MANY).map(|row| (0..1, 0..1, (row, 0), 1));
    too_complex("as many copies as wishes", source, &rank(MANY, 1, wanted));
}

#[test]
fn nested_shards_end_in_time() {
    // Each shard contains the next, so that a tree over them tells little.
    let nested = (0..MANY).map(|index| (index..2 * MANY - index, 0..2, (0, 0), 1));
    let source = rank(2 * MANY, 2, nested);
    let result = timed("nested shards", source, &row_strips(2 * MANY, 2, 3));
    assert!(matches!(result, Ok(_) | Err(PlanError::TooComplex { .. })), "{result:?}");
}

#[test]
fn the_limit_on_pieces_is_kept() {
    let source = SourceLayout::new(vec![row_strips(100, 2, 1)]).unwrap();
    let options = PlanOptions::default();
    let plan_with = |pieces| plan(&source, &whole(100, 2), &options.with_max_pieces(pieces));
    assert!(plan_with(100).is_ok());
    assert_eq!(
        plan_with(99).map(|_| ()),
        Err(PlanError::TooComplex { param: "w".into(), max_pieces: 99 })
    );
}

#[test]
fn a_rank_that_no_memory_holds_is_refused() {
    let mut builder = LayoutBuilder::new(3);
    let half = i64::MAX as u64 / 2;
    builder.param(Param::new("a", Dtype::U8, half, 1)).unwrap();
    builder.param(Param::new("b", Dtype::U8, half, 1)).unwrap();
    let third = builder.param(Param::new("c", Dtype::U8, half, 1)).map(|_| ());
    assert_eq!(third, Err(LayoutError::TooLarge { rank: 3, name: "c".into() }));
}

/// A tensor that one side holds whole in f32 and the other wants in bf16, cut at a column.
fn cast(rows: u64, cols: u64, cut: u64) -> Plan {
    let side = |dtype, cuts: &[u64]| {
        let mut builder = LayoutBuilder::new(0);
        let tensor = builder.tensor("w", rows, cols).unwrap();
        for pair in cuts.windows(2) {
            let band = Band::new(tensor, 0..rows, pair[0]..pair[1]);
            let param = Param::new(format!("w{}", pair[0]), dtype, rows, pair[1] - pair[0]);
            builder.param(param.band(band)).unwrap();
        }
        builder.build()
    };
    let source = SourceLayout::new(vec![side(Dtype::F32, &[0, cols])]).unwrap();
    plan(&source, &side(Dtype::Bf16, &[0, cut, cols]), &PlanOptions::default()).unwrap()
}

#[test]
fn sizes_that_nobody_has_are_lowered_or_refused_in_time() {
    let started = Instant::now();
    let capabilities = Capabilities::plain(2_000, 5_000);
    let options = LowerOptions::default();

    // Waves of 8 MiB would be a trillion; one wave is all there is then.
    let (rows, cols) = (1 << 40, 1 << 20);
    let plan = cast(rows, cols, cols - 1);
    let program = lower(&plan, &capabilities, &options).unwrap();
    assert_eq!((program.waves().len(), program.reads().len()), (1, 2));
    assert_eq!(program.needed_bytes(), rows * cols * 4);

    // A read per row would be a trillion too, and nothing else is allowed here.
    for options in [
        options.with_policy(Policy::ExactWire),
        options.with_mode(Mode::Staged).with_policy(Policy::ReadPerRun),
    ] {
        let refused = lower(&plan, &capabilities, &options).map(|_| ());
        assert_eq!(refused, Err(LowerError::TooManyReads { reads: 2 * rows, max: 1 << 25 }));
    }
    assert!(started.elapsed() < PATIENCE);
}

/// Bands that may overlap and leave gaps, in a parameter of these extents.
fn claims() -> impl Strategy<Value = (u64, u64, Vec<Placed>)> {
    (2u64..14, 1u64..5).prop_flat_map(|(rows, cols)| {
        let band = (0..rows, 1u64..5, 1..=rows, 0..cols, 1..=cols);
        let placed = band.prop_map(move |(row, step, count, col, width)| {
            let count = count.min((rows - row).div_ceil(step));
            let width = width.min(cols - col);
            (0..count, 0..width, (row, col), step)
        });
        (Just(rows), Just(cols), proptest::collection::vec(placed, 1..6))
    })
}

/// Claims that tile a parameter: lanes of several steps, cut at random.
fn tiled() -> impl Strategy<Value = (u64, u64, Vec<Placed>)> {
    (proptest::collection::vec((1u64..5, 1u64..4, 1u64..5, any::<bool>()), 1..6), 1u64..5).prop_map(
        |(blocks, cols)| {
            let (mut row, mut placed) = (0, Vec::new());
            for (step, count, cut, split) in blocks {
                for lane in 0..step {
                    let mut add = |from: u64, to: u64| {
                        if from < to {
                            placed.push((0..count, 0..to - from, (row + lane, from), step));
                        }
                    };
                    let cut = if split { cut.min(cols) } else { cols };
                    add(0, cut);
                    add(cut, cols);
                }
                row += step * count;
            }
            (row, cols, placed)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_000, ..ProptestConfig::default() })]

    #[test]
    fn tilings_are_those_that_counting_finds(
        (rows, cols, placed) in prop_oneof![claims(), tiled()],
        dropped in any::<proptest::sample::Index>(),
        drop_one in prop::bool::weighted(0.2),
    ) {
        let mut placed = placed;
        if drop_one {
            placed.remove(dropped.index(placed.len()));
        }
        let mut claimed = vec![0; usize::try_from(rows * cols).unwrap()];
        for (band_rows, band_cols, (row, col), step) in &placed {
            for down in 0..band_rows.end {
                for right in 0..band_cols.end {
                    let at = (row + down * step) * cols + col + right;
                    claimed[usize::try_from(at).unwrap()] += 1;
                }
            }
        }
        let count = |row: u64, col: u64| claimed[usize::try_from(row * cols + col).unwrap()];
        let total: u64 = claimed.iter().sum();

        let source = SourceLayout::new(vec![whole(rows, cols)]).unwrap();
        let target = rank(rows, cols, placed);
        match plan(&source, &target, &PlanOptions::default()) {
            Ok(_) => prop_assert!(claimed.iter().all(|&times| times == 1)),
            Err(PlanError::Overlap { row, col, .. }) => prop_assert!(count(row, col) > 1),
            Err(PlanError::Gap { claimed: sum, elements, .. }) => {
                prop_assert!(claimed.iter().all(|&times| times <= 1) && total < elements);
                prop_assert_eq!((sum, elements), (total, rows * cols));
            }
            Err(other) => prop_assert!(false, "unexpected {other}"),
        }
    }
}
