//! Whole tiny models: tensors of real trainer ranks become those of real engine ranks, byte for byte.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use refit::planner::{
    Capabilities, LowerOptions, Mode, PlanOptions, Policy, Replicas, SourceLayout, lower, plan,
};
use refit_tests::execute::{self, Sources};
use refit_tests::golden::{self, Case};
use refit_tests::landing;
use refit_tests::oracle::Buffers;
use refit_translate::megatron::{self, LayerSpec, TrainerOptions};
use refit_translate::{ModelConfig, TensorSpec, TranslateError, vllm};

/// The model, or `None` when its family has no slots yet.
fn config_of(case: &Case) -> Option<ModelConfig> {
    match ModelConfig::from_json(&case.config) {
        Ok(config) => Some(config),
        Err(TranslateError::UnsupportedModel { .. }) => None,
        Err(error) => panic!("{error}"),
    }
}

fn sorted(mut specs: Vec<TensorSpec>) -> Vec<TensorSpec> {
    specs.sort_by(|a, b| a.name.cmp(&b.name));
    specs
}

/// Every way to lower that changes which code moves the bytes.
fn lowerings() -> [(Capabilities, LowerOptions); 5] {
    let plain = Capabilities::plain(2_000, 5_000);
    let strided = Capabilities { strided_reads: true, ..plain };
    let options = LowerOptions::default();
    [
        (plain, options),
        (plain, options.with_wave_bytes(1_000)),
        (plain, options.with_mode(Mode::Staged)),
        (plain, options.with_mode(Mode::Staged).with_policy(Policy::ExactWire)),
        (strided, options.with_mode(Mode::Staged).with_policy(Policy::ExactWire)),
    ]
}

/// Names the tensor instead of printing it.
fn assert_same(got: &Buffers, wanted: &Buffers) {
    assert!(got.keys().eq(wanted.keys()));
    for (name, bytes) in wanted {
        assert!(got[name] == *bytes, "{name} differs");
    }
}

fn check(case: &Case, config: &ModelConfig) {
    let (mut layouts, mut sources) = (Vec::new(), Sources::new());
    for file in &case.source.ranks {
        let held = case.tensors(&file.file).unwrap();
        layouts.push(megatron::layout(config, &case.source.place(file), &held.specs).unwrap());
        sources.insert(file.rank, held.bytes);
    }
    let source = SourceLayout::new(layouts).unwrap();
    for file in &case.target.ranks {
        let wanted = case.tensors(&file.file).unwrap();
        let rank = case.target.place(file);
        assert_eq!(sorted(vllm::expected(config, &rank).unwrap()), wanted.specs);
        let target = vllm::layout(config, &rank, &wanted.specs).unwrap().layout;
        for rule in [Replicas::Lowest, Replicas::Spread] {
            let plan = plan(&source, &target, &PlanOptions::default().with_replicas(rule)).unwrap();
            assert_same(&execute::plan(&plan, &sources), &wanted.bytes);
            for (capabilities, options) in lowerings() {
                let program = lower(&plan, &capabilities, &options).unwrap();
                assert_same(&landing::program(&program, &sources), &wanted.bytes);
            }
        }
    }
}

#[test]
fn every_case_is_reproduced() {
    let root = golden::root();
    let mut covered = 0;
    for folder in golden::cases(&root).unwrap() {
        let case = Case::open(&folder).unwrap();
        let name = case.name();
        match config_of(&case) {
            Some(config) => {
                println!("model {name}");
                check(&case, &config);
                covered += 1;
            }
            None => println!("model {name}: not covered"),
        }
    }
    assert!(covered > 0, "no case in {}", root.display());
}

/// `expected` says what real trainer ranks held, up to the element types of norms and the padding of the vocabulary.
#[test]
fn expected_tensors_are_those_of_real_ranks() {
    let root = golden::root();
    for folder in golden::cases(&root).unwrap() {
        let case = Case::open(&folder).unwrap();
        let name = case.name();
        let Some(config) = config_of(&case) else { continue };
        for file in &case.source.ranks {
            let rank = case.source.place(file);
            let held = case.tensors(&file.file).unwrap().specs;
            let spec = if case.source.spec == "te" { LayerSpec::Te } else { LayerSpec::Local };
            let mut options = TrainerOptions::default().with_spec(spec);
            let is_vocab =
                |spec: &&TensorSpec| spec.name.contains("embed") || spec.name.contains("output");
            if let Some(embedding) = held.iter().find(is_vocab) {
                options = options.with_padded_vocab(embedding.shape[0] * u64::from(rank.tp_size));
            }
            let mut expected = sorted(megatron::expected(&config, &rank, &options).unwrap());
            for (expected, held) in expected.iter_mut().zip(&held) {
                expected.dtype = held.dtype;
            }
            assert_eq!(expected, held, "{name}, source rank {}", rank.rank);
        }
    }
}
