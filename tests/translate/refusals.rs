//! Trainers and engines that are refused for what they say about themselves, one by one, and that the documentation
//! lists all of them.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::collections::BTreeSet;
use std::path::Path;

use refit::planner::Dtype;
use refit_tests::models;
use refit_translate::megatron::{self, ParamFacts, SourceRank, TrainerFacts, TrainerOptions};
use refit_translate::vllm::{Device, EngineFacts, LayerFacts, Written};
use refit_translate::{Reason, Refusal, Side, TensorSpec, TranslateError};

const PARAMETER: &str = "torch.nn.parameter.Parameter";
const LAYER: &str = "megatron.core.extensions.transformer_engine.TELayerNormColumnParallelLinear";
const NAME: &str = "decoder.layers.0.mlp.linear_fc1.weight";

fn trainer(change: impl FnOnce(&mut TrainerFacts)) -> Result<(), Refusal> {
    let mut facts = TrainerFacts::default();
    facts.params = vec![ParamFacts::new(NAME, PARAMETER, LAYER)];
    change(&mut facts);
    facts.check()
}

fn param(name: &str, class: &str, layer: &str) -> Result<(), Refusal> {
    trainer(|facts| facts.params.push(ParamFacts::new(name, class, layer)))
}

const LINEAR: &str = "vllm.model_executor.layers.linear.UnquantizedLinearMethod";
const EXPERTS: &str = "UnquantizedFusedMoEMethod";

fn engine(change: impl FnOnce(&mut EngineFacts)) -> Result<(), Refusal> {
    let mut facts = EngineFacts::default();
    facts.layers = vec![
        LayerFacts::new("model.embed_tokens", "UnquantizedEmbeddingMethod"),
        LayerFacts::new("model.layers.0.mlp.gate_up_proj", LINEAR),
        LayerFacts::new("model.layers.1.mlp.experts", EXPERTS).with_kernel("TRITON"),
    ];
    change(&mut facts);
    facts.check()
}

fn layer(layer: LayerFacts) -> Result<(), Refusal> {
    engine(|facts| facts.layers.push(layer))
}

fn experts(backend: &str) -> Result<(), Refusal> {
    layer(LayerFacts::new("model.layers.2.mlp.experts", EXPERTS).with_kernel(backend))
}

fn fp8(method: &str, kernel: &str) -> LayerFacts {
    LayerFacts::new("model.layers.2", method).with_kernel(kernel)
}

fn linear_fp8(kernel: &str) -> Result<(), Refusal> {
    layer(fp8("vllm.model_executor.layers.quantization.fp8.Fp8LinearMethod", kernel))
}

fn experts_fp8(backend: &str) -> Result<(), Refusal> {
    layer(fp8("Fp8MoEMethod", backend))
}

fn on(device: Device) -> Result<(), Refusal> {
    engine(|facts| {
        facts.device = device;
        facts.layers.truncate(2);
    })
}

fn synced(facts: &mut TrainerFacts) {
    (facts.overlap_param_gather, facts.params_synced) = (true, true);
}

#[test]
fn plain_trainers_and_engines_are_taken() {
    trainer(|_| {}).unwrap();
    trainer(synced).unwrap();
    trainer(|facts| facts.gtp_weight_remat_size = 1).unwrap();
    param("decoder.layers.0.mlp.router.expert_bias", "torch.Tensor", "TopKRouter").unwrap();
    param("decoder.layers.0.loran.weight", "Buffer", "").unwrap();
    trainer(|facts| {
        let mut blocks = ParamFacts::new(NAME, "Float8BlockwiseQTensor", LAYER);
        blocks.scaled_2d = true;
        facts.params.push(blocks);
    })
    .unwrap();

    engine(|_| {}).unwrap();
    experts("BATCHED_TRITON").unwrap();
    on(Device::Rocm).unwrap();
    for kernel in
        ["TritonFp8BlockScaledMMKernel", "scaled_mm.cutlass.CutlassFp8BlockScaledMMKernel"]
    {
        linear_fp8(kernel).unwrap();
    }
    experts_fp8("VLLM_CUTLASS").unwrap();
    experts_fp8("TRITON").unwrap();
}

