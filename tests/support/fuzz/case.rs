use std::path::Path;

use refit_cli::case::{Case, Tensors};
use refit_translate::megatron::{self, SourceRank};
use refit_translate::vllm::{self, TargetRank};
use refit_translate::{Family, ModelConfig};

use super::parts;

/// Reads a `case.json`, and behind a zero byte a safetensors file; where they are that, lays the tensors out as every
/// rank of the case.
pub fn case(data: &[u8]) {
    let (text, file) = parts(data);
    let folder = Path::new("case");
    let text = String::from_utf8_lossy(text);
    let case = Case::from_json(folder, &text, String::new());
    let tensors = Tensors::from_bytes(&folder.join("tensors"), file.unwrap_or_default());
    let Ok(tensors) = tensors else { return };
    for spec in &tensors.specs {
        let bytes = tensors.bytes.get(spec.name.as_ref()).unwrap();
        assert_eq!(Some(bytes.len() as u64), spec.bytes());
    }
    let Ok(case) = case else { return };
    let config = mini();
    for rank in &case.source.ranks {
        let place = SourceRank::new(rank.rank, rank.layers.clone())
            .with_tp(rank.tp, case.source.tp)
            .with_pp(rank.pp, case.source.pp);
        drop(megatron::layout(&config, &place, &tensors.specs));
    }
    for rank in &case.target.ranks {
        let place = TargetRank::new(rank.rank, rank.tp, case.target.tp);
        drop(vllm::layout(&config, &place, &tensors.specs));
    }
}

/// A Qwen3 of one layer that is as small as can be: its tensors fit into a corpus.
fn mini() -> ModelConfig {
    let mut config = ModelConfig::new(Family::Qwen3);
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (8, 4, 10);
    (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) = (1, 2, 1, 4);
    config
}
