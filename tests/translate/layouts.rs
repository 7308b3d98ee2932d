//! Layouts from configurations and sizes: what is legal, what is refused and how, and that any two sides join.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use proptest::prelude::*;
use refit::planner::{Dtype, PlanOptions, Replicas, SourceLayout, plan};
use refit_tests::execute::{self, Sources};
use refit_tests::oracle;
use refit_translate::megatron::{self, LayerSpec, SourceRank, TrainerOptions};
use refit_translate::roles::{Qkv, Role, SourceCoords, SourceRole, TargetCoords, TargetRole};
use refit_translate::vllm::{self, EngineModel, TargetRank};
use refit_translate::{Family, Mla, ModelConfig, Moe, Side, TensorSpec, TranslateError};
use serde_json::{Value, json};

/// Llama-3.1-8B, Qwen2.5-7B and Qwen3-4B as their configurations describe them.
fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": false,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0}
    })
}

fn qwen2() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16",
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "tie_word_embeddings": false, "use_sliding_window": false
    })
}

fn qwen3() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "tie_word_embeddings": true, "attention_bias": false
    })
}

fn read(config: &Value) -> Result<ModelConfig, TranslateError> {
    ModelConfig::from_json(&config.to_string())
}

/// A configuration with one key changed; `Value::Null` is written as null.
fn with(mut config: Value, key: &str, value: Value) -> Value {
    config[key] = value;
    config
}

fn without(mut config: Value, key: &str) -> Value {
    config.as_object_mut().unwrap().remove(key);
    config
}

/// A small Qwen3.
fn small() -> ModelConfig {
    let mut config = ModelConfig::new(Family::Qwen3);
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (8, 12, 70);
    (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) = (2, 4, 2, 2);
    config
}

fn source_rank() -> SourceRank {
    SourceRank::new(3, vec![0, 1]).with_tp(0, 2)
}

fn trainer(config: &ModelConfig) -> Vec<TensorSpec> {
    megatron::expected(config, &source_rank(), &TrainerOptions::default()).unwrap()
}

/// What the layout says when the tensors are changed.
fn trainer_error(change: impl FnOnce(&mut Vec<TensorSpec>)) -> TranslateError {
    let mut held = trainer(&small());
    change(&mut held);
    megatron::layout(&small(), &source_rank(), &held).unwrap_err()
}

fn engine_error(change: impl FnOnce(&mut Vec<TensorSpec>)) -> TranslateError {
    let rank = TargetRank::new(5, 1, 2);
    let mut held = vllm::expected(&small(), &rank).unwrap();
    change(&mut held);
    vllm::layout(&small(), &rank, &held).unwrap_err()
}

fn find<'a>(held: &'a mut [TensorSpec], name: &str) -> &'a mut TensorSpec {
    held.iter_mut().find(|spec| spec.name.ends_with(name)).unwrap()
}

#[test]
fn configurations_are_read() {
    let config = read(&llama()).unwrap();
    assert_eq!((config.family, config.dtype), (Family::Llama, Dtype::Bf16));
    // No head_dim: hidden_size / num_attention_heads.
    assert_eq!(
        (config.head_dim, config.tied, config.qkv_bias, config.qk_norm),
        (128, false, false, false)
    );
    let config = read(&qwen2()).unwrap();
    assert_eq!((config.head_dim, config.qkv_bias, config.qk_norm), (128, true, false));
    let config = read(&qwen3()).unwrap();
    assert_eq!((config.num_layers, config.num_heads, config.num_kv_heads), (36, 32, 8));
    assert_eq!((config.tied, config.qkv_bias, config.qk_norm), (true, false, true));

    let null = with(llama(), "head_dim", Value::Null);
    assert_eq!(read(&null), read(&llama()));
    let new_name = with(without(llama(), "torch_dtype"), "dtype", json!("bfloat16"));
    assert_eq!(read(&new_name), read(&llama()));
    let half = with(llama(), "dtype", json!("float16"));
    assert_eq!(read(&half).unwrap().dtype, Dtype::F16, "the newer name wins");
    let ungrouped = without(llama(), "num_key_value_heads");
    assert_eq!(read(&ungrouped).unwrap().num_kv_heads, 32);
    let by_type = without(llama(), "architectures");
    assert_eq!(read(&by_type), read(&llama()));
    let mistral = with(llama(), "architectures", json!(["MistralForCausalLM"]));
    assert_eq!(read(&mistral).unwrap().family, Family::Mistral);
    assert!(!read(&with(qwen2(), "qkv_bias", json!(false))).unwrap().qkv_bias);
    assert!(read(&with(llama(), "quantization_config", Value::Null)).is_ok());
}

