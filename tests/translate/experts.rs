//! Mixtures of experts over random legal sizes: what joins, what is refused, how many bytes travel, and back again.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use proptest::prelude::*;
use proptest::sample::select;
use refit::planner::{
    Capabilities, LowerOptions, Plan, PlanOptions, Policy, RankLayout, Replicas, SourceLayout,
    lower, plan,
};
use refit_tests::execute::{self, Sources};
use refit_tests::oracle;
use refit_translate::megatron::{
    self, LayerSpec, Pipeline, SourceRank, TrainerOptions, TrainerSizes,
};
use refit_translate::roles::{ExpertNames, Placement};
use refit_translate::vllm::{self, EngineSizes, TargetRank};
use refit_translate::{Family, ModelConfig, Moe, TranslateError};
use serde_json::{Value, json};

/// Qwen3-30B-A3B, Mixtral-8x7B and GPT-OSS-20B as their configurations describe them.
fn qwen3() -> Value {
    json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16",
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": 128, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": false, "attention_bias": false
    })
}

fn mixtral() -> Value {
    json!({
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "torch_dtype": "bfloat16",
        "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "vocab_size": 32000,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": false, "sliding_window": null
    })
}

fn gpt_oss() -> Value {
    json!({
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "dtype": "bfloat16",
        "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32, "head_dim": 64,
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
        "vocab_size": 201088, "attention_bias": true, "tie_word_embeddings": false
    })
}

fn read(config: &Value) -> Result<ModelConfig, TranslateError> {
    ModelConfig::from_json(&config.to_string())
}

/// A configuration with one key changed; null is the same as absent.
fn with(mut config: Value, key: &str, value: Value) -> Value {
    config[key] = value;
    config
}

#[test]
fn configurations_are_read() {
    let config = read(&qwen3()).unwrap();
    assert_eq!((config.family, config.qk_norm), (Family::Qwen3Moe, true));
    assert_eq!(config.moe, Some(Moe::new(128, 768)));
    let some =
        with(with(qwen3(), "decoder_sparse_step", json!(2)), "mlp_only_layers", json!([1, 5]));
    let dense = read(&some).unwrap().moe.unwrap().dense_layers;
    assert!(dense.len() == 26 && dense.starts_with(&[0, 1, 2, 4, 5]), "{dense:?}");

    let config = read(&mixtral()).unwrap();
    assert_eq!((config.head_dim, config.moe), (128, Some(Moe::new(8, 14336))));
    let config = read(&gpt_oss()).unwrap();
    assert_eq!((config.head_dim, config.qkv_bias), (64, true));
    assert_eq!(config.moe, Some(Moe::new(32, 2880)));
}

#[test]
fn configurations_are_refused_by_name() {
    use TranslateError as E;
    let refused = |config: Value| read(&config).unwrap_err();
    let mxfp4 = with(gpt_oss(), "quantization_config", json!({"quant_method": "mxfp4"}));
    let text = refused(mxfp4).to_string();
    assert!(text.contains("mxfp4") && text.contains("bf16 checkpoint"), "{text}");
    let keys =
        [(qwen3(), "moe_intermediate_size"), (qwen3(), "num_experts"), (qwen3(), "head_dim")];
    let keys = keys.into_iter().chain([
        (mixtral(), "num_local_experts"),
        (mixtral(), "intermediate_size"),
        (mixtral(), "num_key_value_heads"),
        (gpt_oss(), "num_local_experts"),
        (gpt_oss(), "intermediate_size"),
        (gpt_oss(), "head_dim"),
    ]);
    for (config, key) in keys {
        assert_eq!(refused(with(config, key, Value::Null)), E::MissingKey { key });
    }
    for (config, biased) in [(qwen3(), true), (mixtral(), true), (gpt_oss(), false)] {
        let error = refused(with(config, "attention_bias", json!(biased)));
        assert!(matches!(error, E::UnsupportedConfig { key: "attention_bias", .. }), "{error}");
    }
    let tied = refused(with(gpt_oss(), "tie_word_embeddings", json!(true)));
    assert!(matches!(tied, E::Combination { what: "GPT-OSS with a tied head", .. }), "{tied}");
    let mut bare = read(&mixtral()).unwrap();
    bare.moe = None;
    let group = E::MissingGroup { family: "MixtralForCausalLM", group: "moe" };
    assert_eq!(bare.validate(), Err(group));
    let mut dense = read(&mixtral()).unwrap();
    dense.moe.as_mut().unwrap().dense_layers = vec![0];
    assert!(matches!(dense.validate(), Err(E::Combination { what: "dense_layers", .. })));
    let shared = refused(with(qwen3(), "shared_expert_intermediate_size", json!(64)));
    assert!(matches!(shared, E::Combination { what: "shared experts", .. }), "{shared}");
}

