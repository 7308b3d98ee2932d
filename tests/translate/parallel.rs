//! Where ranks stand: pipeline splits, virtual stages, and the groups of experts.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::collections::BTreeSet;

use proptest::prelude::*;
use refit::planner::{Dtype, PlanOptions, SourceLayout, plan};
use refit_tests::execute::{self, Sources};
use refit_tests::{models, oracle};
use refit_translate::megatron::{self, Pipeline, SourceRank, TrainerOptions, TrainerSizes};
use refit_translate::roles::{
    ExpertNames, GatedMlp, Group, Over, Placement, Role, SourceCoords, SourceRole, Stack,
    TargetCoords, TargetRole,
};
use refit_translate::vllm::{self, EngineSizes, TargetRank};
use refit_translate::{TensorSpec, TranslateError};

/// The closed forms of `get_transformer_layer_offset` and `get_num_layers_to_build` (Megatron-Core 0.19.2): first layer
/// and number of layers of one chunk, or `None` where an assertion of theirs fails.
fn megatron_split(it: &Pipeline, num_layers: u32, stage: u32, chunk: u32) -> Option<(u32, u32)> {
    let (pp, vp) = (it.pp_size, it.chunks);
    let even = |size: u32, by: u32| size.is_multiple_of(by).then(|| size / by);
    let (embedding, loss) = (u32::from(it.embedding), u32::from(it.loss));
    let mut build;
    let offset;
    if it.first.is_some() || it.last.is_some() {
        let (first, last) = (it.first.unwrap_or(0), it.last.unwrap_or(0));
        let middle_layers = num_layers.checked_sub(first)?.checked_sub(last)?;
        let given = u32::from(it.first.is_some()) + u32::from(it.last.is_some());
        let middle_stages = pp.checked_sub(given)?;
        build = if middle_stages > 0 { even(middle_layers, middle_stages)? } else { 0 };
        if stage == 0 && it.first.is_some() {
            build = first;
        }
        if stage == pp - 1 && it.last.is_some() {
            build = last;
        }
        let middle_stage = if it.first.is_some() { stage.saturating_sub(1) } else { stage };
        let each = |layers: u32| layers.checked_div(middle_stages).unwrap_or(0);
        offset = if vp > 1 {
            let (first, last, middle) = (first / vp, last / vp, middle_layers / vp);
            let before = if stage == 0 { 0 } else { first + middle_stage * each(middle) };
            chunk * (first + middle + last) + before
        } else if stage == 0 {
            0
        } else {
            middle_stage * each(middle_layers) + first
        };
    } else {
        let layers = num_layers + embedding + loss;
        build = even(layers, pp)?;
        let before =
            if vp > 1 { chunk * (layers / vp) + stage * (build / vp) } else { stage * build };
        offset = if (stage, chunk) == (0, 0) { before } else { before.checked_sub(embedding)? };
    }
    build = even(build, vp)?;
    if (stage, chunk) == (0, 0) {
        build = build.checked_sub(embedding)?;
    }
    if (stage, chunk) == (pp - 1, vp - 1) {
        build = build.checked_sub(loss)?;
    }
    Some((offset, build))
}

/// First layers of every stage's chunks, and how many there are.
fn starts(pipeline: Pipeline, num_layers: u32) -> Vec<Vec<u32>> {
    let stages = pipeline.stages(num_layers).unwrap();
    stages.iter().map(|chunks| chunks.iter().map(|chunk| chunk[0]).collect()).collect()
}