#[test]
fn configurations_are_refused_by_name() {
    use TranslateError as E;
    let refused = |config: Value| read(&config).unwrap_err();

    let unknown = refused(with(llama(), "architectures", json!(["GemmaForCausalLM"])));
    let text = unknown.to_string();
    assert!(
        text.contains("GemmaForCausalLM") && text.contains("Qwen3ForCausalLM (qwen3)"),
        "{text}"
    );
    // The head of a reward model is another, whatever the model type says.
    let reward = refused(with(qwen2(), "architectures", json!(["Qwen2ForSequenceClassification"])));
    assert!(matches!(reward, E::UnsupportedModel { .. }));
    let nameless = refused(without(without(llama(), "architectures"), "model_type"));
    assert_eq!(nameless, E::MissingKey { key: "architectures" });

    for (key, value) in [
        ("quantization_config", json!({"quant_method": "fp8"})),
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
        ("qk_norm", json!(true)),
        ("torch_dtype", json!("float8_e4m3fn")),
    ] {
        let error = refused(with(llama(), key, value));
        assert!(
            matches!(error, E::UnsupportedConfig { key: found, .. } if found == key),
            "{error}"
        );
    }
    for key in ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"] {
        assert_eq!(refused(without(llama(), key)), E::MissingKey { key });
        assert_eq!(refused(with(llama(), key, json!(0))), E::Zero { what: key });
    }
    assert_eq!(refused(without(llama(), "vocab_size")), E::MissingKey { key: "vocab_size" });
    assert_eq!(refused(without(llama(), "torch_dtype")), E::MissingKey { key: "dtype" });
    assert_eq!(refused(without(qwen3(), "head_dim")), E::MissingKey { key: "head_dim" });
    let kv = refused(without(qwen2(), "num_key_value_heads"));
    assert_eq!(kv, E::MissingKey { key: "num_key_value_heads" });

    let huge = refused(with(llama(), "vocab_size", json!(u64::MAX)));
    assert!(matches!(huge, E::TooLarge { what: "vocab_size", .. }));
    let deep = refused(with(llama(), "num_hidden_layers", json!(u32::MAX)));
    assert!(matches!(deep, E::TooLarge { what: "num_hidden_layers", .. }));
    let heads = json!(1 << 16);
    let wide =
        with(with(llama(), "num_attention_heads", heads.clone()), "num_key_value_heads", heads);
    let wide = refused(with(with(wide, "head_dim", json!(1)), "num_hidden_layers", json!(17)));
    assert!(matches!(wide, E::TooLarge { limit: 1_048_576, .. }));
    let long = ModelConfig::from_json(&" ".repeat((1 << 20) + 1)).unwrap_err();
    assert!(matches!(long, E::TooLarge { what: "bytes of config.json", .. }));
    let odd = refused(with(llama(), "num_key_value_heads", json!(5)));
    assert!(matches!(odd, E::Indivisible { what: "num_attention_heads", size: 32, by: 5, .. }));
    let odd = refused(with(llama(), "hidden_size", json!(4097)));
    assert!(matches!(odd, E::Indivisible { what: "hidden_size", size: 4097, by: 32, .. }));

    assert!(matches!(refused(with(llama(), "vocab_size", json!(-1))), E::Json { .. }));
    let broken = ModelConfig::from_json("{\n  \"hidden_size\": ,").unwrap_err();
    assert!(matches!(broken, E::Json { line: 2, .. }), "{broken}");
    assert!(ModelConfig::from_json("").is_err() && ModelConfig::from_json("[]").is_err());
}