#[test]
fn clashing_sizes_are_named() {
    use TranslateError as E;
    let trainer = |config: &Value, ep: u32, etp: u32| {
        let rank = SourceRank::new(0, vec![0]).with_ep(0, ep).with_etp(0, etp);
        megatron::expected(&read(config).unwrap(), &rank, &TrainerOptions::default())
    };
    let indivisible = |what, size, by_what, by| E::Indivisible { what, size, by_what, by };
    let ep = indivisible("number of experts", 8, "megatron ep_size", 3);
    assert_eq!(trainer(&mixtral(), 3, 1), Err(ep));
    let etp = indivisible("moe_intermediate_size", 768, "megatron etp_size", 512);
    assert_eq!(trainer(&qwen3(), 1, 512), Err(etp));

    let engine = |config: &Value, sizes: EngineSizes| {
        vllm::expected(&read(config).unwrap(), &sizes.ranks().unwrap()[0])
    };
    let spread = EngineSizes::new(4).with_expert_parallel(Placement::Linear);
    let few = E::TooFewExperts { experts: 8, ranks: 12 };
    assert_eq!(engine(&mixtral(), spread.with_dp(3)), Err(few));
    let flat = "vllm dp_size * pcp_size * tp_size";
    let share = indivisible("moe_intermediate_size", 768, flat, 20);
    assert_eq!(engine(&qwen3(), EngineSizes::new(4).with_dp(5)), Err(share));
    let dealt = EngineSizes::new(4).with_expert_parallel(Placement::RoundRobin);
    let error = engine(&qwen3(), dealt).unwrap_err();
    assert!(
        matches!(error, E::Combination { what: "round-robin placement of experts", .. }),
        "{error}"
    );
    let few = with(qwen3(), "num_experts", json!(8));
    let error = engine(&few, EngineSizes::new(16)).unwrap_err();
    assert!(matches!(error, E::Combination { what, .. } if what.contains("tp_size")), "{error}");
    // Qwen3-30B-A3B takes up to 32, with KV heads on several ranks.
    assert!(engine(&qwen3(), EngineSizes::new(32)).is_ok());
    // vLLM's class of GPT-OSS does not put a KV head on several ranks.
    assert!(engine(&gpt_oss(), EngineSizes::new(8)).is_ok());
    let heads = indivisible("num_key_value_heads", 8, "vllm tp_size", 16);
    assert_eq!(engine(&gpt_oss(), EngineSizes::new(16)), Err(heads));
    let ranks = indivisible("intermediate_size", 2880, flat, 28);
    assert_eq!(engine(&gpt_oss(), spread.with_dp(7)), Err(ranks));
}