#[test]
fn layers_are_split_as_by_megatron() {
    // The examples that were compared with `get_transformer_layer_offset`.
    let interleaved = Pipeline::new(4).with_chunks(2);
    assert_eq!(starts(interleaved, 16), [[0, 8], [2, 10], [4, 12], [6, 14]]);
    assert_eq!(interleaved.stages(16).unwrap()[0], [[0, 1], [8, 9]]);
    let uneven = Pipeline::new(4).with_first(3).with_last(3);
    assert_eq!(starts(uneven, 14), [[0], [3], [7], [11]]);
    assert_eq!(uneven.stages(14).unwrap()[3], [[11, 12, 13]]);
    // The embedding takes a layer's place on the first stage, the loss one on the last.
    let accounted = Pipeline::new(4).with_embedding().with_loss();
    assert_eq!(
        accounted.stages(14).unwrap(),
        [[vec![0, 1, 2]], [vec![3, 4, 5, 6]], [vec![7, 8, 9, 10]], [vec![11, 12, 13]]]
    );
    let both = accounted.with_chunks(2).stages(14).unwrap();
    assert_eq!((&both[0], &both[3]), (&vec![vec![0], vec![7, 8]], &vec![vec![5, 6], vec![13]]));
    // A stage may be left with none.
    assert_eq!(Pipeline::new(2).with_embedding().stages(1).unwrap(), [[vec![]], [vec![0]]]);
}

#[test]
fn impossible_splits_are_refused() {
    use TranslateError as E;
    let refused = |pipeline: Pipeline, layers| pipeline.stages(layers).unwrap_err();
    let two = Pipeline::new(2);
    assert!(matches!(refused(two, 3), E::Indivisible { size: 3, by: 2, .. }));
    assert!(matches!(refused(two.with_chunks(2), 6), E::Indivisible { size: 3, by: 2, .. }));
    assert!(matches!(refused(two.with_chunks(0), 6), E::Zero { .. }));
    assert!(matches!(refused(two.with_chunks(u32::MAX), 6), E::TooLarge { .. }));
    assert!(matches!(refused(two.with_first(7), 6), E::Combination { .. }));
    assert!(matches!(refused(two.with_first(u32::MAX).with_last(1), 6), E::Combination { .. }));
    assert!(matches!(refused(two.with_first(1).with_last(1), 6), E::Combination { .. }));
    let one = Pipeline::new(1).with_first(1).with_last(1);
    assert!(matches!(refused(one, 2), E::Combination { .. }));
    assert!(matches!(refused(two.with_first(1).with_loss(), 6), E::Combination { .. }));
    // Half a layer for each of four chunks, and no room for the embedding in a chunk without layers.
    let both = Pipeline::new(1).with_embedding().with_loss();
    assert!(matches!(refused(both.with_chunks(4), 1), E::Indivisible { size: 3, by: 4, .. }));
    let empty = Pipeline::new(1).with_first(0).with_last(0);
    assert!(matches!(refused(empty, 1), E::Combination { .. }));
    let narrow = Pipeline::new(2).with_embedding().with_loss();
    assert_eq!(narrow.stages(2).unwrap(), [[vec![0]], [vec![1]]]);
}

#[test]
fn experts_are_numbered_as_by_the_frameworks() {
    let trainer = |rank| SourceCoords::new(0, 1).unwrap().with_ep(rank, 4).unwrap();
    assert_eq!(trainer(2).experts(12).unwrap(), 6..9);
    let error = trainer(0).experts(10).unwrap_err();
    assert!(matches!(error, TranslateError::Indivisible { size: 10, by: 4, .. }), "{error}");

    let engine = |rank, placement| {
        let at = TargetCoords::new(0, 1).unwrap().with_flat(rank, 5).unwrap();
        at.with_expert_parallel(placement)
    };
    let of = |placement, total| -> Vec<Vec<u64>> {
        (0..5).map(|rank| engine(rank, placement).experts(total).unwrap()).collect()
    };
    assert_eq!(
        of(Placement::Linear, 12),
        [vec![0, 1, 2], vec![3, 4, 5], vec![6, 7], vec![8, 9], vec![10, 11]]
    );
    assert_eq!(
        of(Placement::RoundRobin, 12),
        [vec![0, 5, 10], vec![1, 6, 11], vec![2, 7], vec![3, 8], vec![4, 9]]
    );
    let few = engine(0, Placement::Linear).experts(4).unwrap_err();
    assert_eq!(few, TranslateError::TooFewExperts { experts: 4, ranks: 5 });
    assert!(matches!(
        engine(0, Placement::Linear).experts(u64::MAX),
        Err(TranslateError::TooLarge { .. })
    ));
    assert!(matches!(trainer(0).experts(u64::MAX), Err(TranslateError::TooLarge { .. })));
    // Without expert parallelism every rank has a part of all.
    assert_eq!(TargetCoords::new(1, 2).unwrap().experts(3).unwrap(), [0, 1, 2]);
    assert_eq!(ExpertNames::default().prefix(), "experts.routed_experts.");
    assert_eq!(ExpertNames::Flat.prefix(), "experts.");
}

