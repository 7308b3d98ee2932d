//! GPT-OSS in bf16: biases everywhere, a learned sink per head, routed experts in every layer.
//!
//! # Logical tensors of experts
//!
//! A checkpoint has one tensor for all experts of a layer, transposed and interleaved: `gate_up_proj` is `[experts,
//! hidden, 2 * intermediate]` with gate in even columns and up in odd ones, `down_proj` is `[experts, intermediate,
//! hidden]`. Both frameworks hold an expert's matrices the other way round, with a row per output. Bands cannot
//! transpose and need not: nothing asks that a logical tensor be one of the checkpoint's, only that both sides mean the
//! same by it. So expert `e` has
//!
//! | logical tensor | rows, columns | in the checkpoint |
//! |---|---|---|
//! | `mlp.experts.{e}.gate_proj.weight` | intermediate, hidden | `gate_up_proj[e, :, 0::2]`, transposed |
//! | `mlp.experts.{e}.up_proj.weight` | intermediate, hidden | `gate_up_proj[e, :, 1::2]`, transposed |
//! | `mlp.experts.{e}.down_proj.weight` | hidden, intermediate | `down_proj[e]`, transposed |
//! | `mlp.experts.{e}.gate_proj.bias`, `.up_proj.bias` | intermediate | `gate_up_proj_bias[e, 0::2]`, `[e, 1::2]` |
//! | `mlp.experts.{e}.down_proj.bias` | hidden | `down_proj_bias[e]` |
//!
//! The trainer holds `[gate; up]`, the engine their rows in turn ([`InterleavedMlp`]).

use alloc::format;
use alloc::string::String;

use super::blocks::experts::{self, Experts, PerExpert};
use super::{Description, blocks};
use crate::roles::{Column, FirstRank, GatedMlp, InterleavedMlp, Row};
use crate::slots::{Layer, Place, Slots, te};
use crate::{ModelConfig, TranslateError};

pub(super) const GPT_OSS: Description = Description {
    architecture: "GptOssForCausalLM",
    model_type: "gpt_oss",
    fixed: |config| config.qkv_bias = true,
    #[cfg(feature = "serde")]
    read: json::read,
    check,
    first,
    layer,
    last,
};

const EXPERTS: Experts = Experts { router: "router", ..Experts::MLP };
const HEADS: &str = "num_attention_heads";
const INTERMEDIATE: &str = "intermediate_size";

fn check(config: &ModelConfig) -> Result<(), TranslateError> {
    config.check_attention()?;
    if config.tied {
        let why = "vLLM gives GPT-OSS a head of its own, whatever is said";
        return Err(TranslateError::Combination { what: "GPT-OSS with a tied head", why });
    }
    experts::routed_in_every_layer(config).map(|_| ())
}

fn first(config: &ModelConfig, slots: &mut Slots) -> Result<(), TranslateError> {
    slots.pair(
        blocks::vocab(config),
        [blocks::EMBEDDING],
        "embedding.word_embeddings.weight",
        "model.embedding.weight",
    );
    Ok(())
}

fn last(config: &ModelConfig, slots: &mut Slots) -> Result<(), TranslateError> {
    blocks::head(config, slots);
    Ok(())
}

fn layer(config: &ModelConfig, _: Layer, slots: &mut Slots) -> Result<(), TranslateError> {
    engine_takes(config, slots)?;
    attention(config, slots);
    EXPERTS.router(config, slots)?;
    let experts = config.moe()?.experts;
    slots.pair(blocks::norm(experts), ["mlp.router.bias"], "mlp.router.bias", "mlp.router.bias");
    routed(config, slots)
}

/// vLLM's class divides KV heads by its tensor-parallel size without copying any, and asks that all ranks divide the
/// intermediate size even where they do not share it out.
fn engine_takes(config: &ModelConfig, slots: &Slots) -> Result<(), TranslateError> {
    let Place::Target(at) = slots.place() else { return Ok(()) };
    at.tp.cut("num_key_value_heads", config.num_kv_heads)?;
    at.flat.cut(INTERMEDIATE, config.moe()?.intermediate_size)?;
    Ok(())
}