/// Every reason there is, each by what reports it.
fn refused() -> Vec<(Reason, Result<(), Refusal>)> {
    use Reason as R;
    vec![
        (R::Adapter, param("decoder.layers.0.mlp.linear_fc1.to_wrap.weight", PARAMETER, LAYER)),
        (R::Adapter, param("linear_fc1.adapter.linear_in.weight", PARAMETER, LAYER)),
        (R::Adapter, param("linear_fc1.lora_A.weight", PARAMETER, LAYER)),
        (R::GtpWeights, trainer(|facts| facts.gtp_weight_remat_size = 2)),
        (R::GtpWeights, trainer(|facts| facts.params[0].gtp_weight_remat = true)),
        (R::MegatronFsdp, trainer(|facts| facts.megatron_fsdp = true)),
        (R::MegatronFsdp, param(NAME, "torch.distributed.tensor.DTensor", LAYER)),
        (R::QuantizedParam, param(NAME, "transformer_engine.pytorch.Float8Tensor", LAYER)),
        (R::QuantizedParam, param(NAME, "MXFP8Tensor", LAYER)),
        (R::QuantizedParam, param(NAME, "NVFP4Tensor", LAYER)),
        (R::BlocksOfRows, param(NAME, "Float8BlockwiseQTensor", LAYER)),
        (R::UnknownParamClass, param(NAME, "Int4Tensor", LAYER)),
        (R::UnknownParamClass, param(NAME, "", LAYER)),
        (R::SingleGroupedWeight, trainer(|facts| facts.moe_single_grouped_weight = true)),
        (R::SingleGroupedWeight, param(NAME, "GroupedTensor", LAYER)),
        (R::GluInterleave, trainer(|facts| facts.moe_mlp_glu_interleave_size = Some(32))),
        (R::GluInterleave, trainer(|facts| facts.moe_shared_expert_glu_interleave_size = Some(32))),
        (
            R::KitchenLinear,
            param(NAME, PARAMETER, "megatron.core.extensions.kitchen.KitchenLinear"),
        ),
        (R::OverlapParamGather, trainer(|facts| facts.overlap_param_gather = true)),
        (R::SharedGradBuffer, trainer(|facts| facts.reuse_grad_buf_for_mxfp8_param_ag = true)),
        (R::MoeFlashinferCutlass, experts("FLASHINFER_CUTLASS")),
        (R::MoeFlashinferTrtllm, experts("FlashInfer TRTLLM")),
        (R::MoeAiter, experts("ROCm AITER")),
        (R::MoeAiter, experts("AITER")),
        (R::MoeMoonep, experts("MOONEP")),
        (R::MoeXpu, experts("XPU")),
        (R::MoeCpu, experts("CPU")),
        (R::MoeUnknown, experts("OOT")),
        (R::MoeUnknown, layer(LayerFacts::new("model.layers.2.mlp.experts", EXPERTS))),
        (R::CpuLinear, on(Device::Cpu)),
        (R::XpuLinear, on(Device::Xpu)),
        (R::Marlin, layer(LayerFacts::new("q", "AutoAWQMarlinLinearMethod"))),
        (R::Marlin, linear_fp8("MarlinFP8ScaledMMLinearKernel")),
        (R::Marlin, experts_fp8("MARLIN")),
        (R::DeepGemm, linear_fp8("FlashInferFp8DeepGEMMDynamicBlockScaledKernel")),
        (R::DeepGemm, linear_fp8("DeepGemmFp8BlockScaledMMKernel")),
        (R::DeepGemm, experts_fp8("BATCHED_DEEPGEMM")),
        (R::MoeFlashinferCutlass, experts_fp8("FLASHINFER_CUTLASS")),
        (R::MoeUnknown, experts("VLLM_CUTLASS")),
        (R::QuantizedLayer, layer(LayerFacts::new("q", "Fp8LinearMethod"))),
        (R::QuantizedLayer, linear_fp8("CutlassFP8ScaledMMLinearKernel")),
        (R::QuantizedLayer, layer(LayerFacts::new("q", "ModelOptFp8LinearMethod"))),
        (
            R::QuantizedLayer,
            engine(|facts| {
                facts.device = Device::Rocm;
                facts.layers = vec![fp8("Fp8LinearMethod", "TritonFp8BlockScaledMMKernel")];
            }),
        ),
        (R::QuantizedLayer, layer(LayerFacts::new("q", ""))),
        (
            R::QuantizedCheckpoint,
            layer(LayerFacts::new("q", "q").with_written(Written::LoadTimeQuantized)),
        ),
        (R::Eplb, engine(|facts| facts.enable_eplb = true)),
        (R::Eplb, engine(|facts| facts.redundant_experts = 2)),
        (R::FusedSharedExperts, engine(|facts| facts.fused_shared_experts = true)),
    ]
}

