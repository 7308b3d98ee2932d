//! Reading `config.json`: what all families have in common. The rest is read by families and groups of facts, each of
//! which declares the keys it knows.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use refit_planner::Dtype;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::ModelConfig;
use crate::{Family, TranslateError};

/// The text of a `config.json`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Json<'a>(&'a str);

impl<'a> Json<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        Self(text)
    }

    /// Some of the keys, as transformers writes them, in a structure of options: `null` and absent are the same.
    pub(crate) fn keys<T: DeserializeOwned>(&self) -> Result<T, TranslateError> {
        serde_json::from_str(self.0).map_err(|error| TranslateError::Json {
            line: error.line(),
            column: error.column(),
            message: error.to_string(),
        })
    }
}

/// A key that has no default.
pub(crate) fn required<T>(value: Option<T>, key: &'static str) -> Result<T, TranslateError> {
    value.ok_or(TranslateError::MissingKey { key })
}

/// A value that changes the layout in a way nobody has described.
pub(crate) fn refusal(
    key: &'static str,
    value: impl ToString,
    why: &'static str,
) -> TranslateError {
    TranslateError::UnsupportedConfig { key, value: value.to_string(), why }
}

/// The keys that matter for every family.
#[derive(Deserialize)]
struct Keys {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    hidden_size: Option<u64>,
    num_hidden_layers: Option<u32>,
    num_attention_heads: Option<u64>,
    vocab_size: Option<u64>,
    tie_word_embeddings: Option<bool>,
    /// The name since transformers 4.56.
    dtype: Option<String>,
    /// The name before.
    torch_dtype: Option<String>,
    quantization_config: Option<Value>,
}

/// Real ones have a few thousand; what is read of an unknown `quantization_config` takes up to 40 times its text.
const MAX_TEXT_BYTES: usize = 1 << 20;

pub(super) fn read(text: &str) -> Result<ModelConfig, TranslateError> {
    if text.len() > MAX_TEXT_BYTES {
        let (what, limit) = ("bytes of config.json", MAX_TEXT_BYTES as u64);
        return Err(TranslateError::TooLarge { what, limit });
    }
    let text = without_python_floats(text);
    let json = Json::new(&text);
    let keys: Keys = json.keys()?;
    let family = family(&keys)?;
    let mut config = ModelConfig::new(family);
    config.block_fp8 = match &keys.quantization_config {
        Some(quantization) => block_fp8(family, quantization)?,
        None => false,
    };
    config.dtype = dtype(&keys)?;
    config.hidden_size = required(keys.hidden_size, "hidden_size")?;
    // Hybrid models may have a list of layers instead.
    config.num_layers = keys.num_hidden_layers.unwrap_or(0);
    config.num_heads = required(keys.num_attention_heads, "num_attention_heads")?;
    config.vocab_size = required(keys.vocab_size, "vocab_size")?;
    // All families so far have `false` as their class default, so files may leave it out.
    config.tied = keys.tie_word_embeddings.unwrap_or(false);
    (family.description().read)(&json, &mut config)?;
    if config.num_layers == 0 {
        required(keys.num_hidden_layers, "num_hidden_layers")?;
    }
    config.validate()?;
    Ok(config)
}