/// The tensor-parallel sizes up to 64 that a side takes.
fn legal(config: &ModelConfig, side: Side) -> Vec<u32> {
    let takes = |&tp: &u32| match side {
        Side::Megatron => {
            let rank = SourceRank::new(0, vec![0]).with_tp(tp - 1, tp);
            megatron::expected(config, &rank, &TrainerOptions::default()).is_ok()
        }
        Side::Vllm => vllm::expected(config, &TargetRank::new(0, tp - 1, tp)).is_ok(),
    };
    (1..=64).filter(takes).collect()
}

#[test]
fn legal_sizes_are_those_of_the_frameworks() {
    for side in [Side::Megatron, Side::Vllm] {
        assert_eq!(legal(&read(&llama()).unwrap(), side), [1, 2, 4, 8, 16, 32], "{side}");
        assert_eq!(legal(&read(&qwen3()).unwrap(), side), [1, 2, 4, 8, 16, 32], "{side}");
    }
    assert_eq!(legal(&read(&qwen2()).unwrap(), Side::Vllm), [1, 2, 4]);
}

#[test]
fn clashing_sizes_are_named() {
    use TranslateError as E;
    let config = small();
    let source = |tp| {
        let rank = SourceRank::new(0, vec![0, 1]).with_tp(0, tp);
        megatron::expected(&config, &rank, &TrainerOptions::default()).unwrap_err()
    };
    let target =
        |config: &ModelConfig, tp| vllm::expected(config, &TargetRank::new(0, 0, tp)).unwrap_err();
    let heads =
        E::Indivisible { what: "num_attention_heads", size: 4, by_what: "megatron tp_size", by: 3 };
    assert_eq!(source(3), heads);
    assert_eq!(source(0), E::Zero { what: "megatron tp_size" });
    let mut odd = small();
    (odd.num_heads, odd.num_kv_heads) = (12, 4);
    assert_eq!(target(&odd, 6), E::KvHeads { kv_heads: 4, by_what: "vllm tp_size", by: 6 });
    odd.intermediate_size = 13;
    let mlp = target(&odd, 2);
    assert!(
        matches!(mlp, E::Indivisible { what: "intermediate_size", size: 13, by: 2, .. }),
        "{mlp}"
    );
    // 151936 is a multiple of 64 but not of 3; 128256 is of both.
    (odd.num_heads, odd.num_kv_heads, odd.intermediate_size) = (6, 3, 12);
    odd.vocab_size = 151_936;
    let vocab = target(&odd, 3);
    assert!(matches!(vocab, E::Indivisible { size: 151_936, by: 3, .. }), "{vocab}");
    odd.vocab_size = 128_256;
    assert!(vllm::expected(&odd, &TargetRank::new(0, 2, 3)).is_ok());

    let options = TrainerOptions::default();
    let rank = |rank: SourceRank| megatron::expected(&config, &rank, &options).unwrap_err();
    assert!(matches!(rank(source_rank().with_tp(2, 2)), E::Rank { rank: 2, size: 2, .. }));
    assert!(matches!(rank(source_rank().with_pp(1, 1)), E::Rank { group: "megatron pp_size", .. }));
    assert!(matches!(rank(SourceRank::new(1, vec![2])), E::LayerRange { layer: 2, layers: 2, .. }));
    assert!(matches!(rank(SourceRank::new(1, vec![1, 1])), E::DuplicateLayer { layer: 1, .. }));
    let few =
        megatron::expected(&config, &source_rank(), &options.with_padded_vocab(68)).unwrap_err();
    assert!(matches!(few, E::Vocab { local_rows: 34, by: 2, vocab_size: 70 }), "{few}");
    let odd =
        megatron::expected(&config, &source_rank(), &options.with_padded_vocab(71)).unwrap_err();
    assert!(matches!(odd, E::Indivisible { what: "padded_vocab", .. }), "{odd}");

    assert_eq!(megatron::stages(4, 2).unwrap(), [[0, 1], [2, 3]]);
    assert!(matches!(megatron::stages(4, 3), Err(E::Indivisible { size: 4, by: 3, .. })));
    assert!(matches!(megatron::stages(4, 0), Err(E::Zero { .. })));
    assert!(matches!(megatron::stages(0, 1), Err(E::Zero { .. })));
    assert!(matches!(megatron::stages(u32::MAX, 1), Err(E::TooLarge { .. })));
    assert!(matches!(SourceRank::grid(4, u32::MAX, 2, 2), Err(E::TooLarge { .. })));
    assert!(matches!(TargetRank::grid(u32::MAX), Err(E::TooLarge { .. })));
    assert!(matches!(TargetRank::grid(0), Err(E::Zero { .. })));
}

