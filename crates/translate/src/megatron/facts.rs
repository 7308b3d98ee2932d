//! What a trainer says about itself that names and shapes do not.

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::{Reason, Refusal};

/// Settings of a trainer and classes of its parameters, under Megatron-Core's names.
///
/// Start from the default, a trainer with none of these features, and report what is the case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TrainerFacts {
    /// `use_megatron_fsdp`.
    pub megatron_fsdp: bool,
    /// `gtp_weight_remat_size`; 0 and 1 are off.
    pub gtp_weight_remat_size: u32,
    /// `moe_single_grouped_weight`.
    pub moe_single_grouped_weight: bool,
    /// `moe_mlp_glu_interleave_size`.
    pub moe_mlp_glu_interleave_size: Option<u32>,
    /// `moe_shared_expert_glu_interleave_size`.
    pub moe_shared_expert_glu_interleave_size: Option<u32>,
    /// `overlap_param_gather`.
    pub overlap_param_gather: bool,
    /// Whether parameters are complete in spite of it when they are published: the trainer has forced the sync and
    /// taken its forward hooks off.
    pub params_synced: bool,
    /// `reuse_grad_buf_for_mxfp8_param_ag`.
    pub reuse_grad_buf_for_mxfp8_param_ag: bool,
    /// The parameters that are published.
    pub params: Vec<ParamFacts>,
}

/// What a trainer says about one parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ParamFacts {
    /// Megatron-Core's name.
    pub name: Arc<str>,
    /// The class of the tensor, with or without its module: `torch.nn.parameter.Parameter`.
    pub class: String,
    /// The class of the layer that holds it, with or without its module.
    pub layer: String,
    /// `is_gtp_weight_remat`.
    pub gtp_weight_remat: bool,
    /// Of a blockwise FP8 tensor: `_is_2D_scaled`.
    pub scaled_2d: bool,
}

impl ParamFacts {
    /// A parameter of this name and class in a layer of this class.
    #[must_use]
    pub fn new(
        name: impl Into<Arc<str>>,
        class: impl Into<String>,
        layer: impl Into<String>,
    ) -> Self {
        let (name, class, layer) = (name.into(), class.into(), layer.into());
        Self { name, class, layer, gtp_weight_remat: false, scaled_2d: false }
    }

    fn check(&self) -> Result<(), Refusal> {
        let Self { name, class, layer, .. } = self;
        let refuse =
            |reason, class: &str| Err(Refusal::new(reason, format!("`{name}` of class {class}")));
        check_name(name)?;
        if self.gtp_weight_remat {
            return refuse(Reason::GtpWeights, class);
        }
        if layer.to_ascii_lowercase().contains("kitchen") {
            return refuse(Reason::KitchenLinear, layer);
        }
        match class.rsplit('.').next().unwrap_or_default() {
            "Parameter" | "Tensor" | "Buffer" => Ok(()),
            "Float8BlockwiseQTensor" if self.scaled_2d => Ok(()),
            "Float8BlockwiseQTensor" => refuse(Reason::BlocksOfRows, class),
            "Float8Tensor" | "MXFP8Tensor" | "NVFP4Tensor" | "QuantizedTensor" => {
                refuse(Reason::QuantizedParam, class)
            }
            "GroupedTensor" => refuse(Reason::SingleGroupedWeight, class),
            "DTensor" => refuse(Reason::MegatronFsdp, class),
            _ => refuse(Reason::UnknownParamClass, class),
        }
    }
}

impl TrainerFacts {
    /// Whether parameters are what names and shapes say, and complete.
    ///
    /// Blockwise FP8 with blocks of two dimensions passes: its element type is not the model's, so
    /// [`layout`](super::layout) sees it.
    ///
    /// # Errors
    /// A [`Refusal`] for a [`Reason`] that is the trainer's, the first one found.
    pub fn check(&self) -> Result<(), Refusal> {
        let on = [
            (self.megatron_fsdp, Reason::MegatronFsdp, "use_megatron_fsdp"),
            (self.gtp_weight_remat_size > 1, Reason::GtpWeights, "gtp_weight_remat_size"),
            (
                self.moe_single_grouped_weight,
                Reason::SingleGroupedWeight,
                "moe_single_grouped_weight",
            ),
            (
                self.moe_mlp_glu_interleave_size.is_some(),
                Reason::GluInterleave,
                "moe_mlp_glu_interleave_size",
            ),
            (
                self.moe_shared_expert_glu_interleave_size.is_some(),
                Reason::GluInterleave,
                "moe_shared_expert_glu_interleave_size",
            ),
            (
                self.overlap_param_gather && !self.params_synced,
                Reason::OverlapParamGather,
                "overlap_param_gather",
            ),
            (
                self.reuse_grad_buf_for_mxfp8_param_ag,
                Reason::SharedGradBuffer,
                "reuse_grad_buf_for_mxfp8_param_ag",
            ),
        ];
        if let Some((_, reason, setting)) = on.into_iter().find(|(on, _, _)| *on) {
            return Err(Refusal::new(reason, setting));
        }
        self.params.iter().try_for_each(ParamFacts::check)
    }
}

/// Refuses names that only adapters have.
pub(super) fn check_name(name: &str) -> Result<(), Refusal> {
    let betrays = |part: &str| part == "to_wrap" || part == "adapter" || part.starts_with("lora_");
    if name.split('.').any(betrays) {
        return Err(Refusal::new(Reason::Adapter, format!("`{name}`")));
    }
    Ok(())
}
