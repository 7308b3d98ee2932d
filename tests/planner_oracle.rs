//! The planner and the lowering against the element-by-element oracle, over random legal layouts.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use proptest::collection::vec;
use proptest::prelude::*;
use refit::planner::{
    Band, Bulk, Capabilities, Destination, Dtype, ElementMap, LayoutBuilder, LayoutError,
    LowerOptions, Method, Mode, Param, Plan, PlanError, PlanOptions, Policy, Position, RankLayout,
    Replicas, SourceLayout, Transform, lower, lower_for, lower_placed, plan,
};
use refit_tests::execute::{self, Sources};
use refit_tests::strategies::{Model, model};
use refit_tests::{landing, oracle};

const CAPABILITIES: Capabilities = Capabilities::plain(2_000, 5_000);

fn source(model: &Model) -> SourceLayout {
    SourceLayout::new(model.source.clone()).unwrap()
}

fn sources(model: &Model) -> Sources {
    model.source.iter().map(|layout| (layout.rank(), oracle::buffers(layout))).collect()
}

/// How source parameters lie in their ranks' memory.
#[derive(Clone, Copy, Debug)]
enum Arranged {
    /// Nobody knows.
    Unknown,
    /// By name, without gaps, or with a gap of so many bytes every so often, from this offset on.
    ByName { first: u64, gap: u64, every: usize },
    /// In an order that has nothing to do with names, some of them unknown.
    Shuffled(u64),
}

fn arrangements() -> impl Strategy<Value = Arranged> {
    prop_oneof![
        Just(Arranged::Unknown),
        (0u64..300, 0u64..300, 1usize..9).prop_map(|(first, gap, every)| Arranged::ByName {
            first,
            gap,
            every
        }),
        any::<u64>().prop_map(Arranged::Shuffled),
    ]
}

