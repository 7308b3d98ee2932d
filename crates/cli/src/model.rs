//! A model and its two sides, from a config and sizes: what `plan` and `bench` work on.

use std::fs;
use std::path::Path;

use refit::planner::{RankLayout, SourceLayout};
use refit::translate::megatron::{self, SourceRank, TrainerOptions};
use refit::translate::vllm::{self, TargetRank};
use refit::translate::{ModelConfig, TargetLayout, TranslateError};

use crate::error::CliError;
use crate::sizes::{SourceSizes, TargetSizes};

/// Configs that come with the command, by the name a person gives.
pub(crate) const PRESETS: &[(&str, &str)] = &[
    ("qwen3-4b", include_str!("../presets/qwen3-4b.json")),
    ("qwen3-8b", include_str!("../presets/qwen3-8b.json")),
    ("llama-3.1-8b", include_str!("../presets/llama-3.1-8b.json")),
    ("llama-3.1-70b", include_str!("../presets/llama-3.1-70b.json")),
    ("qwen2.5-7b", include_str!("../presets/qwen2.5-7b.json")),
    ("deepseek-v3", include_str!("../presets/deepseek-v3.json")),
    ("deepseek-v3-fp8", include_str!("../presets/deepseek-v3-fp8.json")),
    ("kimi-k2", include_str!("../presets/kimi-k2.json")),
    ("qwen3-30b-a3b", include_str!("../presets/qwen3-30b-a3b.json")),
    ("mixtral-8x7b", include_str!("../presets/mixtral-8x7b.json")),
    // What is published is in MXFP4, which an engine does not hold in a writable form. This is the model in bf16.
    ("gpt-oss-20b", include_str!("../presets/gpt-oss-20b.json")),
    ("nemotron-nano-9b-v2", include_str!("../presets/nemotron-nano-9b-v2.json")),
    ("qwen3-next-80b-a3b", include_str!("../presets/qwen3-next-80b-a3b.json")),
];

/// The one that commands take when none is named.
pub(crate) const DEFAULT: &str = "qwen3-4b";

/// The help of arguments that [`config`] reads.
pub(crate) fn help() -> String {
    format!("A Hugging Face config.json, or a bundled model: {}", presets())
}

fn presets() -> String {
    PRESETS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

/// Reads a model by preset name or by the path of its `config.json`.
pub(crate) fn config(name_or_path: &str) -> Result<ModelConfig, CliError> {
    if let Some((_, text)) = PRESETS.iter().find(|(name, _)| *name == name_or_path) {
        return Ok(ModelConfig::from_json(text)?);
    }
    let path = Path::new(name_or_path);
    let text = fs::read_to_string(path).map_err(|source| {
        if source.kind() == std::io::ErrorKind::NotFound {
            return CliError::Usage(format!(
                "`{name_or_path}` is neither a file nor a bundled model; bundled are: {}",
                presets()
            ));
        }
        CliError::Read { path: path.to_path_buf(), source }
    })?;
    ModelConfig::from_json(&text)
        .map_err(|source| CliError::Config { path: path.to_path_buf(), source })
}

/// The layout of every trainer rank of these sizes.
pub(crate) fn source(
    config: &ModelConfig,
    sizes: SourceSizes,
) -> Result<Vec<RankLayout>, CliError> {
    let ranks = sizes.ranks(config.num_layers)?;
    let layout = |rank: &SourceRank| {
        let held = megatron::expected(config, rank, &TrainerOptions::default())?;
        megatron::layout(config, rank, &held)
    };
    Ok(ranks.iter().map(layout).collect::<Result<_, TranslateError>>()?)
}

/// The layout of every engine rank of these sizes.
pub(crate) fn target(
    config: &ModelConfig,
    sizes: TargetSizes,
) -> Result<Vec<TargetLayout>, CliError> {
    let ranks = sizes.ranks()?;
    let layout = |rank: &TargetRank| vllm::layout(config, rank, &vllm::expected(config, rank)?);
    Ok(ranks.iter().map(layout).collect::<Result<_, TranslateError>>()?)
}

/// The source side joined, for planning.
pub(crate) fn joined(source: Vec<RankLayout>) -> Result<SourceLayout, CliError> {
    SourceLayout::new(source).map_err(|error| CliError::Refit(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bundled_model_is_laid_out_on_both_sides() {
        for (name, _) in PRESETS {
            let config = config(name).unwrap();
            assert!(!source(&config, SourceSizes::new(1)).unwrap().is_empty(), "{name}");
            assert!(!target(&config, TargetSizes::new(1)).unwrap().is_empty(), "{name}");
        }
    }

    #[test]
    fn bundled_models_are_of_the_published_sizes() {
        for (name, parameters) in [
            ("qwen3-4b", 4_022_468_096),
            ("qwen3-8b", 8_190_735_360),
            ("llama-3.1-8b", 8_030_261_248),
        ] {
            let config = config(name).unwrap();
            let targets = target(&config, TargetSizes::new(1)).unwrap();
            let held: u64 = targets[0].layout.params().iter().map(|param| param.bytes()).sum();
            assert_eq!(held, 2 * parameters, "{name}");
        }
    }
}
