//! DeepSeek-V3 and its kin: latent attention, experts and predicting layers between any two sides; blockwise FP8; what
//! the engine must derive anew.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::collections::BTreeMap;

use proptest::prelude::*;
use refit::planner::{Dtype, PlanError, PlanOptions, RankLayout, SourceLayout, plan};
use refit_tests::execute::{self, Sources};
use refit_tests::oracle::{self, Buffers};
use refit_translate::megatron::{
    self, LayerSpec, Pipeline, SourceRank, TrainerOptions, TrainerSizes,
};
use refit_translate::roles::Placement;
use refit_translate::vllm::{self, EngineModel, EngineSizes, TargetRank};
use refit_translate::{
    Family, Mla, ModelConfig, Moe, PostAction, Side, TensorSpec, TranslateError,
};

/// Four layers, the first dense, and one that predicts further ahead.
fn small() -> ModelConfig {
    let mut config = ModelConfig::new(Family::DeepseekV3);
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (8, 24, 70);
    (config.num_layers, config.num_heads, config.mtp_layers) = (4, 8, 1);
    let mut moe = Moe::new(8, 16);
    moe.shared_intermediate_size = Some(16);
    moe.score_bias = true;
    moe.groups = 2;
    moe.dense_layers = vec![0];
    config.moe = Some(moe);
    config.mla = Some(Mla::new(Some(24), 16, [3, 8, 2]));
    config
}

/// Every second name of the pair in place of the first.
fn rename(held: &mut [TensorSpec], from: &str, to: &str) {
    for spec in held {
        spec.name = spec.name.replace(from, to).into();
    }
}

/// What a trainer with the fused down projection holds in place of the two layers and the norm before them.
fn fuse(config: &ModelConfig, tp: u64, held: &mut Vec<TensorSpec>) {
    let mla = config.mla.unwrap();
    held.retain(|spec| !spec.name.contains("linear_kv_down_proj"));
    for spec in held.iter_mut() {
        if spec.name.contains("linear_q_down_proj") {
            let rows = mla.q_lora_rank.unwrap() + mla.kv_lora_rank + mla.qk_rope_head_dim;
            spec.shape[0] = rows / tp;
        }
    }
    rename(held, "linear_q_down_proj", "linear_qkv_down_proj");
    let module = "self_attention.linear_qkv_down_proj.layer_norm_weight";
    rename(held, "input_layernorm.weight", module);
}

/// The layouts of a trainer of these sizes.
fn trainer(
    config: &ModelConfig,
    sizes: &TrainerSizes,
    pp: u32,
    options: &TrainerOptions,
    fused: bool,
) -> Result<Vec<RankLayout>, TranslateError> {
    let layout = |rank: &SourceRank| {
        let mut held = megatron::expected(config, rank, options)?;
        if fused {
            fuse(config, rank.tp_size.into(), &mut held);
        }
        megatron::layout(config, rank, &held)
    };
    sizes.ranks(&Pipeline::new(pp).stages(config.num_layers)?)?.iter().map(layout).collect()
}

fn engine(config: &ModelConfig, sizes: EngineSizes) -> Result<Vec<RankLayout>, TranslateError> {
    let layout = |rank: &TargetRank| vllm::layout(config, rank, &vllm::expected(config, rank)?);
    sizes.ranks()?.iter().map(|rank| Ok(layout(rank)?.layout)).collect()
}

