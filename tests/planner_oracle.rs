//! The planner and the lowering against the element-by-element oracle, over random legal layouts.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use proptest::prelude::*;
use refit::planner::{
    Capabilities, Destination, LowerOptions, Mode, PlanError, PlanOptions, Policy, RankLayout,
    Replicas, SourceLayout, lower, plan,
};
use refit_tests::execute::{self, Sources};
use refit_tests::oracle;
use refit_tests::strategies::{Model, model};

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
            prop_assert_eq!(execute::plan(&plan, &sources), oracle::buffers(target));
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
            prop_assert_eq!(execute::program(&program, &sources), oracle::buffers(target));
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
                Ok(plan) => prop_assert_eq!(execute::plan(&plan, &sources), oracle::buffers(target)),
                Err(PlanError::Uncovered { .. }) => {}
                Err(other) => prop_assert!(false, "unexpected {other}"),
            }
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
    let mut builder = refit::planner::LayoutBuilder::new(layout.rank());
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
                refit::planner::Band::new(
                    ids[&tensor.name],
                    band.logical_rows(),
                    band.logical_cols(),
                )
                .at(band.origin().0, band.origin().1)
                .row_step(band.step())
            })
            .collect();
        bands.reverse();
        let mut copy = refit::planner::Param::new(
            param.name().clone(),
            param.dtype(),
            param.rows(),
            param.cols(),
        );
        copy = copy.bands(bands);
        for (rows, cols) in param.fill_boxes() {
            copy = copy.fill(rows, cols);
        }
        builder.param(copy).unwrap();
    }
    builder.build()
}

fn replicated(rank: u32, rows: &[u64]) -> RankLayout {
    let mut builder = refit::planner::LayoutBuilder::new(rank);
    for (index, &rows) in rows.iter().enumerate() {
        let name = format!("norm.{index}");
        let id = builder.tensor(&name, rows, 1).unwrap();
        let band = refit::planner::Band::new(id, 0..rows, 0..1);
        builder
            .param(
                refit::planner::Param::new(name, refit::planner::Dtype::Bf16, rows, 1).band(band),
            )
            .unwrap();
    }
    builder.build()
}