#[test]
fn ranks_are_numbered_as_megatron_does() {
    let ranks = SourceRank::grid(4, 2, 2, 2).unwrap();
    let places: Vec<_> = ranks.iter().map(|rank| (rank.rank, rank.tp_rank, rank.pp_rank)).collect();
    let expected =
        [(0, 0, 0), (1, 1, 0), (2, 0, 0), (3, 1, 0), (4, 0, 1), (5, 1, 1), (6, 0, 1), (7, 1, 1)];
    assert_eq!(places, expected);
    assert_eq!(ranks[6].chunks, [[2, 3]]);
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    use TranslateError as E;
    let error = trainer_error(|held| held.push(TensorSpec::new("extra.weight", Dtype::Bf16, [1])));
    assert!(
        matches!(&error, E::UnknownParam { rank: 3, param, others: 0, .. } if &**param == "extra.weight")
    );
    let error =
        trainer_error(|held| held.retain(|spec| !spec.name.ends_with("0.mlp.linear_fc2.weight")));
    assert!(
        error.to_string().contains("holds no `decoder.layers.0.mlp.linear_fc2.weight`"),
        "{error}"
    );
    // A norm is missed under both its names.
    let error =
        trainer_error(|held| held.retain(|spec| !spec.name.contains("linear_qkv.layer_norm")));
    assert!(
        error.to_string().ends_with("nor `decoder.layers.0.input_layernorm.weight`"),
        "{error}"
    );
    let error = trainer_error(|held| {
        held.push(TensorSpec::new("decoder.layers.1.input_layernorm.weight", Dtype::Bf16, [8]));
    });
    assert!(matches!(error, E::AmbiguousParam { rank: 3, .. }), "{error}");
    let error = trainer_error(|held| held.push(held[0].clone()));
    assert!(matches!(error, E::DuplicateParam { side: Side::Megatron, rank: 3, .. }), "{error}");
    let error = trainer_error(Vec::clear);
    assert_eq!(error, E::NoParams { side: Side::Megatron, rank: 3 });
    let error = trainer_error(|held| find(held, "fc1.weight").shape = vec![8, 12]);
    assert!(
        matches!(&error, E::Shape { expected, got, .. } if *expected == [12, 8] && *got == [8, 12]),
        "{error}"
    );
    for shape in [vec![], vec![0, 8], vec![34, 8], vec![u64::MAX, 8], vec![35], vec![35, 8, 1]] {
        let error = trainer_error(|held| find(held, "word_embeddings.weight").shape = shape);
        assert!(matches!(error, E::Shape { .. } | E::Vocab { .. } | E::TooLarge { .. }), "{error}");
    }
    let error = trainer_error(|held| find(held, "fc1.weight").dtype = Dtype::F8E4m3);
    assert!(matches!(error, E::Dtype { got: Dtype::F8E4m3, model: Dtype::Bf16, .. }), "{error}");
    let error = trainer_error(|held| find(held, "fc1.weight").dtype = Dtype::F16);
    assert!(matches!(error, E::Dtype { got: Dtype::F16, .. }), "{error}");

    let error = engine_error(|held| held.push(TensorSpec::new("model.x", Dtype::Bf16, [1])));
    assert!(matches!(error, E::UnknownParam { side: Side::Vllm, rank: 5, .. }), "{error}");
    let error = engine_error(|held| held.retain(|spec| &*spec.name != "lm_head.weight"));
    assert!(matches!(error, E::MissingParam { side: Side::Vllm, .. }), "{error}");
    let error = engine_error(|held| find(held, "embed_tokens.weight").shape = vec![35, 8]);
    assert!(
        error.to_string().contains("[35, 8], expected [64, 8]: [vocab_size rounded up"),
        "{error}"
    );
    let error = engine_error(|held| find(held, "down_proj.weight").dtype = Dtype::I64);
    assert!(matches!(error, E::Dtype { side: Side::Vllm, got: Dtype::I64, .. }), "{error}");
    let error = engine_error(|held| held.push(held[0].clone()));
    assert!(matches!(error, E::DuplicateParam { side: Side::Vllm, .. }), "{error}");
    assert_eq!(engine_error(Vec::clear), E::NoParams { side: Side::Vllm, rank: 5 });
}