/// Plans every target and compares what arrives with the oracle.
fn join(source: Vec<RankLayout>, targets: &[RankLayout]) {
    let sources: Sources =
        source.iter().map(|layout| (layout.rank(), oracle::buffers(layout))).collect();
    let source = SourceLayout::new(source).unwrap();
    for target in targets {
        let plan = plan(&source, target, &PlanOptions::default()).unwrap();
        assert_eq!(execute::plan(&plan, &sources), oracle::buffers(target));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, ..ProptestConfig::default() })]

    /// All sizes are such that every choice is legal: nothing may be refused.
    #[test]
    fn any_two_legal_sides_join(
        (tp, pp, etp) in prop::sample::select(vec![(1u32, 1u32, 1u32), (2, 1, 1), (4, 1, 2), (8, 1, 1), (2, 2, 1), (1, 4, 1), (2, 4, 2)]),
        ep in prop::sample::select(vec![1u32, 2, 4, 8]),
        (engine_tp, engine_dp) in prop::sample::select(vec![(1u32, 1u32), (2, 1), (4, 1), (8, 1), (2, 2), (1, 4)]),
        placement in prop::option::of(prop::sample::select(vec![Placement::Linear, Placement::RoundRobin])),
        (local, fused, whole_queries, held_mtp) in any::<(bool, bool, bool, bool)>(),
        (biased, shared, family) in (any::<bool>(), any::<bool>(), prop::sample::select(vec![Family::DeepseekV2, Family::DeepseekV3, Family::KimiK2])),
        (hidden, nope, value) in (1u64..9, 1u64..5, 1u64..5),
        draft in any::<bool>(),
    ) {
        let mut config = small();
        config.family = family;
        config.hidden_size = hidden * 8;
        let queries = (!whole_queries).then_some(24);
        config.mla = Some(Mla::new(queries, 16, [nope, 8, value]));
        let moe = config.moe.as_mut().unwrap();
        moe.score_bias = biased;
        moe.shared_intermediate_size = moe.shared_intermediate_size.filter(|_| shared);
        let spec = if local { LayerSpec::Local } else { LayerSpec::Te };
        let fused = fused && !whole_queries && !local;
        let dp = (ep * etp).div_ceil(tp);
        let mut sizes = TrainerSizes::new(tp).with_dp(dp).with_ep(ep).with_etp(etp);
        if held_mtp || draft {
            sizes = sizes.with_mtp(1);
        }
        let options = TrainerOptions::default().with_spec(spec);
        let source = trainer(&config, &sizes, pp, &options, fused).unwrap();
        let mut sizes = EngineSizes::new(engine_tp).with_dp(engine_dp);
        sizes.expert_parallel = placement;
        if draft {
            sizes = sizes.with_model(EngineModel::Draft);
        }
        join(source, &engine(&config, sizes).unwrap());
    }
}

/// What arrives is what the walk over the weights' elements says, scales included.
fn join_with_scales(source: Vec<RankLayout>, targets: &[RankLayout]) {
    let sources: Sources =
        source.iter().map(|layout| (layout.rank(), with_scales(layout))).collect();
    let source = SourceLayout::new(source).unwrap();
    for target in targets {
        let plan = plan(&source, target, &PlanOptions::default()).unwrap();
        assert_eq!(execute::plan(&plan, &sources), with_scales(target));
    }
}

/// Sizes of which some cut blocks: the last block of a rank's rows is a part of one in many.
fn quantized() -> impl Strategy<Value = ModelConfig> {
    let sizes = prop::sample::select(vec![64u64, 128, 192, 256]);
    (sizes.clone(), sizes.clone(), sizes, prop::sample::select(vec![32u64, 64])).prop_map(
        |(hidden, intermediate, rank, head)| {
            let mut config = ModelConfig::new(Family::DeepseekV3);
            (config.hidden_size, config.intermediate_size) = (hidden, intermediate);
            (config.num_layers, config.num_heads, config.vocab_size) = (2, 4, 64);
            let mut moe = Moe::new(2, intermediate);
            moe.dense_layers = vec![0];
            config.moe = Some(moe);
            config.mla = Some(Mla::new(Some(rank), 128, [head, head, head]));
            config.block_fp8 = true;
            config
        },
    )
}

