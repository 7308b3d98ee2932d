//! Golden models, from what real trainer ranks held to what real engine ranks wanted.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use refit::planner::{Dtype, RankLayout};
use refit::translate::{ModelConfig, megatron, vllm};
use refit_cli::case::{Case, Tensors};
use safetensors::tensor::{Dtype as Stored, TensorView, serialize_to_file};

use crate::process::{Job, Rank, have_nixl};

/// Tensors under Hugging Face names.
#[derive(Debug, Default)]
struct Model(BTreeMap<String, Logical>);

#[derive(Debug)]
struct Logical {
    dtype: Dtype,
    shape: [usize; 2],
    bytes: Vec<u8>,
    /// Elements that some rank held.
    held: usize,
}

impl Model {
    /// Adds what a rank holds, at its places in the tensors. Ranks that hold the same have to agree.
    fn add(&mut self, layout: &RankLayout, held: &Tensors) {
        for (param, tensor, band) in layout.bands() {
            let number = |number: u64| usize::try_from(number).unwrap();
            let size = number(param.dtype().size());
            let shape = [tensor.rows, tensor.cols].map(number);
            let logical = self.0.entry(tensor.name.to_string()).or_insert_with(|| Logical {
                dtype: param.dtype(),
                shape,
                // No element of a model.
                bytes: vec![0xff; shape[0] * shape[1] * size],
                held: 0,
            });
            let bytes = &held.bytes[&param.name().to_string()];
            let (rows, cols) = (band.logical_rows(), band.logical_cols());
            let (at_row, at_col) = band.origin();
            for (step, row) in rows.enumerate() {
                let from = (at_row + step as u64 * band.step()) * param.cols() + at_col;
                let into = row * tensor.cols + cols.start;
                let [from, into] = [from, into].map(|element| number(element) * size);
                let len = number(cols.end - cols.start) * size;
                let (from, into) = (&bytes[from..from + len], &mut logical.bytes[into..into + len]);
                if into.iter().all(|&byte| byte == 0xff) {
                    logical.held += len / size;
                } else {
                    assert_eq!(into, from, "two ranks hold other elements of {}", tensor.name);
                }
                into.copy_from_slice(from);
            }
        }
    }

    /// Writes a checkpoint, every element of which some rank held.
    fn write(&self, folder: &Path, config: &str) {
        fs::create_dir(folder).unwrap();
        fs::write(folder.join("config.json"), config).unwrap();
        let views = self.0.iter().map(|(name, logical)| {
            let Logical { dtype, shape, bytes, held } = logical;
            assert_eq!(*held, shape[0] * shape[1], "{name} is not whole");
            let stored = match dtype {
                Dtype::Bf16 => Stored::BF16,
                Dtype::F32 => Stored::F32,
                other => panic!("{name} is in {other}"),
            };
            (name.as_str(), TensorView::new(stored, shape.to_vec(), bytes).unwrap())
        });
        serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    }
}

fn case(name: &str) -> Case {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models");
    Case::open(&folder.join(name)).unwrap()
}

/// The checkpoint that both sides of a case make up: one folder of what the trainer held, and one of what the engine wanted.
fn checkpoints(case: &Case, job: &Job) -> [PathBuf; 2] {
    let config = ModelConfig::from_json(&case.config).unwrap();
    let (mut trainer, mut engine) = (Model::default(), Model::default());
    for file in &case.source.ranks {
        let held = case.tensors(&file.file).unwrap();
        let layout = megatron::layout(&config, &case.source.place(file), &held.specs).unwrap();
        trainer.add(&layout, &held);
    }
    for file in &case.target.ranks {
        let held = case.tensors(&file.file).unwrap();
        let layout = vllm::layout(&config, &case.target.place(file), &held.specs).unwrap().layout;
        engine.add(&layout, &held);
    }
    [(trainer, "trainer"), (engine, "engine")].map(|(model, name)| {
        let folder = job.path().join(name);
        model.write(&folder, &case.config);
        folder
    })
}

/// What the trainer's files hold is served, by as many ranks as it had, pulled by as many as the engine had, and compared with what the
/// engine's files hold.
#[test]
fn a_golden_model_arrives_as_its_engine_wants_it() {
    if !have_nixl("a_golden_model_arrives_as_its_engine_wants_it") {
        return;
    }
    for name in ["qwen3_tp4_to_tp2", "llama_tp4_to_tp1"] {
        let (case, job) = (case(name), Job::new());
        let [trainer, engine] = checkpoints(&case, &job).map(|folder| folder.display().to_string());
        let (source_tp, target_tp) = (case.source.tp, case.target.tp);
        let serve =
            |rank| format!("serve --source tp={source_tp} --rank {rank} --checkpoint {trainer}");
        let pull =
            |rank| format!("pull --target tp={target_tp} --rank {rank} --checkpoint {engine}");
        let mut sources: Vec<Rank> = (0..source_tp).map(|rank| job.start(&serve(rank))).collect();
        let mut targets: Vec<Rank> = (0..target_tp).map(|rank| job.start(&pull(rank))).collect();
        for target in &mut targets {
            let bytes = target.hear("joined")["bytes"].clone();
            assert_eq!(target.hear_version("installed", 1)["verified_bytes"], bytes, "{name}");
        }
        targets.iter_mut().for_each(Rank::leave);
        sources.iter_mut().for_each(Rank::leave);
    }
}