#[test]
fn what_may_differ_may_differ() {
    let mut held = trainer(&small());
    find(&mut held, "q_layernorm.weight").dtype = Dtype::F32;
    let plain = megatron::layout(&small(), &source_rank(), &held).unwrap();
    // Transformer Engine's extra state is nobody's parameter.
    let extra = "decoder.layers.0.self_attention.linear_qkv._extra_state";
    held.push(TensorSpec::new(extra, Dtype::U8, [0]));
    assert_eq!(megatron::layout(&small(), &source_rank(), &held).unwrap(), plain);
    assert!(plain.param(extra).is_none());
    // Specs are told apart per layer, so they may be mixed.
    find(&mut held, "1.mlp.linear_fc1.layer_norm_weight").name =
        "decoder.layers.1.pre_mlp_layernorm.weight".into();
    megatron::layout(&small(), &source_rank(), &held).unwrap();
    // The order of the tensors does not matter.
    held.reverse();
    assert_eq!(megatron::layout(&small(), &source_rank(), &held).unwrap().bytes(), plain.bytes());
}

#[test]
fn tied_heads_follow_the_embedding() {
    let mut config = small();
    config.tied = true;
    let options = TrainerOptions::default();
    let head = |held: &[TensorSpec], name: &str| held.iter().any(|spec| &*spec.name == name);
    // One stage: no head. Several: a copy on the last, which is accounted for but not offered.
    let single = megatron::expected(&config, &source_rank(), &options).unwrap();
    assert!(!head(&single, "output_layer.weight"));
    let last = SourceRank::new(1, vec![1]).with_pp(1, 2);
    let held = megatron::expected(&config, &last, &options).unwrap();
    assert!(head(&held, "output_layer.weight"));
    let layout = megatron::layout(&config, &last, &held).unwrap();
    assert!(layout.param("output_layer.weight").is_none());
    assert!(layout.tensors().iter().all(|tensor| !tensor.name.contains("embed")));
    let mut wrong = held.clone();
    find(&mut wrong, "output_layer.weight").shape = vec![70, 9];
    assert!(matches!(megatron::layout(&config, &last, &wrong), Err(TranslateError::Shape { .. })));
    // A head of its own on one stage: the trainer does not tie what the configuration ties.
    let mut untied = single;
    untied.push(TensorSpec::new("output_layer.weight", Dtype::Bf16, [35, 8]));
    let error = megatron::layout(&config, &source_rank(), &untied).unwrap_err();
    assert!(matches!(error, TranslateError::UntiedHead { .. }), "{error}");

    // An engine that has untied the head gets the embedding twice.
    let rank = TargetRank::new(0, 0, 1);
    let mut held = vllm::expected(&config, &rank).unwrap();
    assert!(!head(&held, "lm_head.weight"));
    vllm::layout(&config, &rank, &held).unwrap();
    held.push(TensorSpec::new("lm_head.weight", Dtype::Bf16, [128, 8]));
    let layout = vllm::layout(&config, &rank, &held).unwrap().layout;
    let heads =
        layout.bands().filter(|(_, tensor, _)| &*tensor.name == "model.embed_tokens.weight");
    assert_eq!(heads.count(), 2);
}