/// The scale of every block, written by walking the weight's elements: the one of block `(row / 128, column / 128)` of
/// the logical tensor stands in the weight's scales where that of the element does. The layouts of scales have no say.
fn scales(layout: &RankLayout) -> Buffers {
    let mut buffers = BTreeMap::new();
    for (param, tensor, band) in layout.bands() {
        let name = format!("{}_scale_inv", param.name());
        let Some(held) = layout.param(&name) else { continue };
        let buffer = buffers.entry(name).or_insert_with(|| oracle::poisoned(held));
        let (at_row, at_col) = band.origin();
        let scale_of = format!("{}_scale_inv", tensor.name);
        for (row, local) in band.logical_rows().zip(at_row..) {
            for (col, local_col) in band.logical_cols().zip(at_col..) {
                let tag = oracle::tag(&scale_of, row / 128, col / 128);
                let at =
                    usize::try_from(4 * (local / 128 * held.cols() + local_col / 128)).unwrap();
                let value = oracle::element(Dtype::F32, tag);
                let known = &buffer[at..at + 4];
                assert!(
                    known == value || known.iter().all(|&byte| byte == oracle::POISON),
                    "two scales for one block of `{}`",
                    param.name()
                );
                buffer[at..at + 4].copy_from_slice(&value);
            }
        }
    }
    buffers
}

/// A rank's buffers with its scales as the walk has them.
fn with_scales(layout: &RankLayout) -> Buffers {
    let mut buffers = oracle::buffers(layout);
    let scales = scales(layout);
    assert!(!scales.is_empty());
    buffers.extend(scales);
    buffers
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, ..ProptestConfig::default() })]

    /// Blockwise FP8 either arrives with the scale of every block or is refused because a block is cut.
    #[test]
    fn scales_follow_their_blocks(
        config in quantized(),
        tp in prop::sample::select(vec![1u32, 2, 4]),
        engine_tp in prop::sample::select(vec![1u32, 2, 4]),
        (local, ep) in any::<(bool, bool)>(),
    ) {
        let spec = if local { LayerSpec::Local } else { LayerSpec::Te };
        let options = TrainerOptions::default().with_spec(spec);
        let source = trainer(&config, &TrainerSizes::new(tp), 1, &options, false);
        let mut sizes = EngineSizes::new(engine_tp);
        sizes.expert_parallel = (ep && engine_tp <= 2).then_some(Placement::Linear);
        match (source, engine(&config, sizes)) {
            (Ok(source), Ok(targets)) => {
                join_with_scales(source, &targets);
            }
            (source, targets) => {
                let error = source.err().or_else(|| targets.err()).unwrap();
                prop_assert!(
                    matches!(error, TranslateError::Block { .. } | TranslateError::Indivisible { .. }),
                    "{}", error
                );
            }
        }
    }
}

/// With the latent part of keys and values half a block too long, and rows of scales that the trainer pads.
#[test]
fn whole_blocks_arrive_with_their_scales() {
    let mut config = ModelConfig::new(Family::DeepseekV3);
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (256, 512, 64);
    (config.num_layers, config.num_heads, config.mtp_layers) = (2, 4, 1);
    let mut moe = Moe::new(4, 256);
    (moe.dense_layers, moe.shared_intermediate_size) = (vec![0], Some(256));
    config.moe = Some(moe);
    config.mla = Some(Mla::new(Some(256), 128, [64, 64, 64]));
    config.block_fp8 = true;
    let options = TrainerOptions::default();
    for (tp, engine_tp, model) in
        [(1, 2, EngineModel::Main), (2, 1, EngineModel::Main), (2, 2, EngineModel::Draft)]
    {
        let sizes = TrainerSizes::new(tp).with_ep(tp).with_mtp(1);
        let source = trainer(&config, &sizes, 1, &options, false).unwrap();
        let sizes = EngineSizes::new(engine_tp).with_model(model);
        join_with_scales(source, &engine(&config, sizes).unwrap());
    }
}