fn attention(config: &ModelConfig, slots: &mut Slots) {
    let hidden = config.hidden_size;
    let heads = config.num_heads.saturating_mul(config.head_dim);
    slots.pair(
        blocks::norm(hidden),
        ["input_layernorm.weight"],
        te("self_attention.linear_qkv.layer_norm_weight").local("input_layernorm.weight"),
        "input_layernorm.weight",
    );
    for (cols, kind) in [(Some(hidden), "weight"), (None, "bias")] {
        slots.pair(
            blocks::qkv(config, cols),
            ["q", "k", "v"].map(|of| format!("self_attn.{of}_proj.{kind}")),
            format!("self_attention.linear_qkv.{kind}"),
            format!("attn.qkv_proj.{kind}"),
        );
    }
    slots.pair(
        Row { rows: hidden, what: "num_attention_heads * head_dim", cols: heads },
        ["self_attn.o_proj.weight"],
        "self_attention.linear_proj.weight",
        "attn.o_proj.weight",
    );
    // Whole on every rank of both sides; the engine's first rank alone adds it.
    slots.pair(
        blocks::norm(hidden),
        ["self_attn.o_proj.bias"],
        "self_attention.linear_proj.bias",
        "attn.o_proj.bias",
    );
    slots.pair(
        Column { what: HEADS, rows: config.num_heads, cols: None },
        ["self_attn.sinks"],
        "self_attention.core_attention.softmax_offset",
        "attn.sinks",
    );
}

fn routed(config: &ModelConfig, slots: &mut Slots) -> Result<(), TranslateError> {
    let (moe, hidden) = (config.moe()?, config.hidden_size);
    let (what, intermediate) = (INTERMEDIATE, moe.intermediate_size);
    let of =
        |expert: u64, projection: &str| -> String { format!("mlp.experts.{expert}.{projection}") };
    for (cols, kind, w13) in [
        (Some(hidden), "weight", PerExpert { linear: "linear_fc1.weight", fused: "w13_weight" }),
        (None, "bias", PerExpert { linear: "linear_fc1.bias", fused: "w13_bias" }),
    ] {
        let logical = |e| ["gate_proj", "up_proj"].map(|half| of(e, &format!("{half}.{kind}")));
        let source = GatedMlp { what, intermediate, cols };
        let target = InterleavedMlp { what, intermediate, cols };
        w13.slots(moe, "mlp.", source, target, logical, slots)?;
    }
    let fc2 = Row { rows: hidden, what, cols: intermediate };
    let weight = PerExpert { linear: "linear_fc2.weight", fused: "w2_weight" };
    weight.slots(moe, "mlp.", fc2, fc2, |e| [of(e, "down_proj.weight")], slots)?;
    let bias = PerExpert { linear: "linear_fc2.bias", fused: "w2_bias" };
    let (source, target) = (blocks::norm(hidden), FirstRank { rows: hidden });
    bias.slots(moe, "mlp.", source, target, |e| [of(e, "down_proj.bias")], slots)
}

#[cfg(feature = "serde")]
mod json {
    use serde::Deserialize;

    use crate::config::json::{Json, refusal, required};
    use crate::{ModelConfig, Moe, TranslateError};

    #[derive(Deserialize)]
    struct Keys {
        /// Of one expert.
        intermediate_size: Option<u64>,
        num_local_experts: Option<u64>,
        num_key_value_heads: Option<u64>,
        head_dim: Option<u64>,
        attention_bias: Option<bool>,
    }

    pub(super) fn read(json: &Json<'_>, config: &mut ModelConfig) -> Result<(), TranslateError> {
        let keys: Keys = json.keys()?;
        if keys.attention_bias == Some(false) {
            let why = "vLLM gives all attention projections of GPT-OSS a bias";
            return Err(refusal("attention_bias", false, why));
        }
        config.num_kv_heads = required(keys.num_key_value_heads, "num_key_value_heads")?;
        config.head_dim = required(keys.head_dim, "head_dim")?;
        config.moe = Some(Moe::new(
            required(keys.num_local_experts, "num_local_experts")?,
            required(keys.intermediate_size, "intermediate_size")?,
        ));
        Ok(())
    }
}