/// Blockwise FP8 as DeepSeek publishes it, in a family that describes it; everything else is refused.
fn block_fp8(family: Family, quantization: &Value) -> Result<bool, TranslateError> {
    let method = quantization.get("quant_method").unwrap_or(quantization);
    let refuse = |key, why| {
        let value = quantization.get(key).unwrap_or(&Value::Null);
        Err(refusal("quantization_config", format!("{key}: {value}"), why))
    };
    if method != "fp8" || family.description().block_fp8.is_none() {
        let why = match method.as_str() {
            Some("mxfp4") => {
                "the engine packs such experts into blocks and scales of its kernel's; give it a bf16 checkpoint \
                 and state that one's config.json, which has no such key"
            }
            _ => "quantised engine parameters are requantised or repacked after loading",
        };
        return Err(refusal("quantization_config", method, why));
    }
    let is = |key, wanted: &[Value]| {
        let value = quantization.get(key).unwrap_or(&Value::Null);
        wanted.contains(value)
    };
    if !is("weight_block_size", &[json!([128, 128])]) || !is("fmt", &[json!("e4m3")]) {
        return refuse("weight_block_size", "only e4m3 with blocks of 128 x 128 is described");
    }
    if !is("activation_scheme", &[Value::Null, json!("dynamic")]) {
        return refuse(
            "activation_scheme",
            "scales of activations would be parameters of their own",
        );
    }
    if !is("scale_fmt", &[Value::Null]) {
        return refuse("scale_fmt", "engines requantise weights for scales of other formats");
    }
    for key in ["modules_to_not_convert", "ignored_layers"] {
        if !is(key, &[Value::Null, json!([])]) {
            return refuse(key, "which modules are quantised must follow from the family");
        }
    }
    Ok(true)
}

/// Python writes floats that JSON has no words for, as in the time step limits of Mamba: here they become null.
fn without_python_floats(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    // Between quotes, every second piece: none of a quote that is escaped.
    let (mut rest, mut quoted) = (text, false);
    while !rest.is_empty() {
        let end = if quoted { string_end(rest) } else { rest.find('"').unwrap_or(rest.len()) };
        let (piece, more) = rest.split_at(end);
        if quoted {
            plain += piece;
        } else {
            let piece = piece.replace("-Infinity", "null").replace("Infinity", "null");
            plain += &piece.replace("NaN", "null");
        }
        let mut after = more.chars();
        plain.extend(after.next());
        (rest, quoted) = (after.as_str(), !quoted);
    }
    plain
}

/// Where a string ends whose first quote is behind us.
fn string_end(text: &str) -> usize {
    let mut escaped = false;
    let closing = |&(_, char): &(usize, char)| {
        let closes = char == '"' && !escaped;
        escaped = char == '\\' && !escaped;
        closes
    };
    text.char_indices().find(closing).map_or(text.len(), |(at, _)| at)
}

/// The architecture says more than the model type: a reward model has its model type but another head.
fn family(keys: &Keys) -> Result<Family, TranslateError> {
    let architecture = keys.architectures.as_ref().and_then(|list| list.first());
    let name = architecture.or(keys.model_type.as_ref());
    Family::from_name(name.ok_or(TranslateError::MissingKey { key: "architectures" })?)
}

/// A head's size where `config.json` leaves it to be worked out.
pub(crate) fn derived_head_dim(config: &ModelConfig) -> Result<u64, TranslateError> {
    if config.num_heads == 0 {
        return Err(TranslateError::Zero { what: "num_attention_heads" });
    }
    if !config.hidden_size.is_multiple_of(config.num_heads) {
        return Err(TranslateError::Indivisible {
            what: "hidden_size",
            size: config.hidden_size,
            by_what: "num_attention_heads",
            by: config.num_heads,
        });
    }
    Ok(config.hidden_size / config.num_heads)
}

fn dtype(keys: &Keys) -> Result<Dtype, TranslateError> {
    let (key, name) = match (&keys.dtype, &keys.torch_dtype) {
        (Some(name), _) => ("dtype", name),
        (None, Some(name)) => ("torch_dtype", name),
        (None, None) => return Err(TranslateError::MissingKey { key: "dtype" }),
    };
    match name.strip_prefix("torch.").unwrap_or(name) {
        "bfloat16" => Ok(Dtype::Bf16),
        "float16" | "half" => Ok(Dtype::F16),
        "float32" | "float" => Ok(Dtype::F32),
        _ => Err(refusal(
            key,
            name.to_owned(),
            "parameters are expected in bfloat16, float16 or float32",
        )),
    }
}
