//! Reading `config.json`.

use alloc::borrow::ToOwned;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use refit_planner::Dtype;
use serde::Deserialize;
use serde_json::Value;

use super::{Family, ModelConfig};
use crate::TranslateError;

/// The keys that matter, as transformers writes them. `null` and absent are the same everywhere but where noted.
#[derive(Deserialize)]
struct Raw {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    hidden_size: Option<u64>,
    intermediate_size: Option<u64>,
    num_hidden_layers: Option<u32>,
    num_attention_heads: Option<u64>,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    vocab_size: Option<u64>,
    tie_word_embeddings: Option<bool>,
    /// The name since transformers 4.56.
    dtype: Option<String>,
    /// The name before.
    torch_dtype: Option<String>,
    /// Llama, Mistral, Qwen3: a bias on Q, K, V and O.
    attention_bias: Option<bool>,
    /// Llama: a bias on gate, up and down.
    mlp_bias: Option<bool>,
    /// Qwen2 derivatives: whether Q, K and V have a bias; vLLM reads it too, its default is true.
    qkv_bias: Option<bool>,
    /// Qwen2 derivatives with norms on Q and K.
    qk_norm: Option<bool>,
    quantization_config: Option<Value>,
}

/// Real ones have a few thousand; what is read of an unknown `quantization_config` takes up to 40 times its text.
const MAX_TEXT_BYTES: usize = 1 << 20;

pub(super) fn read(text: &str) -> Result<ModelConfig, TranslateError> {
    if text.len() > MAX_TEXT_BYTES {
        let (what, limit) = ("bytes of config.json", MAX_TEXT_BYTES as u64);
        return Err(TranslateError::TooLarge { what, limit });
    }
    let raw: Raw = serde_json::from_str(text).map_err(|error| TranslateError::Json {
        line: error.line(),
        column: error.column(),
        message: error.to_string(),
    })?;
    let family = family(&raw)?;
    refuse(&raw, family)?;

    let mut config = ModelConfig::new(family);
    config.dtype = dtype(&raw)?;
    config.hidden_size = required(raw.hidden_size, "hidden_size")?;
    config.intermediate_size = required(raw.intermediate_size, "intermediate_size")?;
    config.num_layers = required(raw.num_hidden_layers, "num_hidden_layers")?;
    config.num_heads = required(raw.num_attention_heads, "num_attention_heads")?;
    config.num_kv_heads = kv_heads(&raw, family, config.num_heads)?;
    config.head_dim = head_dim(&raw, family, &config)?;
    config.vocab_size = required(raw.vocab_size, "vocab_size")?;
    // All four families have `false` as their class default, so files may leave it out.
    config.tied = raw.tie_word_embeddings.unwrap_or(false);
    if let (Family::Qwen2, Some(bias)) = (family, raw.qkv_bias) {
        config.qkv_bias = bias;
    }
    config.validate()?;
    Ok(config)
}

fn required<T>(value: Option<T>, key: &'static str) -> Result<T, TranslateError> {
    value.ok_or(TranslateError::MissingKey { key })
}

/// The architecture says more than the model type: a reward model has its model type but another head.
fn family(raw: &Raw) -> Result<Family, TranslateError> {
    let architecture = raw.architectures.as_ref().and_then(|list| list.first());
    let name = architecture.or(raw.model_type.as_ref());
    Family::from_name(name.ok_or(TranslateError::MissingKey { key: "architectures" })?)
}

fn refuse(raw: &Raw, family: Family) -> Result<(), TranslateError> {
    let refusal = |key, value: &dyn ToString, why| {
        Err(TranslateError::UnsupportedConfig { key, value: value.to_string(), why })
    };
    if let Some(quantization) = &raw.quantization_config {
        let method = quantization.get("quant_method").unwrap_or(quantization);
        return refusal(
            "quantization_config",
            method,
            "quantised engine parameters are requantised or repacked after loading",
        );
    }
    let projections = "only Q, K and V may have a bias in this family";
    if raw.attention_bias == Some(true) {
        return refusal("attention_bias", &true, projections);
    }
    if raw.mlp_bias == Some(true) {
        return refusal("mlp_bias", &true, projections);
    }
    if let (Some(norm), true) = (raw.qk_norm, family != Family::Qwen3)
        && norm
    {
        return refusal("qk_norm", &norm, "norms on Q and K are known for Qwen3 only");
    }
    Ok(())
}

/// Absent in files older than grouped-query attention, which only Llama has; other defaults moved between releases.
fn kv_heads(raw: &Raw, family: Family, heads: u64) -> Result<u64, TranslateError> {
    match (raw.num_key_value_heads, family) {
        (Some(kv_heads), _) => Ok(kv_heads),
        (None, Family::Llama) => Ok(heads),
        (None, _) => Err(TranslateError::MissingKey { key: "num_key_value_heads" }),
    }
}

/// Absent or null means `hidden_size / num_attention_heads`, but for Qwen3, whose class default is a constant.
fn head_dim(raw: &Raw, family: Family, config: &ModelConfig) -> Result<u64, TranslateError> {
    match raw.head_dim {
        Some(head_dim) => Ok(head_dim),
        None if family == Family::Qwen3 => Err(TranslateError::MissingKey { key: "head_dim" }),
        None if config.num_heads == 0 => Err(TranslateError::Zero { what: "num_attention_heads" }),
        None if config.hidden_size.is_multiple_of(config.num_heads) => {
            Ok(config.hidden_size / config.num_heads)
        }
        None => Err(TranslateError::Indivisible {
            what: "hidden_size",
            size: config.hidden_size,
            by_what: "num_attention_heads",
            by: config.num_heads,
        }),
    }
}

fn dtype(raw: &Raw) -> Result<Dtype, TranslateError> {
    let (key, name) = match (&raw.dtype, &raw.torch_dtype) {
        (Some(name), _) => ("dtype", name),
        (None, Some(name)) => ("torch_dtype", name),
        (None, None) => return Err(TranslateError::MissingKey { key: "dtype" }),
    };
    match name.strip_prefix("torch.").unwrap_or(name) {
        "bfloat16" => Ok(Dtype::Bf16),
        "float16" | "half" => Ok(Dtype::F16),
        "float32" | "float" => Ok(Dtype::F32),
        _ => Err(TranslateError::UnsupportedConfig {
            key,
            value: name.to_owned(),
            why: "parameters are expected in bfloat16, float16 or float32",
        }),
    }
}