#[test]
fn every_group_shares_out_its_own() {
    let source = SourceCoords::new(1, 4).unwrap().with_etp(1, 2).unwrap();
    let size = |group| (source.shard(group).rank(), source.shard(group).size());
    assert_eq!(size(Group::Dense), (1, 4));
    assert_eq!(size(Group::SharedExperts), (1, 4));
    assert_eq!(size(Group::RoutedExperts), (1, 2));

    let target = TargetCoords::new(1, 2).unwrap().with_flat(3, 4).unwrap();
    let size = |at: TargetCoords, group| (at.shard(group).rank(), at.shard(group).size());
    assert_eq!(size(target, Group::RoutedExperts), (3, 4));
    assert_eq!(size(target, Group::SharedExperts), (1, 2));
    let mut spread = target.with_expert_parallel(Placement::Linear);
    assert_eq!(size(spread, Group::RoutedExperts), (0, 1));
    spread.whole_shared_experts = true;
    assert_eq!(size(spread, Group::SharedExperts), (0, 1));
    assert_eq!(size(spread, Group::Dense), (1, 2));
}

#[test]
fn ranks_of_experts_are_numbered_as_megatron_does() {
    // Four ranks a stage: TP 2 times 2 copies; experts factor them into ETP 1, EP 4.
    let stages = Pipeline::new(2).stages(2).unwrap();
    let ranks = TrainerSizes::new(2).with_dp(2).with_ep(4).ranks(&stages).unwrap();
    let places: Vec<_> =
        ranks.iter().map(|rank| (rank.tp_rank, rank.ep_rank, rank.etp_rank)).collect();
    let stage = [(0, 0, 0), (1, 1, 0), (0, 2, 0), (1, 3, 0)];
    assert_eq!(places, [stage, stage].concat());
    let ranks = TrainerSizes::new(2).with_dp(2).with_ep(2).with_etp(2).ranks(&stages).unwrap();
    let places: Vec<_> = ranks[..4].iter().map(|rank| (rank.ep_rank, rank.etp_rank)).collect();
    assert_eq!(places, [(0, 0), (0, 1), (1, 0), (1, 1)]);

    use TranslateError as E;
    let refused = |sizes: TrainerSizes| sizes.ranks(&stages).unwrap_err();
    assert!(matches!(
        refused(TrainerSizes::new(2).with_ep(4)),
        E::Indivisible { size: 2, by: 4, .. }
    ));
    assert!(matches!(refused(TrainerSizes::new(2).with_etp(0)), E::Zero { .. }));
    assert!(matches!(refused(TrainerSizes::new(1 << 20)), E::TooLarge { .. }));
    assert!(matches!(
        refused(TrainerSizes::new(2).with_ep(u32::MAX).with_etp(2)),
        E::TooLarge { .. }
    ));
    let config = models::tiny();
    let held = |rank: SourceRank| megatron::expected(&config, &rank, &TrainerOptions::default());
    let rank = SourceRank::new(0, vec![0, 1]);
    assert!(matches!(
        held(rank.clone().with_ep(2, 2)),
        Err(E::Rank { group: "megatron ep_size", .. })
    ));
    assert!(matches!(
        held(rank.clone().with_etp(0, 0)),
        Err(E::Zero { what: "megatron etp_size" })
    ));
    assert!(matches!(held(rank.clone().with_chunks(vec![])), Err(E::Zero { .. })));
    let twice = rank.with_chunks(vec![vec![0, 1], vec![1]]);
    assert!(matches!(held(twice), Err(E::DuplicateLayer { layer: 1, .. })));
}

