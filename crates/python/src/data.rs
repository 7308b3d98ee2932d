//! What Python says as plain data: configurations, dtypes, shapes, facts.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping, PyString};
use refit::planner::Dtype;
use refit::translate::megatron::{ParamFacts, TrainerFacts};
use refit::translate::vllm::{Device, EngineFacts, LayerFacts, Written};
use refit::translate::{ModelConfig, TensorSpec};

use crate::failure::{Failure, Kind};

/// A dtype by whatever name: torch's, numpy's or safetensors'. `None` for those that no parameter has.
pub(crate) fn dtype(value: &Bound<'_, PyAny>) -> PyResult<Option<Dtype>> {
    Ok(dtype_of(&dtype_name(value)?))
}

/// What a dtype calls itself.
pub(crate) fn dtype_name(value: &Bound<'_, PyAny>) -> PyResult<String> {
    // numpy's have a name, and a text that depends on the byte order.
    let name = match value.getattr_opt("name")? {
        Some(name) if name.is_instance_of::<PyString>() => name.extract::<String>()?,
        // Classes, such as `numpy.float32`.
        _ => match value.getattr_opt("__name__")? {
            Some(name) => name.extract()?,
            None => value.str()?.to_string(),
        },
    };
    Ok(name.strip_prefix("torch.").unwrap_or(&name).to_owned())
}

/// The dtype of this name.
pub(crate) fn dtype_of(name: &str) -> Option<Dtype> {
    Dtype::from_name(name).or(match name {
        "float64" | "double" => Some(Dtype::F64),
        "float32" | "float" => Some(Dtype::F32),
        "bfloat16" => Some(Dtype::Bf16),
        "float16" | "half" => Some(Dtype::F16),
        "float8_e4m3fn" => Some(Dtype::F8E4m3),
        "float8_e5m2" => Some(Dtype::F8E5m2),
        "int64" | "long" => Some(Dtype::I64),
        "int32" | "int" => Some(Dtype::I32),
        "uint8" => Some(Dtype::U8),
        _ => None,
    })
}

/// As [`dtype`], where there has to be one.
pub(crate) fn known_dtype(tensor: &str, value: &Bound<'_, PyAny>) -> PyResult<Dtype> {
    if let Some(dtype) = dtype(value)? {
        return Ok(dtype);
    }
    let found = dtype_name(value)?;
    let text = format!(
        "`{tensor}` has dtype {found}; parameters are float64, float32, bfloat16, float16, float8_e4m3fn, float8_e5m2, \
         int64, int32 or uint8"
    );
    Err(Failure::new(Kind::Layout, text).about(tensor).into())
}