/// Sizes that cut no block are not refused, and DeepSeek-V3's own are among them.
#[test]
fn blocks_that_nobody_cuts_are_taken() {
    let mut config = ModelConfig::new(Family::DeepseekV3);
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (7168, 18432, 129_280);
    (config.num_layers, config.num_heads) = (4, 128);
    let mut moe = Moe::new(256, 2048);
    (moe.shared_intermediate_size, moe.score_bias) = (Some(2048), true);
    moe.dense_layers = vec![0, 1, 2];
    config.moe = Some(moe);
    config.mla = Some(Mla::new(Some(1536), 512, [128, 64, 128]));
    config.block_fp8 = true;

    let options = TrainerOptions::default();
    let trainer = |tp, config: &ModelConfig, options| {
        megatron::expected(config, &SourceRank::new(0, vec![0, 1, 2, 3]).with_tp(0, tp), options)
    };
    for tp in [1, 2, 4, 8, 16] {
        trainer(tp, &config, &options).unwrap();
        let spread = TargetRank::new(0, 0, tp).with_expert_parallel(Placement::Linear);
        vllm::expected(&config, &spread).unwrap();
        vllm::expected(&config, &TargetRank::new(0, 0, tp)).unwrap();
    }
    // The latent part of keys and values is four and a half blocks: whole, as the last of its parameter, or not at all.
    let held = vllm::expected(&config, &TargetRank::new(0, 0, 8)).unwrap();
    let shape_of = |held: &[TensorSpec], name: &str| {
        let spec = held.iter().find(|spec| spec.name.ends_with(name)).unwrap();
        (spec.dtype, spec.shape.clone())
    };
    assert_eq!(
        shape_of(&held, "layers.0.self_attn.fused_qkv_a_proj.weight_scale_inv"),
        (Dtype::F32, vec![17, 56])
    );
    assert_eq!(shape_of(&held, "routed_experts.w13_weight"), (Dtype::F8E4m3, vec![256, 512, 7168]));
    assert_eq!(shape_of(&held, "w13_weight_scale_inv"), (Dtype::F32, vec![256, 4, 56]));
    assert_eq!(shape_of(&held, "w2_weight_scale_inv"), (Dtype::F32, vec![256, 56, 2]));
    // Router, norms, embedding and head are as they were.
    assert_eq!(shape_of(&held, "mlp.gate.weight").0, Dtype::Bf16);
    assert_eq!(held.iter().filter(|spec| spec.name.contains("lm_head")).count(), 1);
    // The trainer pads rows of scales to a multiple of 4: `[7168, 1536 / 8]` has 2 columns of blocks.
    let held = trainer(8, &config, &options).unwrap();
    let scales = "layers.0.self_attention.linear_q_up_proj.weight_scale_inv";
    assert_eq!(shape_of(&held, scales), (Dtype::F32, vec![24, 12]));
    let scales = "layers.3.mlp.shared_experts.linear_fc2.weight_scale_inv";
    assert_eq!(shape_of(&held, scales), (Dtype::F32, vec![56, 4]));

    // Sharded, 576 rows of keys and values are 72 a rank.
    let local = options.with_spec(LayerSpec::Local);
    let error = trainer(8, &config, &local).unwrap_err();
    let said = error.to_string();
    assert!(
        matches!(
            &error,
            TranslateError::Block { side: Side::Megatron, axis: "rows", end: 192, .. }
        ),
        "{said}"
    );
    assert!(
        said.contains("linear_q_down_proj.weight") && said.contains("q_a_proj.weight"),
        "{said}"
    );
    // Without expert parallelism, 32 ranks have half a block of every expert each.
    let error = vllm::expected(&config, &TargetRank::new(1, 1, 16).with_dp(0, 2)).unwrap_err();
    assert!(error.to_string().contains("w13_weight"), "{error}");
}

