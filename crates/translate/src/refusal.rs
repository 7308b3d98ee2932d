//! What is refused although its names and shapes are those of a plain model.

use alloc::string::String;
use core::fmt;

use crate::Side;

/// Lists the reasons once: the variant, the side, when it applies, and what to do instead. Errors and
/// `docs/support.md` say the same words.
macro_rules! reasons {
    ($($(#[$doc:meta])* $reason:ident: $side:ident, $when:literal => $instead:literal,)*) => {
        /// Why a trainer or an engine is refused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Reason {
            $($(#[$doc])* $reason,)*
        }

        impl Reason {
            /// Every reason.
            pub const ALL: &[Self] = &[$(Self::$reason,)*];

            /// The name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$reason => stringify!($reason),)*
                }
            }

            /// Whose settings it is about.
            #[must_use]
            pub const fn side(self) -> Side {
                match self {
                    $(Self::$reason => Side::$side,)*
                }
            }

            /// What is the case.
            #[must_use]
            pub const fn when(self) -> &'static str {
                match self {
                    $(Self::$reason => $when,)*
                }
            }

            /// What to change.
            #[must_use]
            pub const fn instead(self) -> &'static str {
                match self {
                    $(Self::$reason => $instead,)*
                }
            }
        }
    };
}

reasons! {
    /// A parameter of an adapter, or the base weight under one.
    Adapter: Megatron, "a parameter belongs to an adapter (`to_wrap`, `adapter`, `lora_`)"
        => "merge adapters into the weights they adapt before publishing",
    /// Parameters are cut once more and padded.
    GtpWeights: Megatron, "weights are sharded for rematerialisation too (`gtp_weight_remat_size` > 1)"
        => "set gtp_weight_remat_size to 1",
    /// Parameters are `DTensor`s.
    MegatronFsdp: Megatron, "parameters are shards of Megatron-FSDP (`DTensor`)"
        => "train with Megatron's own data parallelism; its distributed optimiser is fine",
    /// A parameter of Transformer Engine's in FP8, MXFP8 or NVFP4.
    QuantizedParam: Megatron, "a parameter is quantised (Transformer Engine's FP8, MXFP8, NVFP4 classes)"
        => "keep parameters in bf16 (fp8_param off) and quantise in the forward pass only",
    /// A parameter in blockwise FP8 whose blocks are rows.
    BlocksOfRows: Megatron, "a parameter is in blockwise FP8 with blocks of one dimension"
        => "scale weights in blocks of two dimensions, or keep parameters in bf16 (fp8_param off)",
    /// A parameter of a class that nobody has described.
    UnknownParamClass: Megatron, "a parameter is of a class whose memory is not described"
        => "publish plain torch parameters",
    /// All experts of a layer in one `GroupedTensor`.
    SingleGroupedWeight: Megatron, "experts of a layer are one grouped tensor (`moe_single_grouped_weight`)"
        => "set moe_single_grouped_weight to false",
    /// Gate and up rows in turn.
    GluInterleave: Megatron, "gate and up rows are interleaved (`moe_mlp_glu_interleave_size`, `moe_shared_expert_glu_interleave_size`)"
        => "leave both interleave sizes unset",
    /// Layers of the kitchen extension.
    KitchenLinear: Megatron, "a layer is one of the kitchen extension"
        => "use Transformer Engine's or Megatron's local layers",
    /// Parameters are completed by the next forward pass.
    OverlapParamGather: Megatron, "parameters are gathered during the next forward pass (`overlap_param_gather`), so readers may see half of an update"
        => "finish the parameter sync and take the forward hooks off before publishing, and report it; or set overlap_param_gather to false",
    /// Parameters and gradients share memory.
    SharedGradBuffer: Megatron, "parameters share memory with gradients (`reuse_grad_buf_for_mxfp8_param_ag`)"
        => "set reuse_grad_buf_for_mxfp8_param_ag to false",
    /// `[up; gate]`.
    MoeFlashinferCutlass: Vllm, "experts run on FlashInfer's CUTLASS kernels, which swap gate and up"
        => "start the engine with moe_backend=\"triton\", or give the engine load-time tensors and have it process them again after every refit",
    /// Padded, permuted, in blocks.
    MoeFlashinferTrtllm: Vllm, "experts run on FlashInfer's TRTLLM kernels, which pad and permute rows in place, in the same shape"
        => "start the engine with moe_backend=\"triton\", or give the engine load-time tensors and have it process them again after every refit",
    /// Shuffled.
    MoeAiter: Vllm, "experts run on AITER, which shuffles them"
        => "start the engine with moe_backend=\"triton\" and AITER's experts off, or give the engine load-time tensors and have it process them again after every refit",
    /// Split.
    MoeMoonep: Vllm, "experts run on MOONEP, which splits them into other tensors"
        => "start the engine with moe_backend=\"triton\", or give the engine load-time tensors and have it process them again after every refit",
    /// Transposed.
    MoeXpu: Vllm, "experts run on XPU kernels, which transpose them"
        => "give the engine load-time tensors and have it process them again after every refit",
    /// Packed.
    MoeCpu: Vllm, "experts run on CPU kernels, which pack them"
        => "give the engine load-time tensors and have it process them again after every refit",
    /// A backend that nobody has described, or that was not reported.
    MoeUnknown: Vllm, "the kernels of experts are not described, or were not reported"
        => "report their backend, and start the engine with moe_backend=\"triton\", or give the engine load-time tensors and have it process them again after every refit",
    /// Emptied after loading.
    CpuLinear: Vllm, "linear layers or heads run on a CPU, where loading packs their weights"
        => "give the engine load-time tensors and have it process them again after every refit",
    /// Perhaps transposed.
    XpuLinear: Vllm, "linear layers run on an XPU, where loading may transpose their weights"
        => "give the engine load-time tensors and have it process them again after every refit",
    /// Scales in another layout, weights perhaps requantised.
    DeepGemm: Vllm, "a layer runs on DeepGEMM, which lays scales out anew and may requantise weights"
        => "turn DeepGEMM off (VLLM_USE_DEEP_GEMM=0), or give the engine load-time tensors and have it process them again after every refit",
    /// Repacked.
    Marlin: Vllm, "a layer is packed for Marlin kernels"
        => "serve the model unquantised, or give the engine load-time tensors and have it process them again after every refit",
    /// Requantised, transposed or repacked.
    QuantizedLayer: Vllm, "a layer is quantised, and its live tensors are not the checkpoint's"
        => "serve the model unquantised, or give the engine load-time tensors and have it process them again after every refit",
    /// Not what a trainer publishes.
    QuantizedCheckpoint: Vllm, "a layer loads what its checkpoint has quantised, which a trainer in bf16 does not publish"
        => "start the engine from the unquantised checkpoint and have it quantise that as it loads (quantization=\"fp8_per_tensor\", say), or serve it unquantised",
    /// Experts move between slots.
    Eplb: Vllm, "expert load balancing moves experts between slots while the engine runs, or has redundant ones"
        => "start the engine without enable_eplb and without redundant experts",
    /// Folded into the routed ones.
    FusedSharedExperts: Vllm, "shared experts are folded into the routed ones"
        => "turn the fusion of shared experts off (VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0)",
}

/// What was reported, and why it is refused.
///
/// What a trainer or an engine says about itself is checked by
/// [`TrainerFacts::check`](crate::megatron::TrainerFacts::check) and
/// [`EngineFacts::check`](crate::vllm::EngineFacts::check).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{}: {}; {}", .reason.side(), Found(.found), .reason.when(), .reason.instead())]
#[non_exhaustive]
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// The setting, parameter or layer; empty where it is all of it.
    pub found: String,
}

impl Refusal {
    pub(crate) fn new(reason: Reason, found: impl Into<String>) -> Self {
        Self { reason, found: found.into() }
    }
}

/// `, found`, if something was.
struct Found<'a>(&'a str);

impl fmt::Display for Found<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, ", {}", self.0) }
    }
}