#[test]
fn ranks_of_engines_are_numbered_as_vllm_does() {
    let sizes = EngineSizes::new(2).with_pcp(2).with_dp(2).with_expert_parallel(Placement::Linear);
    let ranks = sizes.with_sequence_parallel_moe().ranks().unwrap();
    let places: Vec<_> =
        ranks.iter().map(|rank| (rank.dp_rank, rank.pcp_rank, rank.tp_rank)).collect();
    let half = |dp| [(dp, 0, 0), (dp, 0, 1), (dp, 1, 0), (dp, 1, 1)];
    assert_eq!(places, [half(0), half(1)].concat());
    assert!(ranks.iter().all(|rank| rank.sequence_parallel_moe && rank.expert_parallel.is_some()));

    use TranslateError as E;
    let config = models::tiny();
    let refused = |rank: TargetRank| vllm::expected(&config, &rank).unwrap_err();
    let rank = TargetRank::new(0, 0, 2);
    assert!(matches!(refused(rank.with_dp(2, 2)), E::Rank { group: "vllm dp_size", .. }));
    assert!(matches!(refused(rank.with_pcp(0, 0)), E::Zero { what: "vllm pcp_size" }));
    assert!(matches!(refused(rank.with_dp(0, u32::MAX)), E::TooLarge { what: "vllm ranks", .. }));
    let spread = rank.with_expert_parallel(Placement::RoundRobin);
    for rank in [
        rank.with_dp(0, 2).with_sequence_parallel_moe(),
        spread.with_sequence_parallel_moe(),
        TargetRank::new(0, 0, 1)
            .with_expert_parallel(Placement::Linear)
            .with_dp(0, 2)
            .with_sequence_parallel_moe(),
    ] {
        assert!(matches!(refused(rank), E::Combination { what: "sequence-parallel MoE", .. }));
    }
    assert!(vllm::expected(&config, &spread.with_dp(1, 2).with_sequence_parallel_moe()).is_ok());
    assert!(matches!(EngineSizes::new(1).with_dp(0).ranks(), Err(E::Zero { .. })));
}

/// Chunks' names repeat, so each has its own prefix; a plain list of names is one chunk's.
#[test]
fn chunks_are_told_apart_by_their_names() {
    let mut config = models::tiny();
    config.num_layers = 4;
    let stages = Pipeline::new(2).with_chunks(2).stages(4).unwrap();
    let ranks = TrainerSizes::new(1).ranks(&stages).unwrap();
    let names = |rank: &SourceRank| -> BTreeSet<String> {
        let held = megatron::expected(&config, rank, &TrainerOptions::default()).unwrap();
        held.iter().map(|spec| spec.name.to_string()).collect()
    };
    let (first, last) = (names(&ranks[0]), names(&ranks[1]));
    assert!(first.contains("model0.embedding.word_embeddings.weight"));
    assert!(first.contains("model1.decoder.layers.0.mlp.linear_fc2.weight"));
    assert!(last.contains("model1.output_layer.weight"));
    assert!(last.contains("model1.decoder.final_layernorm.weight"));
    let ends = |names: &BTreeSet<String>| {
        let is_end = |name: &&String| !name.contains("layers.");
        names.iter().filter(is_end).count()
    };
    assert_eq!((ends(&first), ends(&last)), (1, 2));

    let held = |chunk: &str| -> Vec<TensorSpec> {
        let held = megatron::expected(&config, &ranks[0], &TrainerOptions::default()).unwrap();
        held.into_iter().filter(|spec| spec.name.starts_with(chunk)).collect()
    };
    let layout = megatron::layout(&config, &ranks[0], &[held("model0."), held("model1.")].concat());
    let layout = layout.unwrap();
    let bands: Vec<(&str, &str)> = layout
        .bands()
        .filter(|(param, _, _)| param.name().ends_with("linear_fc2.weight"))
        .map(|(param, tensor, _)| (&**param.name(), &*tensor.name))
        .collect();
    assert_eq!(
        bands,
        [
            (
                "model0.decoder.layers.0.mlp.linear_fc2.weight",
                "model.layers.0.mlp.down_proj.weight"
            ),
            (
                "model1.decoder.layers.0.mlp.linear_fc2.weight",
                "model.layers.2.mlp.down_proj.weight"
            ),
        ]
    );
    let error = megatron::layout(&config, &ranks[0], &held("model0.")).unwrap_err();
    assert!(
        matches!(&error, TranslateError::MissingParam { param, .. } if param.starts_with("model1.")),
        "{error}"
    );
    let mut plain = held("model0.");
    plain.push(TensorSpec::new("decoder.layers.0.mlp.linear_fc2.weight", Dtype::Bf16, [48, 96]));
    assert!(megatron::layout(&config, &ranks[0], &plain).is_err());
}