/// Raw data reported as bytes, scales with and without padding, and what is wrong with anything else.
#[test]
fn quantised_trainers_are_checked() {
    use TranslateError as E;
    let mut config = small();
    (config.hidden_size, config.intermediate_size) = (128, 256);
    config.mla = Some(Mla::new(Some(128), 128, [64, 64, 64]));
    config.moe = Some({
        let mut moe = Moe::new(2, 128);
        moe.dense_layers = vec![0];
        moe
    });
    (config.num_layers, config.num_heads, config.mtp_layers, config.block_fp8) = (2, 4, 0, true);
    let rank = SourceRank::new(0, vec![0, 1]);
    let held = || megatron::expected(&config, &rank, &TrainerOptions::default()).unwrap();
    let plain = megatron::layout(&config, &rank, &held()).unwrap();
    let mut bytes = held();
    for spec in &mut bytes {
        if spec.dtype == Dtype::F8E4m3 {
            spec.dtype = Dtype::U8;
        }
    }
    assert_eq!(megatron::layout(&config, &rank, &bytes).unwrap(), plain);

    let name = "decoder.layers.0.mlp.linear_fc2.weight";
    let changed = |change: &dyn Fn(&mut TensorSpec), suffix: &str| {
        let mut held = held();
        let wanted = format!("{name}{suffix}");
        change(held.iter_mut().find(|spec| *spec.name == *wanted).unwrap());
        megatron::layout(&config, &rank, &held)
    };
    // `[128, 256]`: one row of two scales, four with padding.
    changed(&|spec| spec.shape = vec![1, 2], "_scale_inv").unwrap();
    let shape = changed(&|spec| spec.shape = vec![1, 3], "_scale_inv").unwrap_err();
    assert!(matches!(shape, E::Shape { .. }), "{shape}");
    let plain = changed(&|spec| spec.dtype = Dtype::Bf16, "").unwrap_err();
    assert!(matches!(plain, E::Dtype { model: Dtype::F8E4m3, .. }), "{plain}");
    let missing = changed(&|spec| spec.name = "x".into(), "_scale_inv").unwrap_err();
    assert!(
        matches!(&missing, E::MissingParam { param, .. } if param.ends_with("fc2.weight_scale_inv"))
    );
    // A bf16 model has no scales.
    let mut unquantised = config.clone();
    unquantised.block_fp8 = false;
    assert!(megatron::layout(&unquantised, &rank, &held()).is_err());
    let mut dense = ModelConfig::new(Family::Llama);
    dense.block_fp8 = true;
    (dense.hidden_size, dense.num_layers, dense.vocab_size) = (8, 1, 8);
    assert!(matches!(
        dense.validate(),
        Err(E::UnsupportedConfig { key: "quantization_config", .. })
    ));
}

fn names(held: &[TensorSpec]) -> Vec<&str> {
    held.iter().map(|spec| spec.name.as_ref()).collect()
}

#[test]
fn the_draft_model_is_a_target_of_its_own() {
    let config = small();
    let rank = TargetRank::new(0, 0, 2).with_model(EngineModel::Draft);
    let held = vllm::expected(&config, &rank).unwrap();
    let layer = "model.layers.4";
    let mut wanted = vec!["model.embed_tokens.weight".to_owned()];
    let outside = ["enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"];
    wanted.extend(outside.map(|name| format!("{layer}.{name}.weight")));
    let block = [
        "input_layernorm.weight",
        "self_attn.fused_qkv_a_proj.weight",
        "self_attn.q_a_layernorm.weight",
        "self_attn.q_b_proj.weight",
        "self_attn.kv_a_layernorm.weight",
        "self_attn.kv_b_proj.weight",
        "self_attn.o_proj.weight",
        "post_attention_layernorm.weight",
        "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias",
        "mlp.experts.routed_experts.w13_weight",
        "mlp.experts.routed_experts.w2_weight",
        "mlp.shared_experts.gate_up_proj.weight",
        "mlp.shared_experts.down_proj.weight",
    ];
    wanted.extend(block.map(|name| format!("{layer}.mtp_block.{name}")));
    assert_eq!(names(&held), wanted);
    let shape = |name: &str| &held.iter().find(|spec| spec.name.ends_with(name)).unwrap().shape;
    assert_eq!(*shape("eh_proj.weight"), [8, 16]);
    assert_eq!(*shape("shared_head.head.weight"), [64, 8]);

    // The trainer's sit on the last stage, with a copy of the embedding that nobody reads.
    let ranks =
        TrainerSizes::new(2).with_mtp(1).ranks(&Pipeline::new(2).stages(4).unwrap()).unwrap();
    let options = TrainerOptions::default();
    let held = megatron::expected(&config, &ranks[3], &options).unwrap();
    let predicting: Vec<&str> =
        names(&held).into_iter().filter(|name| name.starts_with("mtp.")).collect();
    assert!(predicting.contains(&"mtp.layers.0.eh_proj.weight"));
    assert!(predicting.contains(&"mtp.layers.0.mtp_model_layer.mlp.experts.linear_fc1.weight7"));
    assert!(names(&held).contains(&"embedding.word_embeddings.weight"));
    let layout = megatron::layout(&config, &ranks[3], &held).unwrap();
    assert!(layout.param("embedding.word_embeddings.weight").is_none());
    assert!(
        !names(&megatron::expected(&config, &ranks[1], &options).unwrap())
            .iter()
            .any(|name| name.starts_with("mtp."))
    );

    // Without them a draft model has no source, and a main model does not miss them.
    let without = trainer(&config, &TrainerSizes::new(2), 1, &options, false).unwrap();
    let source = SourceLayout::new(without).unwrap();
    let target =
        |rank| vllm::layout(&config, rank, &vllm::expected(&config, rank).unwrap()).unwrap();
    let refused = plan(&source, &target(&rank).layout, &PlanOptions::default()).unwrap_err();
    let said = refused.to_string();
    assert!(said.contains("model.layers.4"), "{said}");
    assert!(!matches!(refused, PlanError::TensorShape { .. }), "{said}");
    let main = TargetRank::new(0, 0, 2);
    plan(&source, &target(&main).layout, &PlanOptions::default()).unwrap();
}

