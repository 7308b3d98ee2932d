//! Plans of whole models: how large they are, whom they ask, and that they stay what they were.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use refit::planner::{
    Capabilities, LowerOptions, Mode, Param, Plan, PlanOptions, Policy, RankLayout, SourceLayout,
    lower, plan,
};
use refit_tests::execute::{self, Sources};
use refit_tests::models::{self, plan_of, qwen3_4b};
use refit_tests::{landing, oracle};
use refit_translate::megatron::{Pipeline, TrainerOptions, TrainerSizes};
use refit_translate::{Family, Mla, ModelConfig, Moe};

const HOST: Capabilities = Capabilities::plain(2_000, 5_000);

/// Row-parallel tensors are what other planners explode: 369,149 reads of 512 bytes for this very pair.
#[test]
fn a_gathered_model_takes_few_reads_and_no_byte_too_many() {
    for rank in [0, 1] {
        let plan = plan_of(&qwen3_4b(), 4, 2, rank);
        assert!(plan.segments().len() < 700, "{} segments", plan.segments().len());
        let program = lower(&plan, &HOST, &LowerOptions::default()).unwrap();
        assert_eq!(program.wire_bytes(), program.needed_bytes());
        assert!(program.reads().len() < 1_000, "{} reads", program.reads().len());
        assert!(program.staging_bytes() <= LowerOptions::default().wave_bytes);
        let per_run =
            lower(&plan, &HOST, &LowerOptions::default().with_policy(Policy::ReadPerRun)).unwrap();
        assert!(per_run.reads().len() > 360_000, "{} reads", per_run.reads().len());
        assert_eq!(per_run.wire_bytes(), program.wire_bytes());
    }
}

#[test]
fn only_an_engine_with_more_ranks_may_pay_for_bytes_it_does_not_need() {
    for (source, target) in [(1, 1), (2, 2), (2, 1), (4, 1), (8, 2)] {
        let program =
            lower(&plan_of(&qwen3_4b(), source, target, 0), &HOST, &LowerOptions::default())
                .unwrap();
        assert_eq!(program.wire_bytes(), program.needed_bytes(), "TP{source} -> TP{target}");
    }
    let plan = plan_of(&qwen3_4b(), 2, 4, 0);
    let cheapest = lower(&plan, &HOST, &LowerOptions::default()).unwrap();
    assert!(cheapest.wire_bytes() > cheapest.needed_bytes() && cheapest.reads().len() < 1_000);
    let exact =
        lower(&plan, &HOST, &LowerOptions::default().with_policy(Policy::ExactWire)).unwrap();
    assert_eq!(exact.wire_bytes(), exact.needed_bytes());
    // A transport that takes strides needs neither staging nor a byte too many.
    let strided = Capabilities { strided_reads: true, ..HOST };
    let program = lower(&plan, &strided, &LowerOptions::default()).unwrap();
    assert_eq!((program.wire_bytes(), program.staging_bytes()), (program.needed_bytes(), 0));
    assert_eq!(program.reads().len(), plan.segments().len());
}

#[test]
fn a_limit_on_reads_is_kept_or_refused() {
    let plan = plan_of(&qwen3_4b(), 2, 4, 0);
    let limited = Capabilities { max_reads: 400, ns_per_read: 0, ..HOST };
    let program = lower(&plan, &limited, &LowerOptions::default()).unwrap();
    assert!(program.reads().len() <= 400);
    let error =
        lower(&plan, &Capabilities { max_reads: 3, ..HOST }, &LowerOptions::default()).unwrap_err();
    assert!(error.to_string().contains("at most 3"), "{error}");
}

/// A norm that every rank holds is no reason to meet one more peer.
#[test]
fn replicated_tensors_add_no_peer() {
    for (source, target, peers) in [(4, 2, 2), (8, 2, 4), (8, 4, 2), (2, 4, 1), (4, 4, 1)] {
        for rank in 0..target {
            let plan = plan_of(&models::tiny(), source, target, rank as usize);
            // KV heads and the vocabulary may reach into the neighbour's shard.
            let asked = plan.bytes_by_source().len();
            assert!(
                asked <= peers + 2 && asked < source.max(2) as usize + 1,
                "TP{source} -> TP{target}: {asked}"
            );
        }
    }
    assert_eq!(plan_of(&qwen3_4b(), 4, 2, 0).bytes_by_source().len(), 2);
}

#[test]
fn data_parallel_copies_share_the_load() {
    let config = qwen3_4b();
    let copies = 3;
    let source = SourceLayout::new(models::source(&config, 2, 1, copies)).unwrap();
    for target in models::target(&config, 2) {
        let plan = plan(&source, &target, &PlanOptions::default()).unwrap();
        let loads = plan.bytes_by_source();
        let largest = target.params().iter().map(Param::bytes).max().unwrap();
        let (most, least) = (loads.values().max().unwrap(), loads.values().min().unwrap());
        assert_eq!(loads.len(), copies as usize, "{loads:?}");
        assert!(most - least <= largest, "{loads:?}");
    }
}

