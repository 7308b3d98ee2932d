//! Hybrid models: the roles of Mamba-2, of gated delta nets and of gated attention against a reference that builds
//! both sides row by row, and whole models with layers of several kinds.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::sync::Arc;

use proptest::prelude::*;
use refit::planner::{Dtype, LayoutBuilder, PlanOptions, RankLayout, SourceLayout, plan};
use refit_tests::execute::{self, Sources};
use refit_tests::oracle::{self, Buffers};
use refit_tests::reference::{self, Rows};
use refit_translate::megatron::{self, LayerSpec, SourceRank, TrainerOptions};
use refit_translate::roles::{
    GatedQkv, GdnBa, GdnConv, GdnInProj, GdnLayout, GdnQkvz, MambaConv, MambaInProj, Role,
    SourceCoords, SourceRole, TargetCoords, TargetRole, View,
};
use refit_translate::vllm::{self, TargetRank};
use refit_translate::{Family, Gdn, LayerKind, Mamba, ModelConfig, Moe, TranslateError};
use serde_json::{Value, json};

/// The rows of a view, whose parts must be as wide as it is and tile it.
fn rows_of(view: &View) -> Rows {
    let mut rows = vec![None; usize::try_from(view.rows).unwrap()];
    for part in &view.parts {
        assert_eq!((part.cols.clone(), part.at_col, part.row_step), (0..view.cols, 0, 1));
        for (local, row) in (part.at_row..).zip(part.rows.clone()) {
            let place = &mut rows[usize::try_from(local).unwrap()];
            assert_eq!(place.replace((part.tensor, row)), None, "local row {local} is there twice");
        }
    }
    rows.into_iter().map(|row| row.expect("a local row is in no part")).collect()
}

/// A parameter of one side's ranks: views by rank, and what the role's logical tensors are called.
struct Side<'a> {
    role: &'a dyn Role,
    views: Vec<View>,
    logical: Vec<&'a str>,
}

impl<'a> Side<'a> {
    fn source(role: &'a impl SourceRole, size: u32, logical: &[&'a str]) -> Option<Self> {
        let view = |rank| role.megatron(&SourceCoords::new(rank, size).unwrap(), None).ok();
        let views = (0..size).map(view).collect::<Option<_>>()?;
        Some(Self { role, views, logical: logical.to_vec() })
    }

    fn target(role: &'a impl TargetRole, size: u32, logical: &[&'a str]) -> Option<Self> {
        let view = |rank| role.vllm(&TargetCoords::new(rank, size).unwrap()).ok();
        let views = (0..size).map(view).collect::<Option<_>>()?;
        Some(Self { role, views, logical: logical.to_vec() })
    }
}