#[test]
fn predicting_layers_that_cannot_be_are_refused() {
    use TranslateError as E;
    let config = small();
    let options = TrainerOptions::default();
    let of = |config: &ModelConfig, layers: Vec<u32>| {
        let rank = SourceRank::new(5, vec![0, 1, 2, 3]).with_mtp(layers);
        megatron::expected(config, &rank, &options).map(|_| ())
    };
    of(&config, vec![0]).unwrap();
    for layers in [vec![1], vec![0, 0]] {
        let error = of(&config, layers).unwrap_err();
        assert!(matches!(error, E::Mtp { rank: 5, known: 1, described: true, .. }), "{error}");
    }
    let mut dense = ModelConfig::new(Family::Qwen3);
    (dense.hidden_size, dense.intermediate_size, dense.vocab_size) = (8, 12, 70);
    (dense.num_layers, dense.num_heads, dense.num_kv_heads, dense.head_dim) = (4, 4, 2, 2);
    dense.mtp_layers = 1;
    assert!(matches!(of(&dense, vec![0]), Err(E::Mtp { described: false, .. })));
    of(&dense, vec![]).unwrap();
    let draft = TargetRank::new(0, 0, 1).with_model(EngineModel::Draft);
    let mut none = config;
    none.mtp_layers = 0;
    for config in [dense, none] {
        let error = vllm::expected(&config, &draft).unwrap_err();
        assert!(matches!(error, E::Mtp { side: Side::Vllm, .. }), "{error}");
    }
}

/// A bias that the engine would drop changes which experts a token goes to.
#[test]
fn a_bias_that_the_engine_lacks_is_refused_by_name() {
    let mut config = small();
    config.mtp_layers = 0;
    let rank = SourceRank::new(2, vec![0, 1, 2, 3]);
    let held = megatron::expected(&config, &rank, &TrainerOptions::default()).unwrap();
    megatron::layout(&config, &rank, &held).unwrap();
    config.moe.as_mut().unwrap().score_bias = false;
    let error = megatron::layout(&config, &rank, &held).unwrap_err();
    let said = error.to_string();
    assert!(matches!(error, TranslateError::Unwanted { rank: 2, .. }), "{said}");
    assert!(said.contains("decoder.layers.1.mlp.router.expert_bias"), "{said}");
    assert!(said.contains("noaux_tc"), "{said}");
}

/// Both forms of the down projections at once are one too many.
#[test]
fn down_projections_come_in_one_form() {
    let mut config = small();
    config.mtp_layers = 0;
    let rank = SourceRank::new(0, vec![0, 1, 2, 3]).with_tp(0, 2);
    let held = megatron::expected(&config, &rank, &TrainerOptions::default()).unwrap();
    let mut both = held.clone();
    let name = "decoder.layers.2.self_attention.linear_qkv_down_proj.weight";
    both.push(TensorSpec::new(name, Dtype::Bf16, vec![24, 8]));
    let error = megatron::layout(&config, &rank, &both).unwrap_err();
    assert!(matches!(error, TranslateError::AmbiguousParam { .. }), "{error}");
    // Neither whole nor an even share.
    let mut odd = held;
    let down = odd.iter_mut().find(|spec| spec.name.contains("linear_kv_down_proj")).unwrap();
    down.shape[0] = 7;
    let error = megatron::layout(&config, &rank, &odd).unwrap_err();
    assert!(matches!(error, TranslateError::Shape { .. }), "{error}");
}