/// Plans are cache keys in other people's stores: another hash for the same input is a break, and needs another
/// format version in `plan.rs` or `lower.rs`.
#[test]
fn hashes_are_what_they_were() {
    let mut hashes = String::new();
    for (source, target) in [(1, 1), (4, 2), (2, 4), (8, 1)] {
        let plan = plan_of(&qwen3_4b(), source, target, 0);
        let program = lower(&plan, &HOST, &LowerOptions::default()).unwrap();
        let staged = lower(&plan, &HOST, &LowerOptions::default().with_mode(Mode::Staged)).unwrap();
        hashes += &format!(
            "tp{source}-to-tp{target} {} {} {}\n",
            plan.hash(),
            program.hash(),
            staged.hash()
        );
    }
    let golden = include_str!("golden/hashes.txt");
    assert_eq!(
        hashes, golden,
        "if this is meant, change the format version and golden/hashes.txt together"
    );
}

#[test]
fn a_change_that_moves_a_byte_changes_the_hash() {
    let base = plan_of(&models::tiny(), 4, 2, 0);
    let variants: Vec<Plan> = [
        {
            let mut config = models::tiny();
            config.vocab_size += 1;
            config
        },
        {
            let mut config = models::tiny();
            config.num_kv_heads = 8;
            config
        },
        {
            let mut config = models::tiny();
            config.tied = true;
            config
        },
    ]
    .iter()
    .map(|config| plan_of(config, 4, 2, 0))
    .chain([plan_of(&models::tiny(), 4, 2, 1), plan_of(&models::tiny(), 2, 2, 0)])
    .collect();
    for (index, variant) in variants.iter().enumerate() {
        assert_ne!(variant.hash(), base.hash(), "variant {index}");
        assert!(
            variant.bytes_by_source() != base.bytes_by_source()
                || variant.segments() != base.segments(),
            "variant {index}"
        );
    }
    let renumbered: Vec<RankLayout> =
        models::source(&models::tiny(), 4, 1, 1).into_iter().rev().collect();
    let again = plan(
        &SourceLayout::new(renumbered).unwrap(),
        &models::target(&models::tiny(), 2)[0],
        &PlanOptions::default(),
    );
    assert_eq!(again.unwrap().hash(), base.hash());
}

/// Small enough for the oracle; otherwise a mixture of experts like any.
fn tiny_moe() -> ModelConfig {
    let mut config = ModelConfig::new(Family::DeepseekV3);
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (8, 16, 24);
    (config.num_layers, config.num_heads) = (3, 8);
    let mut moe = Moe::new(12, 8);
    moe.shared_intermediate_size = Some(8);
    moe.score_bias = true;
    moe.dense_layers = vec![0];
    config.moe = Some(moe);
    config.mla = Some(Mla::new(Some(6), 5, [2, 1, 2]));
    config
}

/// Every trainer rank of so many, of these tensor- and expert-parallel sizes.
fn moe((ranks, tp, ep): (u32, u32, u32)) -> Vec<RankLayout> {
    let config = tiny_moe();
    let stages = Pipeline::new(1).stages(config.num_layers).unwrap();
    let sizes = TrainerSizes::new(tp).with_dp(ranks / tp).with_ep(ep);
    models::source_ranks(&config, &sizes.ranks(&stages).unwrap(), &TrainerOptions::default())
}

#[test]
fn experts_move_between_any_sizes() {
    let sizes = [(16, 8, 4), (12, 4, 12), (12, 2, 3), (8, 8, 1), (6, 1, 6), (1, 1, 1)];
    for source in sizes {
        let layouts = moe(source);
        let joined = SourceLayout::new(&layouts).unwrap();
        let sources: Sources =
            layouts.iter().map(|layout| (layout.rank(), oracle::buffers(layout))).collect();
        for target in sizes {
            for layout in moe(target) {
                let plan = plan(&joined, &layout, &PlanOptions::default()).unwrap();
                let wanted = oracle::buffers(&layout);
                assert_eq!(execute::plan(&plan, &sources), wanted, "{source:?} -> {target:?}");
                let program = lower(&plan, &HOST, &LowerOptions::default()).unwrap();
                assert_eq!(landing::program(&program, &sources), wanted);
            }
        }
    }
}

/// A target of equal sizes reads every parameter as one piece, from the ranks that hold its experts and no other;
/// all targets together ask all sources alike.
#[test]
fn many_copies_share_the_load_of_many_targets() {
    let source = moe((64, 4, 4));
    let joined = SourceLayout::new(&source).unwrap();
    let reversed = SourceLayout::new(source.iter().rev()).unwrap();
    let targets = moe((32, 4, 4));
    let mut asked = std::collections::BTreeMap::<u32, u64>::new();
    for target in &targets {
        let plan = plan(&joined, target, &PlanOptions::default()).unwrap();
        assert_eq!(plan.segments().len(), target.params().len());
        let options = PlanOptions::default();
        assert_eq!(plan, refit::planner::plan(&reversed, target, &options).unwrap());
        for (rank, bytes) in plan.bytes_by_source() {
            assert_eq!(rank % 4, target.rank() % 4);
            *asked.entry(rank).or_default() += bytes;
        }
    }
    let largest = targets[0].params().iter().map(Param::bytes).max().unwrap();
    assert_eq!(asked.len(), 64);
    let (most, least) = (asked.values().max().unwrap(), asked.values().min().unwrap());
    // Eight targets share sixteen copies, each evenly but for one parameter.
    assert!(most - least <= 8 * largest, "{asked:?}");
}