/// Both sides would agree on swapped names, so moving bytes does not show them; a checkpoint would.
#[test]
fn logical_tensors_are_the_checkpoints() {
    let rank = TargetRank::new(0, 0, 1);
    let held = vllm::expected(&small(), &rank).unwrap();
    let layout = vllm::layout(&small(), &rank, &held).unwrap().layout;
    let of = |param: &str| -> Vec<String> {
        let bands = layout.bands().filter(|(held, _, _)| held.name().ends_with(param));
        bands.map(|(_, tensor, _)| tensor.name.to_string()).collect()
    };
    assert_eq!(
        of("layers.1.mlp.gate_up_proj.weight"),
        ["model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    );
    assert_eq!(
        of("layers.0.self_attn.qkv_proj.weight"),
        ["q", "k", "v"].map(|proj| format!("model.layers.0.self_attn.{proj}_proj.weight"))
    );
}

/// Llama-3.1-8B with more ranks than KV groups: shares begin inside a group, then inside a head.
#[test]
fn shares_of_qkv_cut_groups_and_heads() {
    let role = Qkv { heads: 32, kv_heads: 8, head_dim: 128, cols: None };
    let parts = |rank, size| {
        let view = role.megatron(&SourceCoords::new(rank, size).unwrap(), None).unwrap();
        let parts = view.parts.iter().map(|part| (part.tensor, part.rows.clone(), part.at_row));
        (view.rows, parts.collect::<Vec<_>>())
    };
    assert_eq!(parts(1, 16), (384, vec![(0, 384..512, 0), (1, 0..128, 128), (2, 0..128, 256)]));
    assert_eq!(parts(1, 32), (192, vec![(0, 192..384, 0)]));
    assert_eq!(parts(3, 32), (192, vec![(1, 64..128, 0), (2, 0..128, 64)]));
    // The engine gives both ranks of a group the same K and V.
    let at = |rank| role.vllm(&TargetCoords::new(rank, 16).unwrap()).unwrap().parts;
    assert_eq!(at(2)[1..], at(3)[1..]);
    assert_ne!(at(2)[0], at(3)[0]);
}

/// Families that need no group of facts. The others have tests of their own.
const DENSE: &[Family] = &[Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3];

/// A small dense model, in sizes that allow many parallel ones.
fn model() -> impl Strategy<Value = ModelConfig> {
    let families = prop::sample::select(DENSE);
    (families, 1u64..4, 0u32..4, 0u32..4, 1u64..4, 1u64..200, any::<bool>(), any::<bool>())
        .prop_map(|(family, hidden, group, kv, head_dim, vocab, tied, bias)| {
            let mut config = ModelConfig::new(family);
            config.hidden_size = hidden;
            config.num_kv_heads = 1 << kv;
            config.num_heads = config.num_kv_heads << group;
            config.head_dim = head_dim;
            config.intermediate_size = 24;
            config.num_layers = 4;
            config.vocab_size = vocab;
            config.tied = tied;
            config.qkv_bias = bias;
            config
        })
}

/// Joins two sides and moves every element, or says which sizes clash.
fn refit(
    config: &ModelConfig,
    (tp, pp, dp): (u32, u32, u32),
    engine: u32,
    options: &TrainerOptions,
    rule: Replicas,
) -> Result<(), TranslateError> {
    let mut layouts = Vec::new();
    for rank in SourceRank::grid(config.num_layers, tp, pp, dp)? {
        let held = megatron::expected(config, &rank, options)?;
        layouts.push(megatron::layout(config, &rank, &held)?);
    }
    let sources: Sources =
        layouts.iter().map(|layout| (layout.rank(), oracle::buffers(layout))).collect();
    let source = SourceLayout::new(layouts)?;
    for rank in TargetRank::grid(engine)? {
        let mut held = vllm::expected(config, &rank)?;
        for spec in &mut held {
            // Norms often stay in f32 on one side.
            if spec.name.contains("norm") {
                spec.dtype = Dtype::F32;
            }
        }
        let target = vllm::layout(config, &rank, &held)?.layout;
        let plan = plan(&source, &target, &PlanOptions::default().with_replicas(rule)).unwrap();
        assert_eq!(execute::plan(&plan, &sources), oracle::buffers(&target));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_two_legal_sides_join(
        config in model(),
        tp in prop::sample::select(vec![1u32, 2, 3, 4, 6, 8, 16]),
        pp in prop::sample::select(vec![1u32, 2, 4]),
        dp in 1u32..3,
        engine in prop::sample::select(vec![1u32, 2, 3, 4, 8, 16]),
        local in any::<bool>(),
        padding in prop::option::of(0u64..3),
        lowest in any::<bool>(),
    ) {
        let spec = if local { LayerSpec::Local } else { LayerSpec::Te };
        let mut options = TrainerOptions::default().with_spec(spec);
        if let Some(rows) = padding {
            let tp = u64::from(tp);
            options = options.with_padded_vocab((config.vocab_size.div_ceil(tp) + rows) * tp);
        }
        let rule = if lowest { Replicas::Lowest } else { Replicas::Spread };
        match refit(&config, (tp, pp, dp), engine, &options, rule) {
            Ok(()) => {}
            Err(TranslateError::Indivisible { .. } | TranslateError::KvHeads { .. }) => {
                let legal = |by: u64| {
                    let (heads, kv) = (config.num_heads, config.num_kv_heads);
                    heads.is_multiple_of(by)
                        && (kv.is_multiple_of(by) || by.is_multiple_of(kv))
                        && config.intermediate_size.is_multiple_of(by)
                };
                let vocab = config.vocab_size.next_multiple_of(64);
                let rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim;
                let (tp, engine) = (u64::from(tp), u64::from(engine));
                prop_assert!(
                    !legal(tp) || !rows.is_multiple_of(tp) || !legal(engine) || !vocab.is_multiple_of(engine),
                    "refused legal sizes"
                );
            }
            Err(error) => prop_assert!(false, "{}", error),
        }
    }

    #[test]
    fn no_number_panics(
        sizes in prop::collection::vec(number(), 6),
        layers in prop_oneof![0u32..9, any::<u32>()],
        places in prop::collection::vec(prop_oneof![4 => 0u32..5, 1 => any::<u32>()], 4),
        list in prop::collection::vec(0u32..9, 0..4),
        padded in prop::option::of(number()),
        family in prop::sample::select(Family::ALL),
        shape in prop::collection::vec(number(), 0..3),
        experts in prop::option::of((number(), number())),
        latent in prop::option::of((prop::option::of(number()), prop::collection::vec(number(), 4))),
        predicting in (prop_oneof![0u32..4, any::<u32>()], prop::collection::vec(0u32..4, 0..3)),
        block_fp8 in any::<bool>(),
    ) {
        let mut config = ModelConfig::new(family);
        config.moe = experts.map(|(experts, intermediate)| Moe::new(experts, intermediate));
        (config.hidden_size, config.intermediate_size, config.vocab_size) = (sizes[0], sizes[1], sizes[2]);
        (config.num_heads, config.num_kv_heads, config.head_dim) = (sizes[3], sizes[4], sizes[5]);
        config.num_layers = layers;
        config.mla = latent.map(|(q, sizes)| Mla::new(q, sizes[0], [sizes[1], sizes[2], sizes[3]]));
        (config.mtp_layers, config.block_fp8) = (predicting.0, block_fp8);
        let rank = SourceRank::new(0, list).with_tp(places[0], places[1]).with_pp(places[2], places[3]);
        let rank = rank.with_mtp(predicting.1);
        let mut options = TrainerOptions::default();
        options.padded_vocab = padded;
        if let Ok(mut held) = megatron::expected(&config, &rank, &options) {
            if let Ok(layout) = megatron::layout(&config, &rank, &held) {
                prop_assert_eq!(layout.rank(), 0);
            }
            if let Some(first) = held.first_mut() {
                first.shape = shape;
                let _ = megatron::layout(&config, &rank, &held);
            }
        }
        let rank = TargetRank::new(0, places[0], places[1]);
        for rank in [rank, rank.with_model(EngineModel::Draft)] {
            if let Ok(held) = vllm::expected(&config, &rank) {
                let _ = vllm::layout(&config, &rank, &held);
            }
        }
        let role = Qkv { heads: sizes[3], kv_heads: sizes[4], head_dim: sizes[5], cols: Some(sizes[0]) };
        if let (Ok(source), Ok(target)) = (SourceCoords::new(places[0], places[1]), TargetCoords::new(places[0], places[1])) {
            let _ = (role.megatron(&source, None), role.vllm(&target), role.logical());
        }
    }
}

/// Mostly small, sometimes hopeless.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 1u64..9, 1 => Just(0), 1 => 1u64..1 << 31, 1 => any::<u64>(), 1 => Just(u64::MAX)]
}