/// Both sides would agree on swapped names, so moving bytes does not show them; the frameworks' own lists do.
#[test]
fn names_are_the_frameworks() {
    let config = |config: &Value| {
        let mut config = read(config).unwrap();
        config.num_layers = 1;
        config
    };
    let layer = |config: &ModelConfig, rank: &TargetRank| -> Vec<String> {
        let held = vllm::expected(config, rank).unwrap();
        let names = held.iter().filter_map(|spec| spec.name.strip_prefix("model.layers.0."));
        names.filter(|name| !name.contains("attn")).map(Into::into).collect()
    };
    let rank = TargetRank::new(0, 0, 1);
    let norms = ["input_layernorm.weight", "post_attention_layernorm.weight"];
    let experts = |names: [&'static str; 3]| norms.into_iter().chain(names).collect::<Vec<_>>();
    let names = [
        "block_sparse_moe.gate.weight",
        "block_sparse_moe.experts.routed_experts.w13_weight",
        "block_sparse_moe.experts.routed_experts.w2_weight",
    ];
    assert_eq!(layer(&config(&mixtral()), &rank), experts(names));
    let names = ["mlp.gate.weight", "mlp.experts.w13_weight", "mlp.experts.w2_weight"];
    let before = rank.with_expert_names(ExpertNames::Flat);
    assert_eq!(layer(&config(&qwen3()), &before), experts(names));

    let config = config(&mixtral());
    let held = vllm::expected(&config, &rank).unwrap();
    let layout = vllm::layout(&config, &rank, &held).unwrap().layout;
    let first = |end: &str| -> Vec<String> {
        let of = layout.bands().filter(|(param, _, _)| param.name().ends_with(end));
        of.map(|(_, tensor, _)| tensor.name.to_string()).take(3).collect()
    };
    let logical = |expert: u32, of: &str| {
        format!("model.layers.0.block_sparse_moe.experts.{expert}.{of}.weight")
    };
    assert_eq!(first("w13_weight"), [logical(0, "w1"), logical(0, "w3"), logical(1, "w1")]);
    assert_eq!(first("w2_weight"), [logical(0, "w2"), logical(1, "w2"), logical(2, "w2")]);
}

/// Both sides' parallel sizes.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    trainer: TrainerSizes,
    pp: u32,
    engine: EngineSizes,
}

/// A small model with experts, in sizes that allow many parallel ones. Sizes of experts and of dense layers differ.
fn model() -> impl Strategy<Value = ModelConfig> {
    let families = select(vec![Family::Qwen3Moe, Family::Mixtral, Family::GptOss]);
    let dense = prop::collection::btree_set(0u32..4, 0..3);
    let (kv, size) = (select(vec![2u64, 4, 6, 12]), select(vec![8u64, 12, 24]));
    let families = (families, 1u64..3);
    (families, 1u64..4, 1u64..4, kv, 1u64..3, 1u64..13, size, dense).prop_map(
        |((family, groups), hidden, group, kv, head_dim, experts, intermediate, dense)| {
            let mut config = ModelConfig::new(family);
            config.hidden_size = hidden;
            config.num_kv_heads = kv;
            config.num_heads = kv * group;
            config.head_dim = head_dim;
            config.num_layers = 2;
            // Nothing is padded on either side, so that everything can go back.
            config.vocab_size = 64 * 3;
            let mut moe = Moe::new(experts, intermediate);
            moe.groups = groups;
            if family == Family::Qwen3Moe {
                config.intermediate_size = 48;
                moe.dense_layers = dense.into_iter().filter(|&layer| layer < 2).collect();
            }
            config.moe = Some(moe);
            config
        },
    )
}

fn sizes() -> impl Strategy<Value = Sizes> {
    let size = || select(vec![1u32, 1, 2, 2, 3, 4]);
    let copies = || select(vec![1u32, 1, 1, 2]);
    let placements = vec![None, Some(Placement::Linear), Some(Placement::RoundRobin)];
    let trainer = (size(), copies(), size(), size(), copies());
    let engine = (size(), copies(), copies(), select(placements), any::<bool>(), any::<bool>());
    (trainer, engine).prop_map(|((tp, dp, ep, etp, pp), (d, copies, pcp, placement, sp, flat))| {
        let mut engine = EngineSizes::new(d).with_dp(copies).with_pcp(pcp);
        engine.expert_parallel = placement;
        engine.sequence_parallel_moe = sp && placement.is_some() && d > 1 && copies > 1;
        engine.expert_names = if flat { ExpertNames::Flat } else { ExpertNames::Routed };
        // Mostly as many copies of dense layers as the experts' groups need.
        let dp = if dp == 1 { ep * etp } else { dp };
        let trainer = TrainerSizes::new(tp).with_dp(dp).with_ep(ep).with_etp(etp);
        Sizes { trainer, pp, engine }
    })
}

