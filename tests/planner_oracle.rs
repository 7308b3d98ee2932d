//! The planner and the lowering against the element-by-element oracle, over random legal layouts.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use proptest::prelude::*;
use refit::planner::{
    Band, Capabilities, Destination, Dtype, ElementMap, LayoutBuilder, LowerOptions, Mode, Param,
    Plan, PlanError, PlanOptions, Policy, RankLayout, Replicas, SourceLayout, Transform, lower,
    plan,
};
use refit_tests::execute::{self, Sources};
use refit_tests::strategies::{Model, model};
use refit_tests::{landing, oracle};

const CAPABILITIES: Capabilities = Capabilities {
    strided_reads: false,
    bytes_per_us: 2_000,
    ns_per_read: 5_000,
    max_reads: u64::MAX,
};

fn source(model: &Model) -> SourceLayout {
    SourceLayout::new(model.source.clone()).unwrap()
}

fn sources(model: &Model) -> Sources {
    model.source.iter().map(|layout| (layout.rank(), oracle::buffers(layout))).collect()
}

fn every_option() -> impl Strategy<Value = (Capabilities, LowerOptions)> {
    let capabilities =
        (any::<bool>(), 1u64..10_000, 0u64..10_000).prop_map(|(strided_reads, rate, read)| {
            Capabilities { strided_reads, bytes_per_us: rate, ns_per_read: read, ..CAPABILITIES }
        });
    let modes = prop_oneof![Just(Mode::Direct), Just(Mode::Staged)];
    let policies = prop_oneof![Just(Policy::Cheapest), Just(Policy::ExactWire)];
    // Waves of less than a row, of a few tensors, and of everything.
    let waves = prop_oneof![0u64..64, 64u64..4_096, Just(u64::MAX)];
    (capabilities, modes, policies, 1u64..10_000, waves).prop_map(
        |(capabilities, mode, policy, landing, wave)| {
            (
                capabilities,
                LowerOptions::default()
                    .with_mode(mode)
                    .with_policy(policy)
                    .with_landing_rate(landing)
                    .with_wave_bytes(wave),
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
    fn executing_a_program_equals_the_oracle(model in model(), (capabilities, options) in every_option()) {
        let (joined, sources) = (source(&model), sources(&model));
        for target in &model.target {
            let plan = plan(&joined, target, &PlanOptions::default()).unwrap();
            let program = lower(&plan, &capabilities, &options).unwrap();
            let wanted = oracle::wanted(target, &model.source);
            prop_assert_eq!(&execute::program(&program, &sources), &wanted);
            prop_assert_eq!(landing::program(&program, &sources), wanted);
            if options.policy == Policy::ExactWire {
                prop_assert!(program.wire_bytes() <= program.needed_bytes());
            }
            let choices = program.choices();
            prop_assert_eq!(choices.iter().map(|choice| choice.reads).sum::<u64>(), program.reads().len() as u64);
            prop_assert_eq!(choices.iter().map(|choice| choice.wire_bytes).sum::<u64>(), program.wire_bytes());
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
    fn replicas_share_the_load(params in proptest::collection::vec(1u64..200, 1..40), copies in 2u32..6) {
        let ranks = (0..copies).map(|rank| replicated(rank, &params)).collect();
        let joined = SourceLayout::new(ranks).unwrap();
        let plan = plan(&joined, &replicated(0, &params), &PlanOptions::default()).unwrap();
        let loads = plan.bytes_by_source();
        let most = loads.values().max().unwrap();
        let least = if loads.len() < copies as usize { 0 } else { *loads.values().min().unwrap() };
        prop_assert!(most - least <= 2 * params.iter().max().unwrap(), "{loads:?}");
    }
}

/// The same layout, its parameters and bands added in another order.
fn rebuilt(layout: &RankLayout, seed: u64) -> RankLayout {
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
    builder.build()
}

fn replicated(rank: u32, rows: &[u64]) -> RankLayout {
    let mut builder = LayoutBuilder::new(rank);
    for (index, &rows) in rows.iter().enumerate() {
        let name = format!("norm.{index}");
        let id = builder.tensor(&name, rows, 1).unwrap();
        let band = Band::new(id, 0..rows, 0..1);
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
