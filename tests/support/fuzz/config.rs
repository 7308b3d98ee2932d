use refit::planner::{LowerOptions, PlanOptions, RankLayout, SourceLayout, lower, plan};
use refit_translate::megatron::{self, SourceRank, TrainerOptions};
use refit_translate::vllm::{self, TargetRank};
use refit_translate::{ModelConfig, TranslateError};

use super::bands::CAPABILITIES;

/// Sizes that divide what models have: trainer's TP and PP, engine's TP.
const SIZES: [(u32, u32, u32); 4] = [(1, 1, 1), (2, 1, 4), (4, 2, 2), (3, 1, 5)];

/// More layers take more time and show nothing new.
const LAYERS: u32 = 2;

/// Reads a `config.json`; where it is one, lays the model out for small sizes on both sides and joins them.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(mut config) = ModelConfig::from_json(text) else { return };
    assert_eq!(config.validate(), Ok(()));
    config.num_layers = config.num_layers.min(LAYERS);
    for (tp, pp, engine) in SIZES {
        let Ok(source) = source(&config, tp, pp) else { continue };
        let source = SourceLayout::new(source).unwrap();
        let Ok(target) = target(&config, engine) else { continue };
        // What both sides accept joins, whatever the sizes.
        let Ok(plan) = plan(&source, &target, &PlanOptions::default().with_max_pieces(1 << 16))
        else {
            continue;
        };
        assert_eq!(plan.coverage().target_bytes, target.bytes());
        drop(lower(&plan, &CAPABILITIES, &LowerOptions::default()));
    }
}

fn source(config: &ModelConfig, tp: u32, pp: u32) -> Result<Vec<RankLayout>, TranslateError> {
    let layout = |rank: &SourceRank| {
        let held = megatron::expected(config, rank, &TrainerOptions::default())?;
        megatron::layout(config, rank, &held)
    };
    SourceRank::grid(config.num_layers, tp, pp, 1)?.iter().map(layout).collect()
}

/// The last rank: the one with padding.
fn target(config: &ModelConfig, tp: u32) -> Result<RankLayout, TranslateError> {
    let rank = TargetRank::new(0, tp - 1, tp);
    Ok(vllm::layout(config, &rank, &vllm::expected(config, &rank)?)?.layout)
}
