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
    /// Whether the tensors that are written are not the live ones but as a checkpoint is loaded, and the engine
    /// processes them (`process_weights_after_loading`) after every refit. Then kernels do not matter.
    pub load_time: bool,
    /// `enable_eplb`.
    pub enable_eplb: bool,
    /// `num_redundant_experts`.
    pub redundant_experts: u32,
    /// Whether shared experts are folded into the routed ones.
    pub fused_shared_experts: bool,
    /// Every layer that has parameters and a `quant_method`.
    pub layers: Vec<LayerFacts>,
}

/// What an engine says about one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerFacts {
    /// vLLM's name.
    pub name: String,
    /// The class of its `quant_method`, with or without its module: `UnquantizedLinearMethod`.
    pub quant_method: String,
    /// Of experts, `quant_method.unquantized_backend`: the name (`TRITON`) or the value of the enumeration.
    pub moe_backend: Option<String>,
}

impl LayerFacts {
    /// A layer that `quant_method` looks after.
    #[must_use]
    pub fn new(name: impl Into<String>, quant_method: impl Into<String>) -> Self {
        Self { name: name.into(), quant_method: quant_method.into(), moe_backend: None }
    }

    /// This layer of experts on these kernels.
    #[must_use]
    pub fn with_moe_backend(mut self, backend: impl Into<String>) -> Self {
        self.moe_backend = Some(backend.into());
        self
    }

    fn check(&self, device: Device) -> Result<(), Refusal> {
        let reason = match self.quant_method.rsplit('.').next().unwrap_or_default() {
            "UnquantizedEmbeddingMethod" => return Ok(()),
            "UnquantizedLinearMethod" => match device {
                Device::Cuda | Device::Rocm => return Ok(()),
                Device::Cpu => Reason::CpuLinear,
                Device::Xpu => Reason::XpuLinear,
            },
            "UnquantizedFusedMoEMethod" => match self.moe_reason() {
                None => return Ok(()),
                Some(reason) => reason,
            },
            method if method.contains("Marlin") => Reason::Marlin,
            _ => Reason::QuantizedLayer,
        };
        let Self { name, quant_method, moe_backend } = self;
        let backend = moe_backend.as_ref().map(|backend| format!(" on {backend}"));
        let found = format!("`{name}` of {quant_method}{}", backend.unwrap_or_default());
        Err(Refusal::new(reason, found))
    }

    /// Why kernels of unquantised experts are refused; `None` where they take experts as they are loaded.
    fn moe_reason(&self) -> Option<Reason> {
        let backend = self.moe_backend.as_deref().unwrap_or_default();
        match backend.to_ascii_uppercase().replace(' ', "_").as_str() {
            "TRITON" | "BATCHED_TRITON" => None,
            "FLASHINFER_CUTLASS" => Some(Reason::MoeFlashinferCutlass),
            "FLASHINFER_TRTLLM" => Some(Reason::MoeFlashinferTrtllm),
            "AITER" | "ROCM_AITER" => Some(Reason::MoeAiter),
            "MOONEP" => Some(Reason::MoeMoonep),
            "XPU" => Some(Reason::MoeXpu),
            "CPU" => Some(Reason::MoeCpu),
            _ => Some(Reason::MoeUnknown),
        }
    }
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
        if self.load_time {
            return Ok(());
        }
        self.layers.iter().try_for_each(|layer| layer.check(self.device))
    }
}