#[test]
fn every_reason_is_refused_by_name() {
    let mut seen = BTreeSet::new();
    for (reason, result) in refused() {
        let refusal = result.expect_err(reason.name());
        assert_eq!(refusal.reason, reason, "{refusal}");
        let text = refusal.to_string();
        assert!(text.starts_with(&reason.side().to_string()), "{text}");
        assert!(text.contains(reason.when()) && text.ends_with(reason.instead()), "{text}");
        assert!(text.contains(&refusal.found), "{text}");
        seen.insert(reason);
    }
    assert_eq!(seen, Reason::ALL.iter().copied().collect());
}

/// What is processed anew after every refit may be on any kernel; where experts are may not change.
#[test]
fn load_time_tensors_are_free_of_kernels() {
    for written in [Written::LoadTime, Written::LoadTimeBlocks] {
        layer(LayerFacts::new("q", "Fp8LinearMethod").with_written(written)).unwrap();
        let experts = LayerFacts::new("e", EXPERTS).with_kernel("FLASHINFER_TRTLLM");
        assert!(!experts.keeps(Device::Cuda));
        layer(experts.clone().with_written(written)).unwrap();
        let moved = engine(|facts| {
            facts.layers.push(experts.with_written(written));
            facts.enable_eplb = true;
        });
        assert_eq!(moved.unwrap_err().reason, Reason::Eplb);
    }
}

/// What is written of a layer follows from where it keeps what it has loaded.
#[test]
fn a_layer_says_whether_it_keeps_what_it_has_loaded() {
    let linear = LayerFacts::new("q", LINEAR);
    assert!(linear.keeps(Device::Cuda) && !linear.keeps(Device::Cpu));
    // On a CPU a head keeps its weight, and computes with a packed copy of it.
    let head = LayerFacts::new("lm_head", "UnquantizedEmbeddingMethod");
    assert!(head.keeps(Device::Cuda) && !head.keeps(Device::Cpu));
    let written = linear.with_written(Written::LoadTimeQuantized);
    assert!(written.keeps(Device::Cuda), "it is about the live tensors");
    assert_eq!(layer(written).unwrap_err().reason, Reason::QuantizedCheckpoint);
}

/// Adapters need not be reported: their names are enough.
#[test]
fn adapters_are_refused_by_their_names() {
    let config = models::tiny();
    let rank = SourceRank::new(0, vec![0, 1]);
    let held = megatron::expected(&config, &rank, &TrainerOptions::default()).unwrap();
    for name in ["adapter.linear_in.weight", "to_wrap.weight", "lora_B.weight"] {
        let name = format!("decoder.layers.0.mlp.linear_fc2.{name}");
        let mut held = held.clone();
        held.push(TensorSpec::new(name.as_str(), Dtype::Bf16, [1]));
        let error = megatron::layout(&config, &rank, &held).unwrap_err();
        let TranslateError::Refused(refusal) = error else { panic!("{error}") };
        assert_eq!((refusal.reason, refusal.found), (Reason::Adapter, format!("`{name}`")));
    }
}

/// The tables of `docs/support.md` are made of the reasons.
#[test]
fn the_documentation_lists_every_reason() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/support.md");
    let text = std::fs::read_to_string(path).unwrap();
    for side in [Side::Megatron, Side::Vllm] {
        let mut table = String::from("| refused | do this | reason |\n|---|---|---|\n");
        for reason in Reason::ALL.iter().filter(|reason| reason.side() == side) {
            table +=
                &format!("| {} | {} | `{}` |\n", reason.when(), reason.instead(), reason.name());
        }
        let end = table.clone() + "\n";
        assert!(text.contains(&end), "docs/support.md must have this table for {side}:\n{table}");
    }
}