impl Arranged {
    fn positions(self, plan: &Plan) -> Vec<Option<Position>> {
        let sources = plan.sources();
        let mut order: Vec<usize> = (0..sources.len()).collect();
        match self {
            Self::Unknown => return Vec::new(),
            Self::ByName { .. } => {}
            Self::Shuffled(seed) => order.sort_by_key(|&index| {
                (index as u64 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
            }),
        }
        let mut positions = vec![None; sources.len()];
        let mut ends = std::collections::BTreeMap::<u32, u64>::new();
        for (nth, index) in order.into_iter().enumerate() {
            let end = ends.entry(sources[index].rank).or_insert(match self {
                Self::ByName { first, .. } => first,
                _ => 0,
            });
            match self {
                Self::ByName { gap, every, .. } if nth % every == 0 => *end += gap,
                Self::Shuffled(seed) if (seed >> (nth % 60)) & 7 == 7 => continue,
                _ => {}
            }
            positions[index] = Some(Position { block: 0, offset: *end });
            *end += sources[index].bytes;
        }
        positions
    }
}

fn every_option() -> impl Strategy<Value = (Capabilities, LowerOptions)> {
    let bulk = proptest::option::of(
        (1u64..10_000, 0u64..10_000)
            .prop_map(|(bytes_per_us, ns_per_read)| Bulk { bytes_per_us, ns_per_read }),
    );
    let capabilities = (any::<(bool, bool)>(), 1u64..10_000, 0u64..10_000, bulk).prop_map(
        |((strided_reads, transforms), rate, read, bulk)| Capabilities {
            strided_reads,
            transforms,
            bulk,
            ..Capabilities::plain(rate, read)
        },
    );
    let modes = prop_oneof![Just(Mode::Direct), Just(Mode::Staged)];
    let policies = prop_oneof![Just(Policy::Cheapest), Just(Policy::ExactWire)];
    // Waves of less than a row, of a few tensors, and of everything.
    let waves = prop_oneof![0u64..64, 64u64..4_096, Just(u64::MAX)];
    (capabilities, modes, policies, 1u64..10_000, waves, 0u32..4).prop_map(
        |(capabilities, mode, policy, landing, wave, slots)| {
            (
                capabilities,
                LowerOptions::default()
                    .with_mode(mode)
                    .with_policy(policy)
                    .with_landing_rate(landing)
                    .with_wave_bytes(wave)
                    .with_slots(slots),
            )
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    #[test]
    fn executing_a_plan_equals_the_oracle(model in model(), lowest in any::<bool>()) {
        let (joined, sources) = (source(&model), sources(&model));
        let rule = if lowest { Replicas::Lowest } else { Replicas::Spread };
        for target in &model.target {
            let plan = plan(&joined, target, &PlanOptions::default().with_replicas(rule)).unwrap();
            prop_assert_eq!(execute::plan(&plan, &sources), oracle::wanted(target, &model.source));
            let coverage = plan.coverage();
            prop_assert_eq!(coverage.target_bytes, target.bytes());
            prop_assert_eq!(coverage.copied_bytes + coverage.filled_bytes, coverage.target_bytes);
        }
    }

    #[test]
    fn executing_a_program_equals_the_oracle(
        model in model(), (capabilities, options) in every_option(), (other, _) in every_option(), mixed in any::<bool>(),
        arranged in arrangements(),
    ) {
        let (joined, sources) = (source(&model), sources(&model));
        for target in &model.target {
            let plan = plan(&joined, target, &PlanOptions::default()).unwrap();
            let link = |rank| if mixed && rank % 2 == 1 { other } else { capabilities };
            let positions = arranged.positions(&plan);
            let program = lower_placed(&plan, link, &positions, &options).unwrap();
            if positions.is_empty() {
                prop_assert_eq!(&program, &lower_for(&plan, link, &options).unwrap());
            }
            for read in program.reads() {
                let link = link(program.sources()[read.source as usize].rank);
                prop_assert!(read.dims.is_none() || (link.strided_reads && !read.bulk));
                prop_assert!(read.transform == Transform::Copy || (link.transforms && !read.bulk));
                prop_assert!(!read.bulk || link.bulk.is_some());
            }
            let wanted = oracle::wanted(target, &model.source);
            prop_assert_eq!(&execute::program(&program, &sources), &wanted);
            prop_assert_eq!(landing::program(&program, &sources), wanted);
            if options.policy == Policy::ExactWire {
                prop_assert!(program.wire_bytes() <= program.needed_bytes());
            }
            let choices = program.choices();
            prop_assert_eq!(choices.iter().map(|choice| choice.reads).sum::<u64>(), program.reads().len() as u64);
            let gaps: u64 = program.reads().iter().map(|read| read.gap).sum();
            prop_assert_eq!(choices.iter().map(|choice| choice.wire_bytes).sum::<u64>() + gaps, program.wire_bytes());
            prop_assert!(gaps * 64 <= program.needed_bytes(), "{} bytes of gaps", gaps);
            if options.mode == Mode::Staged {
                prop_assert_eq!(program.waves().len(), 1);
            }
            let live = program.reads().iter().any(|read| matches!(read.destination, Destination::Live { .. }));
            prop_assert!(!(live && options.mode == Mode::Staged), "a staged program writes live parameters");
        }
    }

    #[test]
    fn the_order_of_the_input_does_not_matter(model in model(), seed in any::<u64>()) {
        let shuffled = Model {
            source: model.source.iter().rev().map(|layout| rebuilt(layout, seed)).collect(),
            target: model.target.iter().map(|layout| rebuilt(layout, seed)).collect(),
        };
        for (target, other) in model.target.iter().zip(&shuffled.target) {
            prop_assert_eq!(target, other);
            let first = plan(&source(&model), target, &PlanOptions::default()).unwrap();
            let second = plan(&source(&shuffled), other, &PlanOptions::default()).unwrap();
            prop_assert_eq!(first.hash(), second.hash());
            prop_assert_eq!(first, second);
        }
    }

    #[test]
    fn equal_hashes_mean_equal_work(a in model(), b in model()) {
        let plan_of = |model: &Model| plan(&source(model), &model.target[0], &PlanOptions::default()).unwrap();
        let (first, second) = (plan_of(&a), plan_of(&b));
        let same = first.segments() == second.segments() && first.fills() == second.fills()
            && first.sources() == second.sources() && first.targets() == second.targets();
        prop_assert_eq!(same, first.hash() == second.hash());
    }

    #[test]
    fn a_missing_source_rank_is_named_or_not_needed(model in model()) {
        let rest: Vec<RankLayout> = model.source.iter().skip(1).cloned().collect();
        let joined = SourceLayout::new(rest.clone()).unwrap();
        let sources: Sources = rest.iter().map(|layout| (layout.rank(), oracle::buffers(layout))).collect();
        for target in &model.target {
            match plan(&joined, target, &PlanOptions::default()) {
                Ok(plan) => prop_assert_eq!(execute::plan(&plan, &sources), oracle::wanted(target, &model.source)),
                Err(PlanError::Uncovered { .. }) => {}
                Err(other) => prop_assert!(false, "unexpected {other}"),
            }
        }
    }

    #[test]
    fn a_layout_survives_serialisation(model in model()) {
        for layout in model.source.iter().chain(&model.target) {
            let text = serde_json::to_string(layout).unwrap();
            prop_assert_eq!(&serde_json::from_str::<RankLayout>(&text).unwrap(), layout);
        }
    }

    #[test]
    fn replicas_share_the_load(params in vec(1u64..200, 1..40), copies in 2u32..6, target in any::<u32>()) {
        let ranks: Vec<_> = (0..copies).map(|rank| replicated(rank, &params)).collect();
        let joined = SourceLayout::new(ranks).unwrap();
        let plan = plan(&joined, &replicated(target, &params), &PlanOptions::default()).unwrap();
        let loads = plan.bytes_by_source();
        let least = (0..copies).map(|rank| loads.get(&rank).copied().unwrap_or(0)).min().unwrap();
        let most = loads.values().max().unwrap();
        // Within one tensor of even; an element has two bytes.
        prop_assert!(most - least <= 2 * params.iter().max().unwrap(), "{loads:?}");
    }

    /// Shards that some ranks hold and norms that all hold: over the copies that may be chosen, which are the ranks
    /// that are met anyway.
    #[test]
    fn replicas_of_shards_share_the_load(
        params in vec((1u64..50, any::<bool>()), 1..40), shards in 1u32..4, copies in 1u32..5, target in any::<u32>(),
    ) {
        let ranks: Vec<_> =
            (0..shards * copies).map(|rank| sharded(rank, rank % shards, shards, &params)).collect();
        let joined = SourceLayout::new(ranks).unwrap();
        let wanted = sharded(target, target % shards, shards, &params);
        let plan = plan(&joined, &wanted, &PlanOptions::default()).unwrap();
        let loads = plan.bytes_by_source();
        let any_shard = params.iter().any(|(_, replicated)| !replicated);
        let may_be_asked: Vec<u32> = (0..shards * copies)
            .filter(|rank| !any_shard || rank % shards == target % shards)
            .collect();
        prop_assert!(loads.keys().all(|rank| may_be_asked.contains(rank)), "{loads:?}");
        let load = |rank: &u32| loads.get(rank).copied().unwrap_or(0);
        let (most, least) =
            (may_be_asked.iter().map(load).max().unwrap(), may_be_asked.iter().map(load).min().unwrap());
        let largest = wanted.params().iter().map(Param::bytes).max().unwrap();
        prop_assert!(most - least <= largest, "{loads:?}");
    }

    /// A tensor that is read whole from one copy, by targets as a parallel group numbers them.
    #[test]
    fn targets_begin_at_different_copies(copies in 2u32..33, stride in 1u32..300, first in 0u32..1000) {
        let ranks: Vec<_> = (0..copies).map(|rank| replicated(rank, &[1])).collect();
        let joined = SourceLayout::new(ranks).unwrap();
        let mut asked = std::collections::BTreeMap::<u32, u32>::new();
        for target in (0..16 * copies).map(|number| first + stride * number) {
            let plan = plan(&joined, &replicated(target, &[1]), &PlanOptions::default()).unwrap();
            *asked.entry(plan.sources()[0].rank).or_default() += 1;
        }
        prop_assert_eq!(asked.len(), copies as usize, "{:?}", asked);
        prop_assert!(asked.values().all(|&times| times <= 3 * 16), "{:?}", asked);
    }

    #[test]
    fn what_one_source_parameter_holds_is_read_from_one_rank(copies in 1u32..9, target in any::<u32>()) {
        // A gate above an up projection on every rank: one run of bytes, as long as no other copy comes between.
        let fused = |rank: u32| {
            let mut builder = LayoutBuilder::new(rank);
            let gate = builder.tensor("gate", 8, 4).unwrap();
            let up = builder.tensor("up", 8, 4).unwrap();
            let bands = [Band::new(gate, 0..8, 0..4), Band::new(up, 0..8, 0..4).at(8, 0)];
            builder.param(Param::new("gate_up", Dtype::Bf16, 16, 4).bands(bands)).unwrap();
            builder.build()
        };
        let joined = SourceLayout::new((0..copies).map(fused)).unwrap();
        let plan = plan(&joined, &fused(target), &PlanOptions::default()).unwrap();
        prop_assert_eq!(plan.segments().len(), 1);
    }

    /// Ranks are grouped by what they hold; a plan must not depend on how.
    #[test]
    fn copies_that_differ_elsewhere_are_copies_all_the_same(model in model()) {
        let extra = |layout: &RankLayout| {
            let mut changed = rebuilder(layout, 0);
            let own = format!("only.on.{}", layout.rank());
            let id = changed.tensor(&own, 1, 1).unwrap();
            changed.param(Param::new(own, Dtype::U8, 1, 1).band(Band::new(id, 0..1, 0..1))).unwrap();
            changed.build()
        };
        let apart = SourceLayout::new(model.source.iter().map(extra)).unwrap();
        for target in &model.target {
            let options = PlanOptions::default().with_replicas(Replicas::Lowest);
            let together = plan(&source(&model), target, &options).unwrap();
            prop_assert_eq!(plan(&apart, target, &options).unwrap(), together);
        }
    }
}

/// The same layout, its parameters and bands added in another order.
/// A rank that holds one column of `params` tensors of 4,000 bytes.
fn column(params: usize) -> RankLayout {
    let mut layout = LayoutBuilder::new(0);
    for param in 0..params {
        let name = format!("w{param:03}");
        let tensor = layout.tensor(&name, 2_000, 1).unwrap();
        let param = Param::new(name.as_str(), Dtype::Bf16, 2_000, 1);
        layout.param(param.band(Band::new(tensor, 0..2_000, 0..1))).unwrap();
    }
    layout.build()
}

#[test]
fn neighbours_are_read_in_few_reads_where_landing_goes_on_beside_them() {
    let layout = column(100);
    let joined = SourceLayout::new([layout.clone()]).unwrap();
    let plan = plan(&joined, &layout, &PlanOptions::default()).unwrap();
    let options =
        LowerOptions::default().with_slots(2).with_wave_bytes(100_000).with_landing_rate(1_000_000);
    let at = |nth: usize, gap: u64| Some(Position { block: 3, offset: nth as u64 * (4_000 + gap) });
    let lowered = |gap, options: &LowerOptions| {
        let positions: Vec<_> = (0..100).map(|nth| at(nth, gap)).collect();
        lower_placed(&plan, |_| CAPABILITIES, &positions, options).unwrap()
    };
    let staged = |program: &refit::planner::Program, gap: u64| {
        let mut reads = 0;
        for wave in program.waves() {
            let mut end = None;
            for read in wave.reads {
                let Destination::Staging { offset } = read.destination else { return None };
                let from = u64::from(read.source) * (4_000 + gap) + read.offset;
                // What binding joins.
                reads += usize::from(end != Some((from, offset)));
                let read_along = read.run + read.gap;
                end = Some((from + read_along, offset + read_along));
            }
        }
        Some(reads)
    };
    let gathered = lowered(0, &options);
    assert!(gathered.choices().iter().all(|choice| choice.method == Method::Gathered));
    assert_eq!(staged(&gathered, 0), Some(5), "one for each wave: {}", gathered.waves().len());
    assert_eq!(gathered.wire_bytes(), 400_000);
    assert!(gathered.staging_bytes() <= 200_192);
    // Small gaps are read along, as far as that does not show in the bytes on the wire.
    let loose = lowered(16, &options);
    assert_eq!(staged(&loose, 16), Some(5));
    assert_eq!(loose.wire_bytes(), 400_000 + 16 * 95);

    let exact = options.with_policy(Policy::ExactWire);
    for (gap, options) in [(70, options), (16, exact), (0, options.with_slots(1))] {
        let apart = lowered(gap, &options);
        assert!(apart.choices().iter().all(|choice| choice.method == Method::Direct));
        assert_eq!(apart, lower(&plan, &CAPABILITIES, &options).unwrap());
    }
    // Another arrangement is another program.
    let mut positions: Vec<_> = (0..100).rev().map(|nth| at(nth, 0)).collect();
    let backwards = lower_placed(&plan, |_| CAPABILITIES, &positions, &options).unwrap();
    assert_ne!(backwards.hash(), gathered.hash());
    // A source that is nowhere known is read as ever.
    positions[50] = None;
    let broken = lower_placed(&plan, |_| CAPABILITIES, &positions, &options).unwrap();
    let direct = |choice: &&refit::planner::Choice| choice.method == Method::Direct;
    assert_eq!(broken.choices().iter().filter(direct).count(), 1);
    // Where a transport allows fewer reads than pieces, nothing is gathered.
    let few = Capabilities { max_reads: 100, ..CAPABILITIES };
    let tiny = options.with_wave_bytes(3_000);
    let program = lower_placed(&plan, |_| few, &positions, &tiny).unwrap();
    assert!(program.reads().len() <= 100);
}

fn rebuilt(layout: &RankLayout, seed: u64) -> RankLayout {
    rebuilder(layout, seed).build()
}

fn rebuilder(layout: &RankLayout, seed: u64) -> LayoutBuilder {
    let mut builder = LayoutBuilder::new(layout.rank());
    let mut tensors: Vec<_> = layout.tensors().iter().collect();
    let mut params: Vec<_> = layout.params().iter().collect();
    let turn = usize::try_from(seed % 7).unwrap() % tensors.len().max(1);
    tensors.rotate_left(turn);
    params.reverse();
    let ids: std::collections::BTreeMap<_, _> = tensors
        .iter()
        .map(|tensor| {
            (tensor.name.clone(), builder.tensor(&tensor.name, tensor.rows, tensor.cols).unwrap())
        })
        .collect();
    for param in params {
        let mut bands: Vec<_> = layout
            .bands()
            .filter(|(owner, _, _)| owner.name() == param.name())
            .map(|(_, tensor, band)| {
                Band::new(ids[&tensor.name], band.logical_rows(), band.logical_cols())
                    .at(band.origin().0, band.origin().1)
                    .row_step(band.step())
            })
            .collect();
        bands.reverse();
        let mut copy = Param::new(param.name().clone(), param.dtype(), param.rows(), param.cols());
        copy = copy.map(param.element_map()).bands(bands);
        for (rows, cols) in param.fill_boxes() {
            copy = copy.fill(rows, cols);
        }
        builder.param(copy).unwrap();
    }
    builder
}

/// Vectors of these lengths, all of them.
fn replicated(rank: u32, rows: &[u64]) -> RankLayout {
    let params: Vec<_> = rows.iter().map(|&rows| (rows, true)).collect();
    sharded(rank, 0, 1, &params)
}

/// One vector per length: all of it, or, of this length on each of `shards` ranks, the part number `shard`.
fn sharded(rank: u32, shard: u32, shards: u32, params: &[(u64, bool)]) -> RankLayout {
    let mut builder = LayoutBuilder::new(rank);
    for (index, &(rows, replicated)) in params.iter().enumerate() {
        let name = format!("param.{index}");
        let (shard, shards) =
            if replicated { (0, 1) } else { (u64::from(shard), u64::from(shards)) };
        let id = builder.tensor(&name, rows * shards, 1).unwrap();
        let band = Band::new(id, shard * rows..(shard + 1) * rows, 0..1);
        builder.param(Param::new(name, Dtype::Bf16, rows, 1).band(band)).unwrap();
    }
    builder.build()
}

/// One tensor of four elements, stored whole.
fn single(dtype: Dtype, map: ElementMap) -> RankLayout {
    let mut builder = LayoutBuilder::new(0);
    let id = builder.tensor("A_log", 4, 1).unwrap();
    builder.param(Param::new("a", dtype, 4, 1).map(map).band(Band::new(id, 0..4, 0..1))).unwrap();
    builder.build()
}

fn joined(from: (Dtype, ElementMap), to: (Dtype, ElementMap)) -> Result<Plan, PlanError> {
    let source = SourceLayout::new(vec![single(from.0, from.1)]).unwrap();
    plan(&source, &single(to.0, to.1), &PlanOptions::default())
}

#[test]
fn a_map_on_either_side_is_part_of_the_plan() {
    let (plain, one) = (ElementMap::Identity, ElementMap::AddOne);
    let copied = joined((Dtype::Bf16, plain), (Dtype::Bf16, plain)).unwrap();
    let mapped = joined((Dtype::Bf16, one), (Dtype::Bf16, plain)).unwrap();
    assert_eq!(copied.segments()[0].transform, Transform::Copy);
    let (from, to) = (Dtype::Bf16, Dtype::Bf16);
    assert_eq!(mapped.segments()[0].transform, Transform::Map { map: one, from, to });
    assert_ne!(copied.hash(), mapped.hash());
    // Which side maps makes no difference to the work.
    assert_eq!(mapped, joined((Dtype::Bf16, plain), (Dtype::Bf16, one)).unwrap());
    let widened = joined((Dtype::Bf16, plain), (Dtype::F32, ElementMap::NegExp)).unwrap();
    let program = lower(&widened, &CAPABILITIES, &LowerOptions::default()).unwrap();
    assert_eq!((program.landings().len(), program.landings()[0].dims.runs()), (1, 1));
    let per_run = LowerOptions::default().with_policy(Policy::ReadPerRun);
    let refused = lower(&mapped, &CAPABILITIES, &per_run).unwrap_err();
    assert!(refused.to_string().contains("`a` needs a cast or a map"), "{refused}");
}

#[test]
fn maps_that_are_not_defined_are_refused() {
    let plain = ElementMap::Identity;
    let both = joined((Dtype::Bf16, ElementMap::AddOne), (Dtype::F32, ElementMap::NegExp));
    assert!(matches!(
        both,
        Err(PlanError::MapsMeet {
            source_map: ElementMap::AddOne,
            target_map: ElementMap::NegExp,
            ..
        })
    ));
    for (from, to) in
        [(Dtype::I32, Dtype::I32), (Dtype::F64, Dtype::F64), (Dtype::Bf16, Dtype::F16)]
    {
        let map = ElementMap::NegExp;
        let error = joined((from, plain), (to, map)).unwrap_err();
        assert!(matches!(&error, PlanError::MapDtype { map: ElementMap::NegExp, .. }), "{error}");
        assert!(error.to_string().contains("neg-exp"), "{error}");
    }
    let cast = joined((Dtype::I32, plain), (Dtype::F32, plain));
    assert!(matches!(cast, Err(PlanError::Dtype { .. })));
}

#[test]
fn a_copy_that_can_be_read_is_preferred() {
    let rank = |rank: u32, dtype: Dtype, map: ElementMap| {
        let mut builder = LayoutBuilder::new(rank);
        let id = builder.tensor("A_log", 4, 1).unwrap();
        let param = Param::new("a", dtype, 4, 1).map(map).band(Band::new(id, 0..4, 0..1));
        builder.param(param).unwrap();
        builder.build()
    };
    let source = SourceLayout::new(vec![
        rank(0, Dtype::I32, ElementMap::Identity),
        rank(1, Dtype::Bf16, ElementMap::AddOne),
        rank(2, Dtype::F32, ElementMap::Identity),
    ])
    .unwrap();
    for rule in [Replicas::Spread, Replicas::Lowest] {
        let options = PlanOptions::default().with_replicas(rule);
        let asked = |target: RankLayout| {
            let plan = plan(&source, &target, &options).unwrap();
            plan.sources()[0].rank
        };
        assert_eq!(asked(single(Dtype::F32, ElementMap::Identity)), 2);
        assert_eq!(asked(single(Dtype::F32, ElementMap::NegExp)), 2);
        assert_eq!(asked(single(Dtype::I32, ElementMap::Identity)), 0);
    }
}

#[test]
fn a_layout_written_before_there_were_maps_is_read() {
    let text = r#"{"rank":0,"tensors":[{"name":"A_log","rows":4,"cols":1}],"params":[{"name":"a","dtype":"Bf16",
        "rows":4,"cols":1,"bands":[{"tensor":0,"rows":{"start":0,"end":4},"cols":{"start":0,"end":1},"at_row":0,
        "at_col":0,"row_step":1}],"fills":[]}]}"#;
    let layout: RankLayout = serde_json::from_str(text).unwrap();
    assert_eq!(layout, single(Dtype::Bf16, ElementMap::Identity));
}

#[test]
fn what_no_memory_holds_is_refused() {
    let mut builder = LayoutBuilder::new(3);
    let half = 1 << 62;
    builder.param(Param::new("a", Dtype::U8, half, 1).fill(0..half, 0..1)).unwrap();
    let error = builder.param(Param::new("b", Dtype::U8, half, 1).fill(0..half, 0..1)).unwrap_err();
    assert!(matches!(&error, LayoutError::TooLarge { rank: 3, name } if &**name == "b"), "{error}");
    // What fits is planned: nothing overflows on the way.
    builder.param(Param::new("b", Dtype::U8, half - 1, 1).fill(0..half - 1, 0..1)).unwrap();
    let target = builder.build();
    let plan =
        plan(&SourceLayout::new([&target]).unwrap(), &target, &PlanOptions::default()).unwrap();
    assert_eq!(plan.coverage().filled_bytes, u64::MAX / 2);
}