#[test]
fn what_is_derived_from_parameters_is_listed() {
    let config = small();
    let actions = |config: &ModelConfig, model| {
        let rank = TargetRank::new(0, 0, 2).with_model(model);
        vllm::layout(config, &rank, &vllm::expected(config, &rank).unwrap()).unwrap().post_actions
    };
    let of = |layers: &[&str]| {
        let name = |layer: &&str| format!("model.layers.{layer}.self_attn.kv_b_proj.weight").into();
        PostAction::AbsorbMla { params: layers.iter().map(name).collect() }
    };
    let main = actions(&config, EngineModel::Main);
    assert_eq!(main, [of(&["0", "1", "2", "3"]), PostAction::DropCaches]);
    let draft = actions(&config, EngineModel::Draft);
    assert_eq!(draft, [of(&["4.mtp_block"]), PostAction::DropCaches]);
    let mut dense = ModelConfig::new(Family::Qwen3);
    (dense.hidden_size, dense.intermediate_size, dense.vocab_size) = (8, 12, 70);
    (dense.num_layers, dense.num_heads, dense.num_kv_heads, dense.head_dim) = (1, 4, 2, 2);
    assert_eq!(actions(&dense, EngineModel::Main), [PostAction::DropCaches]);
}

const CONFIG: &str = r#"{
    "architectures": ["DeepseekV3ForCausalLM"], "dtype": "bfloat16", "hidden_size": 7168, "num_hidden_layers": 61,
    "num_attention_heads": 128, "vocab_size": 129280, "intermediate_size": 18432, "first_k_dense_replace": 3,
    "kv_lora_rank": 512, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "topk_method": "noaux_tc", "v_head_dim": 128,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128]}
}"#;

#[test]
fn configurations_are_read() {
    let config = ModelConfig::from_json(CONFIG).unwrap();
    let moe = config.moe.as_ref().unwrap();
    assert_eq!((config.family, config.mtp_layers, config.block_fp8), (Family::DeepseekV3, 1, true));
    assert_eq!((moe.dense_layers.as_slice(), moe.score_bias), (&[0, 1, 2][..], true));
    assert_eq!(config.mla, Some(Mla::new(Some(1536), 512, [128, 64, 128])));
    let greedy = ModelConfig::from_json(&CONFIG.replace("noaux_tc", "greedy")).unwrap();
    assert!(!greedy.moe.unwrap().score_bias);
    let kimi = CONFIG
        .replace("\"architectures\": [\"DeepseekV3ForCausalLM\"]", "\"model_type\": \"kimi_k2\"");
    assert_eq!(ModelConfig::from_json(&kimi).unwrap().family, Family::KimiK2);
}

#[test]
fn configurations_that_change_the_layout_are_refused() {
    for (from, to, key) in [
        ("\"e4m3\"", "\"e5m2\"", "quantization_config"),
        ("[128, 128]", "[1, 128]", "quantization_config"),
        ("\"fp8\"", "\"awq\"", "quantization_config"),
        ("\"dynamic\"", "\"static\"", "quantization_config"),
        ("\"fmt\"", "\"scale_fmt\": \"ue8m0\", \"fmt\"", "quantization_config"),
        ("\"fmt\"", "\"modules_to_not_convert\": [\"lm_head\"], \"fmt\"", "quantization_config"),
        ("\"moe_layer_freq\": 1", "\"moe_layer_freq\": 2", "moe_layer_freq"),
        ("\"dtype\"", "\"attention_bias\": true, \"dtype\"", "attention_bias"),
    ] {
        let error = ModelConfig::from_json(&CONFIG.replacen(from, to, 1)).unwrap_err();
        let refused =
            matches!(&error, TranslateError::UnsupportedConfig { key: found, .. } if *found == key);
        assert!(refused, "{to}: {error}");
    }
}