/// What a rank holds, from a mapping of tensors, or of pairs of shape and dtype.
pub(crate) fn specs(tensors: &Bound<'_, PyMapping>) -> PyResult<Vec<TensorSpec>> {
    let mut specs = Vec::new();
    for item in tensors.items()? {
        let (name, value): (String, Bound<'_, PyAny>) = item.extract()?;
        let (shape, dtype) = match (value.getattr_opt("shape")?, value.getattr_opt("dtype")?) {
            (Some(shape), Some(dtype)) => (shape, dtype),
            _ => value.extract().map_err(|_| {
                let text = format!("`{name}` is neither a tensor nor a pair of shape and dtype");
                Failure::new(Kind::Layout, text).about(name.as_str())
            })?,
        };
        let dtype = known_dtype(&name, &dtype)?;
        specs.push(TensorSpec::new(name.as_str(), dtype, extents(&name, "shape", &shape)?));
    }
    Ok(specs)
}

/// A shape, or what is counted like one.
pub(crate) fn extents(tensor: &str, what: &str, value: &Bound<'_, PyAny>) -> PyResult<Vec<u64>> {
    let extents = value.try_iter().and_then(|items| {
        items.map(|extent| extent?.extract::<u64>()).collect::<PyResult<Vec<u64>>>()
    });
    extents.map_err(|_| {
        let text = format!("`{tensor}`: its {what} is not a sequence of whole numbers from 0 on");
        Failure::new(Kind::Layout, text).about(tensor).into()
    })
}

/// A model's configuration: parsed, a file, or the folder that it lies in.
pub(crate) fn config(value: &Bound<'_, PyAny>) -> PyResult<ModelConfig> {
    if let Ok(parsed) = value.cast::<PyMapping>() {
        let text = json(parsed.as_any())?;
        return Ok(ModelConfig::from_json(&text).map_err(Failure::from)?);
    }
    let mut path: PathBuf = value.extract()?;
    if path.is_dir() {
        path.push("config.json");
    }
    let text = read(&path)?;
    let parsed = ModelConfig::from_json(&text).map_err(Failure::from);
    parsed.map_err(|failure| failure.within(&path.display().to_string()).into())
}

/// A file's text.
pub(crate) fn read(path: &PathBuf) -> PyResult<String> {
    let unreadable =
        |error| Failure::new(Kind::Config, format!("cannot read {}: {error}", path.display()));
    Ok(fs::read_to_string(path).map_err(unreadable)?)
}

/// A mapping as JSON, by Python's own encoder.
pub(crate) fn json(value: &Bound<'_, PyAny>) -> PyResult<String> {
    let py = value.py();
    // Mappings of other classes are copied, which `json` does not know.
    let plain = py.get_type::<PyDict>().call1((value,))?;
    py.import("json")?.call_method1("dumps", (plain,))?.extract().map_err(|error| {
        Failure::new(Kind::Config, "the configuration is no JSON").caused_by(error).into()
    })
}

/// Goes through a mapping of facts, whose keys all have to be known: a fact that is passed over may be the one that matters.
fn each(
    what: &str,
    facts: &Bound<'_, PyAny>,
    mut set: impl FnMut(&str, &Bound<'_, PyAny>) -> PyResult<bool>,
) -> PyResult<()> {
    let facts = facts.cast::<PyMapping>()?;
    for item in facts.items()? {
        let (key, value): (String, Bound<'_, PyAny>) = item.extract()?;
        let wrong = |why: String| Failure::new(Kind::Config, format!("{what}: {why}"));
        match set(&key, &value) {
            Ok(true) => {}
            Ok(false) => return Err(wrong(format!("`{key}` is not known")).into()),
            Err(error) => {
                return Err(wrong(format!("`{key}` is {}", value.repr()?)).caused_by(error).into());
            }
        }
    }
    Ok(())
}

/// What a trainer says about itself.
pub(crate) fn trainer_facts(facts: &Bound<'_, PyAny>) -> PyResult<TrainerFacts> {
    let mut out = TrainerFacts::default();
    each("trainer facts", facts, |key, value| {
        match key {
            "megatron_fsdp" => out.megatron_fsdp = value.extract()?,
            "gtp_weight_remat_size" => out.gtp_weight_remat_size = value.extract()?,
            "moe_single_grouped_weight" => out.moe_single_grouped_weight = value.extract()?,
            "moe_mlp_glu_interleave_size" => out.moe_mlp_glu_interleave_size = value.extract()?,
            "moe_shared_expert_glu_interleave_size" => {
                out.moe_shared_expert_glu_interleave_size = value.extract()?;
            }
            "overlap_param_gather" => out.overlap_param_gather = value.extract()?,
            "params_synced" => out.params_synced = value.extract()?,
            "reuse_grad_buf_for_mxfp8_param_ag" => {
                out.reuse_grad_buf_for_mxfp8_param_ag = value.extract()?;
            }
            "params" => {
                out.params =
                    value.try_iter()?.map(|param| param_facts(&param?)).collect::<PyResult<_>>()?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok(out)
}

fn param_facts(facts: &Bound<'_, PyAny>) -> PyResult<ParamFacts> {
    let mut out = ParamFacts::new("", "", "");
    each("facts of a parameter", facts, |key, value| {
        match key {
            "name" => out.name = value.extract::<String>()?.into(),
            "class" => out.class = value.extract()?,
            "layer" => out.layer = value.extract()?,
            "gtp_weight_remat" => out.gtp_weight_remat = value.extract()?,
            "scaled_2d" => out.scaled_2d = value.extract()?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    if out.name.is_empty() || out.class.is_empty() {
        let text = "facts of a parameter: `name` and `class` have to be there";
        return Err(Failure::new(Kind::Config, text).into());
    }
    Ok(out)
}

/// What an engine says about itself.
pub(crate) fn engine_facts(facts: &Bound<'_, PyAny>) -> PyResult<EngineFacts> {
    let mut out = EngineFacts::default();
    each("engine facts", facts, |key, value| {
        match key {
            "device" => out.device = device(&value.extract::<String>()?)?,
            "enable_eplb" => out.enable_eplb = value.extract()?,
            "redundant_experts" => out.redundant_experts = value.extract()?,
            "fused_shared_experts" => out.fused_shared_experts = value.extract()?,
            "layers" => {
                out.layers =
                    value.try_iter()?.map(|layer| layer_facts(&layer?)).collect::<PyResult<_>>()?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok(out)
}

/// What an engine runs on.
pub(crate) fn device(name: &str) -> Result<Device, Failure> {
    let known = [
        ("cuda", Device::Cuda),
        ("rocm", Device::Rocm),
        ("cpu", Device::Cpu),
        ("xpu", Device::Xpu),
    ];
    one_of("device", name, &known)
}

/// What an engine says about one layer.
pub(crate) fn layer_facts(facts: &Bound<'_, PyAny>) -> PyResult<LayerFacts> {
    let mut out = LayerFacts::new("", "");
    each("facts of a layer", facts, |key, value| {
        match key {
            "name" => out.name = value.extract()?,
            "quant_method" => out.quant_method = value.extract()?,
            "kernel" => out.kernel = value.extract()?,
            "written" => {
                let known = [
                    ("live", Written::Live),
                    ("load_time", Written::LoadTime),
                    ("load_time_blocks", Written::LoadTimeBlocks),
                    ("load_time_quantized", Written::LoadTimeQuantized),
                ];
                out.written = one_of("written", &value.extract::<String>()?, &known)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    if out.name.is_empty() || out.quant_method.is_empty() {
        let text = "facts of a layer: `name` and `quant_method` have to be there";
        return Err(Failure::new(Kind::Config, text).into());
    }
    Ok(out)
}

/// The value that a word stands for.
pub(crate) fn one_of<T: Copy>(what: &str, word: &str, known: &[(&str, T)]) -> Result<T, Failure> {
    known.iter().find(|(name, _)| *name == word).map(|(_, value)| *value).ok_or_else(|| {
        let names = known.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        Failure::new(Kind::Config, format!("{what} is `{word}`, and can be: {names}"))
    })
}

/// A time that a caller gave in seconds.
pub(crate) fn seconds(what: &str, value: f64) -> Result<Duration, Failure> {
    let time = Duration::try_from_secs_f64(value).ok().filter(|time| time.as_secs() <= 86_400 * 7);
    time.ok_or_else(|| {
        let text = format!("{what} is {value} seconds: it goes from 0 to a week");
        Failure::new(Kind::Config, text)
    })
}
