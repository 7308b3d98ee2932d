//! What an engine says about itself that names and shapes do not.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::{Reason, Refusal};

/// What an engine runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// NVIDIA.
    #[default]
    Cuda,
    /// AMD.
    Rocm,
    /// No accelerator.
    Cpu,
    /// Intel.
    Xpu,
}

/// How an engine keeps what it has loaded, under vLLM's names.
///
/// Start from the default, an unquantised dense model on CUDA, and report what is the case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineFacts {
    /// What it runs on.
    pub device: Device,
    /// `enable_eplb`.
    pub enable_eplb: bool,
    /// `num_redundant_experts`.
    pub redundant_experts: u32,
    /// Whether shared experts are folded into the routed ones.
    pub fused_shared_experts: bool,
    /// Every layer that has parameters and a `quant_method`.
    pub layers: Vec<LayerFacts>,
}

/// Which tensors of a layer are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Written {
    /// The live ones, which the kernel reads.
    #[default]
    Live,
    /// Such as a checkpoint is loaded into, in the model's type. The engine processes them
    /// (`process_weights_after_loading`) after every refit, so kernels do not matter.
    LoadTime,
    /// The same where the checkpoint has e4m3 elements and a scale for each block of them, which the layout asks for by
    /// name and type.
    LoadTimeBlocks,
    /// The same where the checkpoint has elements that were quantised in another way.
    LoadTimeQuantized,
}

/// What an engine says about one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerFacts {
    /// vLLM's name.
    pub name: String,
    /// The class of its `quant_method`, with or without its module: `UnquantizedLinearMethod`.
    pub quant_method: String,
    /// The kernel, of experts and of blockwise FP8. Of experts, `unquantized_backend` or `fp8_backend` of their
    /// `quant_method`, by name (`TRITON`) or value; of a linear layer, the class of `quant_method.fp8_linear`.
    pub kernel: Option<String>,
    /// What is written of it.
    pub written: Written,
}

impl LayerFacts {
    /// A layer that `quant_method` looks after, and whose live tensors are written.
    #[must_use]
    pub fn new(name: impl Into<String>, quant_method: impl Into<String>) -> Self {
        let (name, quant_method) = (name.into(), quant_method.into());
        Self { name, quant_method, kernel: None, written: Written::Live }
    }

    /// This layer on this kernel.
    #[must_use]
    pub fn with_kernel(mut self, kernel: impl Into<String>) -> Self {
        self.kernel = Some(kernel.into());
        self
    }

    /// This layer with these of its tensors written.
    #[must_use]
    pub fn with_written(mut self, written: Written) -> Self {
        self.written = written;
        self
    }

    /// Whether the live tensors are known to be as they were loaded. What is not has to be processed anew after every
    /// refit, whether it is refused for that or [written](Written) as it is loaded.
    #[must_use]
    pub fn keeps(&self, device: Device) -> bool {
        self.kernel_reason(device).is_none()
    }

    fn check(&self, device: Device) -> Result<(), Refusal> {
        let reason = match self.written {
            Written::Live => self.kernel_reason(device),
            Written::LoadTime | Written::LoadTimeBlocks => None,
            Written::LoadTimeQuantized => Some(Reason::QuantizedCheckpoint),
        };
        let Some(reason) = reason else { return Ok(()) };
        let Self { name, quant_method, kernel, .. } = self;
        let kernel = kernel.as_ref().map(|kernel| format!(" on {kernel}")).unwrap_or_default();
        Err(Refusal::new(reason, format!("`{name}` of {quant_method}{kernel}")))
    }

    /// Why live tensors are not to be written; `None` where they stay as they were loaded.
    fn kernel_reason(&self, device: Device) -> Option<Reason> {
        match last(&self.quant_method) {
            // A head on a CPU computes with a packed copy.
            "UnquantizedEmbeddingMethod" => (device == Device::Cpu).then_some(Reason::CpuLinear),
            "UnquantizedLinearMethod" => match device {
                Device::Cuda | Device::Rocm => None,
                Device::Cpu => Some(Reason::CpuLinear),
                Device::Xpu => Some(Reason::XpuLinear),
            },
            "UnquantizedFusedMoEMethod" => self.experts(&["TRITON", "BATCHED_TRITON"]),
            // On other devices FP8 is another format.
            "Fp8LinearMethod" if device == Device::Cuda => self.blockwise(),
            "Fp8MoEMethod" if device == Device::Cuda => {
                self.experts(&["TRITON", "BATCHED_TRITON", "VLLM_CUTLASS", "BATCHED_VLLM_CUTLASS"])
            }
            method if method.contains("Marlin") => Some(Reason::Marlin),
            _ => Some(Reason::QuantizedLayer),
        }
    }

    /// Of experts, unless they run on one of these.
    fn experts(&self, taken: &[&str]) -> Option<Reason> {
        let backend = self.kernel.as_deref().unwrap_or_default();
        match backend.to_ascii_uppercase().replace(' ', "_").as_str() {
            backend if taken.contains(&backend) => None,
            "FLASHINFER_CUTLASS" => Some(Reason::MoeFlashinferCutlass),
            "FLASHINFER_TRTLLM" => Some(Reason::MoeFlashinferTrtllm),
            "AITER" | "ROCM_AITER" => Some(Reason::MoeAiter),
            "MOONEP" => Some(Reason::MoeMoonep),
            "XPU" => Some(Reason::MoeXpu),
            "CPU" => Some(Reason::MoeCpu),
            "DEEPGEMM" | "BATCHED_DEEPGEMM" => Some(Reason::DeepGemm),
            "MARLIN" => Some(Reason::Marlin),
            _ => Some(Reason::MoeUnknown),
        }
    }

    /// Of a linear layer in FP8: kernels of blocks keep what they load, but for some.
    fn blockwise(&self) -> Option<Reason> {
        match last(self.kernel.as_deref().unwrap_or_default()) {
            "CutlassFp8BlockScaledMMKernel"
            | "TritonFp8BlockScaledMMKernel"
            | "BlockWiseTorchFP8ScaledMMLinearKernel" => None,
            kernel if kernel.to_ascii_lowercase().contains("deepgemm") => Some(Reason::DeepGemm),
            kernel if kernel.contains("Marlin") => Some(Reason::Marlin),
            _ => Some(Reason::QuantizedLayer),
        }
    }
}

/// A class without its module.
fn last(class: &str) -> &str {
    class.rsplit('.').next().unwrap_or_default()
}

impl EngineFacts {
    /// Whether the tensors that are written are laid out as names and shapes say, and stay so.
    ///
    /// # Errors
    /// A [`Refusal`] for a [`Reason`] that is the engine's, the first one found.
    pub fn check(&self) -> Result<(), Refusal> {
        if self.enable_eplb {
            return Err(Refusal::new(Reason::Eplb, "enable_eplb"));
        }
        if self.redundant_experts > 0 {
            return Err(Refusal::new(Reason::Eplb, "num_redundant_experts"));
        }
        if self.fused_shared_experts {
            return Err(Refusal::new(Reason::FusedSharedExperts, ""));
        }
        self.layers.iter().try_for_each(|layer| layer.check(self.device))
    }
}