/// What the frameworks take: see `design` of either, not the code under test.
fn is_legal(config: &ModelConfig, sizes: &Sizes) -> bool {
    let by = |size: u64, by: u32| size.is_multiple_of(by.into());
    let moe = config.moe.as_ref().unwrap();
    let (heads, kv) = (config.num_heads, config.num_kv_heads);
    let is_dense = !moe.dense_layers.is_empty();
    let attention = |tp: u32| by(heads, tp) && (by(kv, tp) || u64::from(tp).is_multiple_of(kv));
    let dense = |tp: u32| attention(tp) && (!is_dense || by(config.intermediate_size, tp));
    let TrainerSizes { tp, dp, ep, etp, .. } = sizes.trainer;
    let rows = (heads + 2 * kv) * config.head_dim;
    let trainer = (tp * dp).is_multiple_of(ep * etp)
        && config.num_layers.is_multiple_of(sizes.pp)
        && dense(tp)
        && by(rows, tp)
        && by(config.vocab_size, tp)
        && (by(moe.experts, ep) && by(moe.intermediate_size, etp) || moe.dense_layers.len() == 2);
    let EngineSizes { tp, dp, pcp, .. } = sizes.engine;
    let flat = tp * dp * pcp;
    let spread = match sizes.engine.expert_parallel {
        Some(Placement::RoundRobin) if moe.groups == 1 => false,
        Some(_) => moe.experts >= flat.into(),
        None => by(moe.intermediate_size, flat),
    };
    let own = match config.family {
        Family::GptOss => by(kv, tp) && by(moe.intermediate_size, flat),
        Family::Qwen3Moe => u64::from(tp) <= moe.experts,
        _ => true,
    };
    let engine = dense(tp)
        && by(config.vocab_size.next_multiple_of(64), tp)
        && (spread && own || moe.dense_layers.len() == 2);
    trainer && engine
}

/// Both sides' layouts.
type Layouts = (Vec<RankLayout>, Vec<RankLayout>);

fn layouts(
    config: &ModelConfig,
    sizes: &Sizes,
    spec: LayerSpec,
) -> Result<Layouts, TranslateError> {
    let options = TrainerOptions::default().with_spec(spec);
    let source = |rank: &SourceRank| {
        megatron::layout(config, rank, &megatron::expected(config, rank, &options)?)
    };
    let target = |rank: &TargetRank| {
        vllm::layout(config, rank, &vllm::expected(config, rank)?).map(|target| target.layout)
    };
    let ranks = sizes.trainer.ranks(&Pipeline::new(sizes.pp).stages(config.num_layers)?)?;
    let sources: Result<Vec<_>, _> = ranks.iter().map(source).collect();
    let targets: Result<Vec<_>, _> = sizes.engine.ranks()?.iter().map(target).collect();
    Ok((sources?, targets?))
}

fn held(layouts: &[RankLayout]) -> Sources {
    layouts.iter().map(|layout| (layout.rank(), oracle::buffers(layout))).collect()
}