/// The layouts of ranks that hold these parameters.
fn layouts(sides: &[Side<'_>]) -> Vec<RankLayout> {
    let ranks = sides[0].views.len();
    let layout = |rank: usize| {
        let mut layout = LayoutBuilder::new(u32::try_from(rank).unwrap());
        for (number, side) in sides.iter().enumerate() {
            let name = Arc::from(format!("param.{number}"));
            let view = &side.views[rank];
            let param = view.param(&mut layout, side.role, &name, Dtype::Bf16, &side.logical);
            layout.param(param.unwrap()).unwrap();
        }
        layout.build()
    };
    (0..ranks).map(layout).collect()
}

/// Moves what `from` ranks hold to `to` ranks.
fn moved(from: &[RankLayout], held: &Sources, to: &[RankLayout]) -> Vec<Buffers> {
    let source = SourceLayout::new(from.to_vec()).unwrap();
    to.iter()
        .map(|target| execute::plan(&plan(&source, target, &PlanOptions::default()).unwrap(), held))
        .collect()
}

fn by_rank(layouts: &[RankLayout], buffers: Vec<Buffers>) -> Sources {
    layouts.iter().map(RankLayout::rank).zip(buffers).collect()
}

/// There is what the oracle says, and back again what was there: no side pads, so nothing is lost.
fn there_and_back(source: &[Side<'_>], target: &[Side<'_>]) {
    let (source, target) = (layouts(source), layouts(target));
    let wanted = |layouts: &[RankLayout]| layouts.iter().map(oracle::buffers).collect::<Vec<_>>();
    let (held, there) = (wanted(&source), wanted(&target));
    let got = moved(&source, &by_rank(&source, held.clone()), &target);
    assert_eq!(got, there);
    assert_eq!(moved(&target, &by_rank(&target, got), &source), held);
}

fn size() -> impl Strategy<Value = u32> {
    prop::sample::select(vec![1u32, 2, 3, 4, 6, 8])
}

/// Numbers of heads that several sizes divide.
fn heads() -> impl Strategy<Value = u64> {
    prop::sample::select(vec![1u64, 2, 3, 4, 6, 8, 12, 24])
}

fn mamba() -> impl Strategy<Value = Mamba> {
    (heads(), 1u64..4, 1u64..4, 1u64..4, any::<bool>()).prop_map(
        |(groups, each, head_dim, state, bias)| {
            let mut sizes = Mamba::new((groups * each, head_dim), (groups, state), 4);
            sizes.conv_bias = bias;
            sizes
        },
    )
}

fn gdn() -> impl Strategy<Value = Gdn> {
    (heads(), 1u64..4, 1u64..4, 1u64..4)
        .prop_map(|(keys, each, dim, value_dim)| Gdn::new((keys, keys * each), (dim, value_dim), 4))
}

fn gdn_layout() -> impl Strategy<Value = GdnLayout> {
    prop::sample::select(vec![GdnLayout::Interleaved, GdnLayout::Flat])
}

fn divides(by: u32, sizes: &[u64]) -> bool {
    sizes.iter().all(|size| size.is_multiple_of(by.into()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn mamba_is_laid_out_as_by_the_reference(
        sizes in mamba(), cols in 1u64..4, from in size(), to in size(), conv in any::<bool>(),
    ) {
        let in_proj = MambaInProj { sizes, cols };
        let kernel = sizes.conv_bias.then_some(sizes.conv_kernel);
        let channels = MambaConv { sizes, kernel };
        let logical = ["w"];
        let (source, target) = if conv {
            (Side::source(&channels, from, &logical), Side::target(&channels, to, &logical))
        } else {
            (Side::source(&in_proj, from, &logical), Side::target(&in_proj, to, &logical))
        };
        prop_assert_eq!(source.is_some(), divides(from, &[sizes.heads, sizes.groups]));
        let groups = if sizes.groups == 1 { 0 } else { sizes.groups };
        prop_assert_eq!(target.is_some(), divides(to, &[sizes.heads, groups]));
        let (Some(source), Some(target)) = (source, target) else { return Ok(()) };
        for (rank, view) in (0..).zip(&source.views) {
            prop_assert_eq!(rows_of(view), reference::mamba_source(&sizes, conv, rank, from.into()));
            if let (true, Some(kernel)) = (conv, kernel) {
                prop_assert_eq!(&view.shape, &[view.rows, 1, kernel]);
            }
        }
        for (rank, view) in (0..).zip(&target.views) {
            prop_assert_eq!(rows_of(view), reference::mamba_target(&sizes, conv, rank, to.into()));
        }
        there_and_back(&[source], &[target]);
    }

    #[test]
    fn gated_delta_nets_are_laid_out_as_by_the_reference(
        sizes in gdn(), layout in gdn_layout(), cols in 1u64..4, from in size(), to in size(),
    ) {
        let in_proj = GdnInProj { sizes, layout, cols };
        let (qkvz, ba) = (GdnQkvz(in_proj), GdnBa(in_proj));
        let logical: [&[&str]; 2] = match layout {
            GdnLayout::Interleaved => [&["qkvz"], &["ba"]],
            GdnLayout::Flat => [&["qkv", "z"], &["b", "a"]],
        };
        let source = Side::source(&in_proj, from, &logical.concat());
        let targets = [Side::target(&qkvz, to, logical[0]), Side::target(&ba, to, logical[1])];
        prop_assert_eq!(source.is_some(), divides(from, &[sizes.key_heads]));
        prop_assert_eq!(targets[0].is_some(), divides(to, &[sizes.key_heads]));
        let (Some(source), [Some(qkvz), Some(ba)]) = (source, targets) else { return Ok(()) };
        for (rank, view) in (0..).zip(&source.views) {
            prop_assert_eq!(rows_of(view), reference::gdn_source(&sizes, layout, rank, from.into()));
        }
        for (rank, views) in (0..).zip(qkvz.views.iter().zip(&ba.views)) {
            let [mut wanted, mut wanted_ba] = reference::gdn_target(&sizes, layout, rank, to.into());
            // The engine's parameters count their own logical tensors.
            let first = logical[0].len();
            wanted_ba.iter_mut().for_each(|(tensor, _)| *tensor -= first);
            prop_assert!(wanted.iter_mut().all(|(tensor, _)| *tensor < first));
            prop_assert_eq!(rows_of(views.0), wanted);
            prop_assert_eq!(rows_of(views.1), wanted_ba);
        }
        there_and_back(&[source], &[qkvz, ba]);
    }

    #[test]
    fn convolutions_of_delta_nets_are_laid_out_as_by_the_reference(
        sizes in gdn(), from in size(), to in size(),
    ) {
        let role = GdnConv { sizes };
        let (source, target) = (Side::source(&role, from, &["w"]), Side::target(&role, to, &["w"]));
        prop_assert_eq!(source.is_some(), divides(from, &[sizes.key_heads]));
        let (Some(source), Some(target)) = (source, target) else { return Ok(()) };
        for (side, size) in [(&source, from), (&target, to)] {
            for (rank, view) in (0..).zip(&side.views) {
                prop_assert_eq!(rows_of(view), reference::gdn_conv(&sizes, rank, size.into()));
                prop_assert_eq!(&view.shape, &[view.rows, 1, sizes.conv_kernel]);
            }
        }
        there_and_back(&[source], &[target]);
    }

    #[test]
    fn gated_attention_is_laid_out_as_by_the_reference(
        kv_heads in heads(), each in 1u64..4, head_dim in 1u64..5, cols in prop::option::of(1u64..4),
        from in size(), to in size(),
    ) {
        let heads = kv_heads * each;
        let role = GatedQkv { heads, kv_heads, head_dim, cols };
        let (source, target) = (
            Side::source(&role, from, &["q", "k", "v"]),
            Side::target(&role, to, &["q", "k", "v"]),
        );
        let legal = |by: u32| {
            divides(by, &[heads]) && (divides(by, &[kv_heads]) || u64::from(by).is_multiple_of(kv_heads))
        };
        prop_assert_eq!(target.is_some(), legal(to));
        let rows = 2 * (heads + kv_heads) * head_dim;
        prop_assert_eq!(source.is_some(), legal(from) && divides(from, &[rows]));
        let (Some(source), Some(target)) = (source, target) else { return Ok(()) };
        let sizes = (heads, kv_heads, head_dim);
        for (rank, view) in (0..).zip(&source.views) {
            prop_assert_eq!(rows_of(view), reference::gated_qkv_source(sizes, rank, from.into()));
        }
        for (rank, view) in (0..).zip(&target.views) {
            prop_assert_eq!(rows_of(view), reference::gated_qkv_target(sizes, rank, to.into()));
        }
        there_and_back(&[source], &[target]);
    }
}

/// The kinds of layers that a hybrid family has.
fn kinds(family: Family) -> &'static [LayerKind] {
    match family {
        Family::NemotronH => &[LayerKind::Mamba, LayerKind::Attention, LayerKind::Mlp],
        _ => &[LayerKind::DeltaNet, LayerKind::Attention],
    }
}

const HYBRID: [Family; 3] = [Family::NemotronH, Family::Qwen3Next, Family::Qwen3_5];

/// A small hybrid model of four layers.
fn model() -> impl Strategy<Value = ModelConfig> {
    let layers = prop::array::uniform4(any::<prop::sample::Index>());
    let (mamba, gdn, families) = (mamba(), gdn(), prop::sample::select(&HYBRID));
    (families, layers, mamba, gdn, 1u64..4, 0u32..3, 1u64..3, any::<bool>(), any::<bool>())
        .prop_map(|(family, layers, mamba, gdn, hidden, kv, head_dim, tied, shared)| {
            let mut config = ModelConfig::new(family);
            (config.hidden_size, config.intermediate_size, config.vocab_size) = (hidden, 24, 70);
            config.num_kv_heads = 1 << kv;
            (config.num_heads, config.head_dim) = (24 << kv, head_dim);
            (config.num_layers, config.tied) = (4, tied);
            let mut moe = Moe::new(8, 24);
            moe.shared_intermediate_size = shared.then_some(24);
            moe.dense_layers = vec![1];
            (config.mamba, config.gdn, config.moe) = (Some(mamba), Some(gdn), Some(moe));
            config.pattern = layers.map(|at| *at.get(kinds(family))).to_vec();
            config
        })
}

/// Joins two sides and moves every element, or says which sizes clash.
fn refit(
    config: &ModelConfig,
    (tp, pp, engine): (u32, u32, u32),
    options: &TrainerOptions,
) -> Result<(), TranslateError> {
    let mut from = Vec::new();
    for rank in SourceRank::grid(config.num_layers, tp, pp, 1)? {
        let held = megatron::expected(config, &rank, options)?;
        from.push(megatron::layout(config, &rank, &held)?);
    }
    let mut to = Vec::new();
    for rank in TargetRank::grid(engine)? {
        to.push(vllm::layout(config, &rank, &vllm::expected(config, &rank)?)?.layout);
    }
    let held = by_rank(&from, from.iter().map(oracle::buffers).collect());
    let wanted: Vec<Buffers> = to.iter().map(|target| oracle::wanted(target, &from)).collect();
    assert_eq!(moved(&from, &held, &to), wanted);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_two_legal_sides_join(
        config in model(),
        tp in size(),
        pp in prop::sample::select(vec![1u32, 2, 4]),
        engine in size(),
        local in any::<bool>(),
        dtype in prop::sample::select(vec![None, Some(Dtype::F32)]),
    ) {
        let spec = if local { LayerSpec::Local } else { LayerSpec::Te };
        let mut options = TrainerOptions::default().with_spec(spec);
        options.dtype = dtype;
        let has = |kind| config.pattern.contains(&kind);
        let legal = |by: u32, engine: bool| {
            let (mamba, gdn) = (config.mamba.unwrap(), config.gdn.unwrap());
            let groups = if engine && mamba.groups == 1 { 0 } else { mamba.groups };
            let kv = config.num_kv_heads;
            let attention = divides(by, &[config.num_heads])
                && (divides(by, &[kv]) || u64::from(by).is_multiple_of(kv));
            (!has(LayerKind::Mamba) || divides(by, &[mamba.heads, groups]))
                && (!has(LayerKind::DeltaNet) || divides(by, &[gdn.key_heads]))
                && (!has(LayerKind::Attention) || attention)
                && (!engine || divides(by, &[128]))
        };
        let gates = if config.output_gate { config.num_heads } else { 0 };
        let rows = (config.num_heads + gates + 2 * config.num_kv_heads) * config.head_dim;
        let attention = !has(LayerKind::Attention) || divides(tp, &[rows]);
        let wanted = legal(tp, false) && legal(engine, true) && attention;
        match refit(&config, (tp, pp, engine), &options) {
            Ok(()) => prop_assert!(wanted, "took illegal sizes"),
            Err(TranslateError::Indivisible { .. } | TranslateError::KvHeads { .. }) => {
                prop_assert!(!wanted, "refused legal sizes");
            }
            Err(error) => prop_assert!(false, "{}", error),
        }
    }

    #[test]
    fn no_number_panics(
        family in prop::sample::select(&HYBRID),
        sizes in prop::collection::vec(number(), 11),
        layers in 0u32..6,
        pattern in prop::collection::vec(prop::sample::select(vec![
            LayerKind::Mamba, LayerKind::Attention, LayerKind::Mlp, LayerKind::DeltaNet,
        ]), 0..6),
        (rank, size) in prop_oneof![4 => (0u32..4, 1u32..5), 1 => (any::<u32>(), any::<u32>())],
        flat in any::<bool>(),
    ) {
        let [a, b, c, d, kernel, hidden, heads, kv_heads, head_dim, vocab, cols] = sizes[..] else { unreachable!() };
        let (mamba, gdn) = (Mamba::new((a, b), (c, d), kernel), Gdn::new((a, c), (b, d), kernel));
        let mut config = ModelConfig::new(family);
        (config.hidden_size, config.intermediate_size, config.vocab_size) = (hidden, cols, vocab);
        (config.num_heads, config.num_kv_heads, config.head_dim) = (heads, kv_heads, head_dim);
        (config.num_layers, config.pattern, config.moe) = (layers, pattern, Some(Moe::new(4, cols)));
        (config.mamba, config.gdn) = (Some(mamba), Some(gdn));
        let at = SourceRank::new(0, (0..layers).collect()).with_tp(rank, size);
        if let Ok(held) = megatron::expected(&config, &at, &TrainerOptions::default()) {
            let _ = megatron::layout(&config, &at, &held);
        }
        let at = TargetRank::new(0, rank, size);
        if let Ok(held) = vllm::expected(&config, &at) {
            let _ = vllm::layout(&config, &at, &held);
        }
        // Roles may be made without a model, and then of any sizes.
        let layout = if flat { GdnLayout::Flat } else { GdnLayout::Interleaved };
        let in_proj = GdnInProj { sizes: gdn, layout, cols };
        let both: [&dyn Both; 4] = [
            &MambaInProj { sizes: mamba, cols },
            &MambaConv { sizes: mamba, kernel: Some(kernel) },
            &GdnConv { sizes: gdn },
            &GatedQkv { heads, kv_heads, head_dim, cols: Some(cols) },
        ];
        if let (Ok(source), Ok(target)) = (SourceCoords::new(rank, size), TargetCoords::new(rank, size)) {
            for role in both {
                let _ = (role.logical(), role.megatron(&source, None), role.vllm(&target));
            }
            let _ = (in_proj.logical(), in_proj.megatron(&source, None));
            let _ = (GdnQkvz(in_proj).vllm(&target), GdnBa(in_proj).vllm(&target));
        }
    }
}

trait Both: SourceRole + TargetRole {}

impl<R: SourceRole + TargetRole> Both for R {}

/// Mostly small, sometimes hopeless.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 1u64..9, 1 => Just(0), 1 => 1u64..1 << 31, 1 => any::<u64>(), 1 => Just(u64::MAX)]
}

/// Nemotron-Nano-9B-v2's first layers, and a Qwen3-Next and a Qwen3.5 in small.
fn nemotron() -> Value {
    json!({
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "torch_dtype": "bfloat16",
        "hidden_size": 4480, "intermediate_size": 15680, "num_hidden_layers": 4,
        "hybrid_override_pattern": "M-M*", "num_attention_heads": 40, "num_key_value_heads": 8,
        "head_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 80, "n_groups": 8,
        "ssm_state_size": 128, "conv_kernel": 4, "use_conv_bias": true, "use_bias": false,
        "mamba_proj_bias": false, "mlp_bias": false, "attention_bias": false, "mlp_hidden_act": "relu2",
        "tie_word_embeddings": false, "vocab_size": 131_072
    })
}

fn qwen3_next() -> Value {
    json!({
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "dtype": "bfloat16",
        "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 8, "head_dim": 256,
        "num_attention_heads": 16, "num_key_value_heads": 2, "full_attention_interval": 4,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "num_experts": 512,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 151_936
    })
}

fn qwen3_5() -> Value {
    let mut config = qwen3_next();
    config["architectures"] = json!(["Qwen3_5ForCausalLM"]);
    config["layer_types"] = json!(["linear_attention", "full_attention"]);
    config["num_hidden_layers"] = json!(2);
    config
}

fn read(config: &Value) -> Result<ModelConfig, TranslateError> {
    ModelConfig::from_json(&config.to_string())
}

fn with(mut config: Value, key: &str, value: Value) -> Value {
    config[key] = value;
    config
}

#[test]
fn configurations_are_read() {
    use LayerKind::{Attention, DeltaNet, Mamba, Mlp};
    let config = read(&nemotron()).unwrap();
    assert_eq!(config.pattern, [Mamba, Mlp, Mamba, Attention]);
    assert_eq!(config.mamba.unwrap(), refit_translate::Mamba::new((128, 80), (8, 128), 4));
    assert_eq!((config.head_dim, config.num_kv_heads, config.output_gate), (128, 8, false));
    // As transformers 5 writes it: no pattern, no number of layers.
    let mut listed = with(
        nemotron(),
        "layers_block_type",
        json!(["linear_attention", "mlp", "mamba", "full_attention"]),
    );
    assert_eq!(read(&listed).unwrap(), config);
    listed.as_object_mut().unwrap().remove("hybrid_override_pattern");
    listed.as_object_mut().unwrap().remove("num_hidden_layers");
    assert_eq!(read(&listed).unwrap(), config);
    // As Python writes it: floats that JSON lacks, and not in strings.
    let text = with(nemotron(), "time_step_limit", json!([0.0, "infinity"])).to_string();
    let python = text.replace("\"infinity\"", "Infinity, -Infinity, NaN, \"NaN\", \"\\\"NaN\"");
    assert_eq!(ModelConfig::from_json(&python).unwrap(), config);
    let named = with(nemotron(), "architectures", json!(["Infinity \" NaN"]));
    assert!(read(&named).unwrap_err().to_string().contains("`Infinity \" NaN`"));

    let config = read(&qwen3_next()).unwrap();
    assert_eq!(config.pattern[..4], [DeltaNet, DeltaNet, DeltaNet, Attention]);
    assert_eq!(config.pattern[..4], config.pattern[4..]);
    assert_eq!(config.gdn.unwrap(), Gdn::new((16, 32), (128, 128), 4));
    assert!(config.output_gate && config.qk_norm && config.moe.is_some());
    let config = read(&qwen3_5()).unwrap();
    assert_eq!((config.pattern.as_slice(), config.moe), ([DeltaNet, Attention].as_slice(), None));
}

#[test]
fn configurations_are_refused_by_name() {
    use TranslateError as E;
    let refused = |config: Value| read(&config).unwrap_err();
    for (config, key, value) in [
        (nemotron(), "hybrid_override_pattern", json!("MEM*")),
        (nemotron(), "hybrid_override_pattern", json!("M-M")),
        (nemotron(), "layers_block_type", json!(["mamba", "mlp", "mamba", "mlp"])),
        (nemotron(), "layers_block_type", json!(["mamba", "moe", "mamba", "attention"])),
        (nemotron(), "use_bias", json!(true)),
        (nemotron(), "mamba_proj_bias", json!(true)),
        (nemotron(), "mlp_bias", json!(true)),
        (nemotron(), "attention_bias", json!(true)),
        (nemotron(), "mlp_hidden_act", json!("silu")),
        (qwen3_next(), "attention_bias", json!(true)),
        (qwen3_next(), "qkv_bias", json!(true)),
        (qwen3_next(), "attn_output_gate", json!(false)),
        (qwen3_5(), "layer_scale", json!(true)),
        (qwen3_5(), "layer_types", json!(["linear_attention", "sliding_attention"])),
        (qwen3_5(), "layer_types", json!(["linear_attention"])),
    ] {
        let error = refused(with(config, key, value));
        assert!(
            matches!(error, E::UnsupportedConfig { key: found, .. } if found == key),
            "{error}"
        );
    }
    let missing = |config: Value, key| refused(with(config, key, Value::Null));
    for key in [
        "hybrid_override_pattern",
        "mamba_num_heads",
        "n_groups",
        "use_conv_bias",
        "intermediate_size",
    ] {
        assert_eq!(missing(nemotron(), key), E::MissingKey { key });
    }
    for key in [
        "linear_num_key_heads",
        "linear_conv_kernel_dim",
        "num_experts",
        "head_dim",
        "num_hidden_layers",
    ] {
        assert_eq!(missing(qwen3_next(), key), E::MissingKey { key });
    }
    assert_eq!(
        missing(qwen3_next(), "full_attention_interval"),
        E::MissingKey { key: "layer_types" }
    );
    let zero = refused(with(qwen3_next(), "full_attention_interval", json!(0)));
    assert_eq!(zero, E::Zero { what: "full_attention_interval" });
    let odd = refused(with(nemotron(), "n_groups", json!(3)));
    assert!(
        matches!(odd, E::Indivisible { what: "mamba_num_heads", size: 128, by: 3, .. }),
        "{odd}"
    );
    let odd = refused(with(qwen3_next(), "linear_num_key_heads", json!(5)));
    assert!(matches!(odd, E::Indivisible { what: "linear_num_value_heads", by: 5, .. }), "{odd}");
    let deep = "M".repeat(5000);
    let deep = refused(with(nemotron(), "hybrid_override_pattern", json!(deep)));
    assert!(matches!(deep, E::TooLarge { what: "hybrid_override_pattern", .. }), "{deep}");

    let mut config = read(&nemotron()).unwrap();
    config.num_layers = 3;
    config.validate().unwrap();
    config.num_layers = 5;
    assert!(matches!(config.validate(), Err(E::Combination { what: "pattern", .. })));
    config.num_layers = 4;
    config.mamba = None;
    assert!(matches!(config.validate(), Err(E::MissingGroup { group: "mamba", .. })));
    config.pattern[0] = LayerKind::DeltaNet;
    assert!(matches!(config.validate(), Err(E::Combination { what: "pattern", .. })));
}

/// Both generations of Megatron-Core's Mamba mixer.
#[test]
fn convolutions_go_by_either_name() {
    let config = read(&nemotron()).unwrap();
    let rank = SourceRank::new(0, (0..4).collect());
    let mut held = megatron::expected(&config, &rank, &TrainerOptions::default()).unwrap();
    let bands = |held: &[_]| {
        let layout = megatron::layout(&config, &rank, held).unwrap();
        layout
            .bands()
            .map(|(_, tensor, band)| (tensor.name.clone(), band.clone()))
            .collect::<Vec<_>>()
    };
    let new = bands(&held);
    let mut renamed = 0;
    for spec in &mut held {
        if spec.name.contains("conv1d_") {
            spec.name = spec.name.replace("conv1d_", "conv1d.").into();
            renamed += 1;
        }
    }
    assert_eq!((renamed, bands(&held)), (4, new));
}

/// One group and several engine ranks: the state's projections are on all of them.
#[test]
fn a_single_group_is_on_every_engine_rank() {
    let sizes = Mamba::new((4, 2), (1, 3), 4);
    let role = MambaInProj { sizes, cols: 1 };
    let parts = |rank| {
        let view = role.vllm(&TargetCoords::new(rank, 2).unwrap()).unwrap();
        view.parts.into_iter().map(|part| part.rows).collect::<Vec<_>>()
    };
    assert_eq!(parts(0), [0..4, 8..12, 16..19, 19..22, 22..24]);
    assert_eq!(parts(1), [4..8, 12..16, 16..19, 19..22, 24..26]);
    // The trainer shares groups out or refuses.
    let error = role.megatron(&SourceCoords::new(0, 2).unwrap(), None).unwrap_err();
    assert!(matches!(error, TranslateError::Indivisible { what: "n_groups", .. }), "{error}");
}