fn pipeline() -> impl Strategy<Value = Pipeline> {
    let end = || prop::option::weighted(0.3, 0u32..8);
    (1u32..6, 1u32..4, end(), end(), any::<bool>(), any::<bool>()).prop_map(
        |(pp, chunks, first, last, embedding, loss)| {
            let mut pipeline = Pipeline::new(pp).with_chunks(chunks);
            (pipeline.first, pipeline.last) = (first, last);
            (pipeline.embedding, pipeline.loss) = (embedding, loss);
            pipeline
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Every split that is not refused has each layer once and is Megatron's; what Megatron takes is not refused.
    #[test]
    fn splits_are_megatrons(pipeline in pipeline(), layers in 1u32..40) {
        let Pipeline { pp_size, chunks, .. } = pipeline;
        let theirs: Option<Vec<Vec<(u32, u32)>>> = (0..pp_size)
            .map(|stage| (0..chunks).map(|chunk| megatron_split(&pipeline, layers, stage, chunk)).collect())
            .collect();
        match (pipeline.stages(layers), theirs) {
            (Ok(stages), theirs) => {
                let all: BTreeSet<u32> = stages.iter().flatten().flatten().copied().collect();
                prop_assert_eq!(all.len(), stages.iter().flatten().map(Vec::len).sum::<usize>());
                prop_assert_eq!(all, (0..layers).collect::<BTreeSet<u32>>());
                let theirs = theirs.expect("Megatron refuses this split");
                for (chunks, theirs) in stages.iter().zip(theirs) {
                    for (chunk, (offset, build)) in chunks.iter().zip(theirs) {
                        prop_assert_eq!(chunk.clone(), (offset..offset + build).collect::<Vec<u32>>());
                    }
                }
            }
            (Err(error), None) => prop_assert!(!error.to_string().is_empty()),
            (Err(error), Some(theirs)) => {
                // Megatron does not check these: layers would be missing, or counted under both rules.
                let built: u32 = theirs.iter().flatten().map(|(_, build)| build).sum();
                let uneven = pipeline.first.is_some() || pipeline.last.is_some();
                prop_assert!(built != layers || (uneven && (pipeline.embedding || pipeline.loss)), "{}", error);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// A table of layers decides, whatever rule it follows: any one joins.
    #[test]
    fn any_table_of_layers_joins(
        owners in prop::collection::vec((0usize..3, 0usize..3), 5),
        chunks in 1usize..4,
        tied in any::<bool>(),
    ) {
        let mut config = models::tiny();
        (config.num_layers, config.tied) = (5, tied);
        let mut stages = vec![vec![Vec::new(); chunks]; 3];
        for (layer, &(stage, chunk)) in (0..).zip(&owners) {
            stages[stage][chunk % chunks].push(layer);
        }
        let mut ranks = TrainerSizes::new(2).ranks(&stages).unwrap();
        // A stage between the others that has no layers has nothing to publish.
        ranks.retain(|rank| rank.pp_rank != 1 || rank.chunks.iter().any(|chunk| !chunk.is_empty()));
        let layouts = models::source_ranks(&config, &ranks, &TrainerOptions::default());
        let sources: Sources =
            layouts.iter().map(|layout| (layout.rank(), oracle::buffers(layout))).collect();
        let source = SourceLayout::new(layouts).unwrap();
        for target in models::target(&config, 2) {
            let plan = plan(&source, &target, &PlanOptions::default()).unwrap();
            prop_assert_eq!(execute::plan(&plan, &sources), oracle::buffers(&target));
        }
    }
}

/// Mostly small, sometimes hopeless.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 1u64..9, 1 => Just(0), 1 => 1u64..1 << 18, 1 => any::<u64>(), 1 => Just(u64::MAX)]
}

fn place() -> impl Strategy<Value = (u32, u32)> {
    prop_oneof![4 => (0u32..4, 1u32..5), 1 => (any::<u32>(), any::<u32>())]
}

proptest! {
    #[test]
    fn no_number_panics(
        places in prop::collection::vec(place(), 3),
        placement in prop::sample::select(vec![None, Some(Placement::Linear), Some(Placement::RoundRobin)]),
        whole in any::<bool>(),
        sizes in prop::collection::vec(number(), 4),
        table in prop::collection::vec(prop_oneof![9 => 0u32..6, 1 => any::<u32>()], 5),
    ) {
        let (tp, ep, etp) = (places[0], places[1], places[2]);
        let [experts, count, rows, cols] = sizes[..] else { unreachable!() };
        let each = GatedMlp { what: "rows", intermediate: rows, cols: Some(cols) };
        let role = Over { group: if whole { Group::SharedExperts } else { Group::RoutedExperts }, role: each };
        let source = SourceCoords::new(tp.0, tp.1)
            .and_then(|at| at.with_ep(ep.0, ep.1))
            .and_then(|at| at.with_etp(etp.0, etp.1));
        if let Ok(at) = source {
            let _ = (at.experts(experts), role.logical());
            if let Ok(view) = role.megatron(&at, None) {
                prop_assert_eq!(&view.shape, &[view.rows, view.cols]);
            }
        }
        let rank = TargetRank::new(0, tp.0, tp.1).with_dp(ep.0, ep.1).with_pcp(etp.0, etp.1);
        let _ = vllm::expected(&models::tiny(), &rank);
        if let Ok(mut at) = TargetCoords::new(tp.0, tp.1).and_then(|at| at.with_flat(ep.0, ep.1)) {
            (at.placement, at.whole_shared_experts) = (placement, whole);
            if let Ok(local) = at.experts(experts) {
                prop_assert!(local.iter().all(|&expert| expert < experts));
            }
            let stack = Stack { count, each: role };
            let _ = stack.logical();
            if let Ok(view) = stack.vllm(&at) {
                let elements = view.shape.iter().try_fold(1u64, |product, &extent| product.checked_mul(extent));
                prop_assert_eq!(elements, view.rows.checked_mul(view.cols));
                prop_assert_eq!(view.shape[0], count);
            }
        }
        let [pp, chunks, first, last, layers] = table[..] else { unreachable!() };
        let mut pipeline = Pipeline::new(pp).with_chunks(chunks);
        (pipeline.first, pipeline.last, pipeline.embedding) = (Some(first), Some(last), whole);
        let _ = pipeline.stages(layers);
        let sizes = TrainerSizes::new(pp).with_dp(chunks).with_ep(first).with_etp(last);
        let _ = sizes.ranks(&vec![vec![vec![0]]; 2]);
    }
}