/// Whether this plan reads every trainer tensor that it reads at all from its first to its last byte.
fn reads_whole_tensors(plan: &Plan, sources: &[RankLayout]) -> bool {
    let mut read = std::collections::BTreeMap::<u32, u64>::new();
    for segment in plan.segments() {
        *read.entry(segment.source).or_default() +=
            segment.dims.offsets().count() as u64 * segment.run;
    }
    read.into_iter().all(|(source, bytes)| {
        let source = &plan.sources()[source as usize];
        let layout = sources.iter().find(|layout| layout.rank() == source.rank).unwrap();
        layout.param(&source.name).unwrap().bytes() == bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    /// Legal sizes join and give what the oracle says; others are refused by the size that clashes.
    #[test]
    fn any_two_legal_sides_join(config in model(), sizes in sizes(), local in any::<bool>()) {
        let spec = if local { LayerSpec::Local } else { LayerSpec::Te };
        let (sources, targets) = match layouts(&config, &sizes, spec) {
            Ok(sides) => sides,
            Err(error) => {
                prop_assert!(!is_legal(&config, &sizes), "legal sizes are refused: {}", error);
                let named = matches!(
                    error,
                    TranslateError::Indivisible { .. }
                        | TranslateError::KvHeads { .. }
                        | TranslateError::TooFewExperts { .. }
                        | TranslateError::Combination { .. }
                );
                prop_assert!(named, "{}", error);
                return Ok(());
            }
        };
        prop_assert!(is_legal(&config, &sizes), "illegal sizes are taken");
        let (bytes, source) = (held(&sources), SourceLayout::new(sources).unwrap());
        for target in targets {
            let plan = plan(&source, &target, &PlanOptions::default()).unwrap();
            prop_assert_eq!(execute::plan(&plan, &bytes), oracle::buffers(&target));
        }
    }

    /// No byte travels in vain where it need not: none at all where asked for, none by any rule where trainer tensors
    /// are needed whole or not at all, as when experts move from expert-parallel ranks to such.
    #[test]
    fn no_byte_travels_in_vain(config in model(), sizes in sizes()) {
        let Ok((sources, targets)) = layouts(&config, &sizes, LayerSpec::Te) else { return Ok(()) };
        let bytes = held(&sources);
        let source = SourceLayout::new(sources.clone()).unwrap();
        let capabilities = Capabilities::plain(2_000, 5_000);
        let (tp, etp) = (sizes.trainer.tp, sizes.trainer.etp);
        let engine = sizes.engine;
        let flat = engine.tp * engine.dp * engine.pcp;
        let whole = tp.is_multiple_of(engine.tp)
            && u64::from(engine.tp) <= config.num_kv_heads
            && (engine.expert_parallel.is_some() || etp.is_multiple_of(flat));
        for target in &targets {
            // One copy of everything: of several, each would be asked for a part.
            let options = PlanOptions::default().with_replicas(Replicas::Lowest);
            let plan = plan(&source, target, &options).unwrap();
            let filled = plan.coverage().filled_bytes;
            for policy in [Policy::Cheapest, Policy::ExactWire] {
                let options = LowerOptions::default().with_policy(policy);
                let program = lower(&plan, &capabilities, &options).unwrap();
                prop_assert_eq!(execute::program(&program, &bytes), oracle::buffers(target));
                prop_assert_eq!(program.needed_bytes(), target.bytes() - filled);
                prop_assert!(program.wire_bytes() >= program.needed_bytes());
                if whole || policy == Policy::ExactWire {
                    prop_assert_eq!(program.wire_bytes(), program.needed_bytes());
                }
            }
            prop_assert!(!whole || reads_whole_tensors(&plan, &sources));
        }
    }

    /// What the engine got, read back into the trainer's layout, is what the trainer had.
    #[test]
    fn there_and_back_again(config in model(), sizes in sizes(), local in any::<bool>()) {
        let spec = if local { LayerSpec::Local } else { LayerSpec::Te };
        let Ok((sources, targets)) = layouts(&config, &sizes, spec) else { return Ok(()) };
        let had = held(&sources);
        let there = SourceLayout::new(sources.clone()).unwrap();
        let mut got = Sources::new();
        for target in &targets {
            let plan = plan(&there, target, &PlanOptions::default()).unwrap();
            got.insert(target.rank(), execute::plan(&plan, &had));
        }
        let back = SourceLayout::new(targets).unwrap();
        for source in &sources {
            let plan = plan(&back, source, &PlanOptions::default()).unwrap();
            prop_assert_eq!(&execute::plan(&plan, &got), &had[&source.rank()]);
        }
    }
}
