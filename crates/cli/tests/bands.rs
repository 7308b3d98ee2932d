//! Layouts from files: printed, edited, planned with, and a model that no code knows refitted by them.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

fn refit(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_refit")).args(arguments).output().unwrap()
}

/// What a command prints that succeeds.
fn printed(arguments: &[&str]) -> String {
    let output = refit(arguments);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {text}");
    String::from_utf8(output.stdout).unwrap()
}

/// What a command says that is refused.
fn refused(arguments: &[&str]) -> String {
    let output = refit(arguments);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {text}");
    assert!(!text.contains("panicked"), "{text}");
    text
}

/// The hash of every target rank's plan.
fn hashes(arguments: &[&str]) -> Vec<String> {
    let plan: Value =
        serde_json::from_str(&printed(&[&["plan", "--json"], arguments].concat())).unwrap();
    let ranks = plan["ranks"].as_array().unwrap();
    ranks.iter().map(|rank| rank["plan_hash"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn what_is_printed_plans_like_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let model = ["--config", "qwen2.5-7b"];
    let text = printed(&[&["bands", "--source", "tp=2,pp=2"], &model[..]].concat());
    let source = file("source.json", &text);
    let target_text = printed(&[&["bands", "--target", "tp=4"], &model[..]].concat());
    let target = file("target.json", &target_text);

    let wanted = hashes(&[&["--source", "tp=2,pp=2", "--target", "tp=4"], &model[..]].concat());
    assert_eq!(hashes(&["--source-bands", &source, "--target-bands", &target]), wanted);
    // Either side may be a model's.
    let source_only = [&["--source-bands", &source, "--target", "tp=4"], &model[..]].concat();
    assert_eq!(hashes(&source_only), wanted);
    let target_only = [&["--source", "tp=2,pp=2", "--target-bands", &target], &model[..]].concat();
    assert_eq!(hashes(&target_only), wanted);

    // A rank a file, in any order.
    let rank = |number: &str| {
        let side = ["bands", "--target", "tp=4", "--rank", number];
        file(number, &printed(&[&side, &model[..]].concat()))
    };
    let parts: Vec<String> = ["2", "0", "3", "1"].map(rank).to_vec();
    let mut arguments = vec!["--source-bands", &source];
    arguments.extend(parts.iter().flat_map(|part| ["--target-bands", part.as_str()]));
    assert_eq!(hashes(&arguments), wanted);

    // Printing a file changes nothing but the line that says where it is from.
    let about = |text: &str| {
        let lines = text.lines().filter(|line| !line.contains("\"about\""));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(about(&printed(&["bands", &target])), about(&target_text));
}

/// The two sides of the example in the documentation.
#[test]
fn the_documented_example_is_a_refit() {
    let text = include_str!("../../../docs/bands.md");
    let folder = tempfile::tempdir().unwrap();
    let blocks = text.split("```json\n{").skip(1).map(|rest| rest.split("```").next().unwrap());
    let files: Vec<String> = blocks
        .enumerate()
        .map(|(number, block)| {
            let path = folder.path().join(number.to_string());
            fs::write(&path, format!("{{{block}")).unwrap();
            path.display().to_string()
        })
        .collect();
    let [source, target] = files.as_slice() else { panic!("{} examples", files.len()) };
    assert_eq!(hashes(&["--source-bands", source, "--target-bands", target]).len(), 1);
}

#[test]
fn mistakes_with_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (source, target, broken) = (path("source.json"), path("target.json"), path("broken.json"));
    fs::write(&source, printed(&["bands", "--source", "tp=1"])).unwrap();
    fs::write(&target, printed(&["bands", "--target", "tp=1"])).unwrap();
    fs::write(&broken, "{\"schema\": 1,\n\"sides\": []}").unwrap();
    let huge = path("huge.json");
    fs::File::create(&huge).unwrap().set_len(1 << 40).unwrap();

    let both =
        ["plan", "--config", "qwen3-4b", "--source-bands", &source, "--target-bands", &target];
    let mistakes: [(&[&str], &str); 11] = [
        (&both, "both sides come from files: leave --config out"),
        (&["plan", "--source-bands", &target], "describes a target side where a source side"),
        (
            &["plan", "--target-bands", &target, "--target-bands", &target],
            "rank 0 is described in another file",
        ),
        (
            &["plan", "--target-bands", &broken],
            "broken.json: line 2, column 7: unknown field `sides`",
        ),
        (&["plan", "--target-bands", &huge], "1099511627776 bytes of text"),
        (&["plan", "--target-bands", "nowhere.json"], "nowhere.json: No such file"),
        (&["plan", "--target-bands", &target, "--target", "tp=1"], "cannot be used with"),
        (&["bands"], "<--source <tp=N,pp=N"),
        (&["bands", "--source", "tp=2", "--target", "tp=1"], "cannot be used with"),
        (&["bands", "--source", "tp=2", "--rank", "2"], "no rank 2 among the 2"),
        (&["bands", &source, &target], "target.json: describes a target side"),
    ];
    for (arguments, says) in mistakes {
        let text = refused(arguments);
        assert!(text.contains(says), "{arguments:?}: {text}");
    }
}

/// A family that exists nowhere else. Its values are what this file says they are, element by element.
mod braid {
    use super::*;

    /// The bits of a bf16 that says which element this is; never a NaN.
    pub(super) fn value(tensor: &str, row: usize, col: usize) -> u16 {
        let seed = tensor.bytes().fold(7_u64, |seed, byte| seed * 31 + u64::from(byte));
        let place = row as u64 * 1009 + col as u64 * 17;
        let mixed = (seed ^ place).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        u16::try_from(mixed >> 50).unwrap()
    }

    /// A tensor of bf16 in which each element is one of a logical tensor, or a padding.
    pub(super) fn bf16(
        rows: usize,
        cols: usize,
        of: impl Fn(usize, usize) -> Option<u16>,
        pad: u16,
    ) -> Vec<u8> {
        let places = (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col)));
        places.flat_map(|(row, col)| of(row, col).unwrap_or(pad).to_le_bytes()).collect()
    }

    pub(super) fn save(path: &Path, tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) {
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            (*name, TensorView::new(*dtype, shape.to_vec(), bytes).unwrap())
        });
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    /// What trainer rank `rank` of two holds: left and right rows braided, columns of `out`, a bias in f32, and a
    /// padded vocabulary.
    pub(super) fn trainer(rank: usize) -> Vec<(&'static str, Dtype, &'static [usize], Vec<u8>)> {
        let strand = |row: usize, col| {
            let side = if row.is_multiple_of(2) { "left" } else { "right" };
            Some(value(side, rank * 4 + row / 2, col))
        };
        let out = |row, col| Some(value("out", row, rank * 4 + col));
        let token = |row, col| (rank * 6 + row < 10).then(|| value("emb", rank * 6 + row, col));
        let bias = (0..4)
            .flat_map(|row| (u32::from(value("bias", rank * 4 + row, 0)) << 16).to_le_bytes());
        vec![
            ("strand.weight", Dtype::BF16, &[8, 6], bf16(8, 6, strand, 0)),
            ("out.weight", Dtype::BF16, &[6, 4], bf16(6, 4, out, 0)),
            ("bias", Dtype::F32, &[4], bias.collect()),
            ("emb.weight", Dtype::BF16, &[6, 6], bf16(6, 6, token, 0x40e0)),
            ("step", Dtype::I64, &[1], vec![rank.to_le_bytes()[0]; 8]),
        ]
    }

    /// What the only engine rank wants: left above right, everything whole, padding of zeros.
    pub(super) fn engine() -> Vec<(&'static str, Dtype, &'static [usize], Vec<u8>)> {
        let towers = |row: usize, col| {
            Some(if row < 8 { value("left", row, col) } else { value("right", row - 8, col) })
        };
        let token = |row, col| (row < 10).then(|| value("emb", row, col));
        vec![
            ("towers", Dtype::BF16, &[2, 8, 6], bf16(16, 6, towers, 0)),
            ("out", Dtype::BF16, &[6, 8], bf16(6, 8, |row, col| Some(value("out", row, col)), 0)),
            ("bias", Dtype::BF16, &[8], bf16(8, 1, |row, col| Some(value("bias", row, col)), 0)),
            ("emb", Dtype::BF16, &[16, 6], bf16(16, 6, token, 0)),
        ]
    }

    fn tensors() -> Value {
        json!({ "left": [8, 6], "right": [8, 6], "out": [6, 8], "bias": [8], "emb": [10, 6] })
    }

    /// The trainer's side as a person writes it.
    pub(super) fn written() -> Value {
        let rank = |rank: u64| {
            let rows = json!([rank * 4, rank * 4 + 4]);
            let tokens = json!([rank * 6, (rank * 6 + 6).min(10)]);
            json!({ "rank": rank, "params": {
                "strand.weight": { "dtype": "BF16", "shape": [8, 6], "bands": [
                    { "tensor": "left", "rows": rows, "row_step": 2 },
                    { "tensor": "right", "rows": rows, "at": [1, 0], "row_step": 2 } ] },
                "out.weight": { "dtype": "BF16", "shape": [6, 4],
                    "bands": [{ "tensor": "out", "cols": rows }] },
                "bias": { "dtype": "F32", "shape": [4], "bands": [{ "tensor": "bias", "rows": rows }] },
                "emb.weight": { "dtype": "BF16", "shape": [6, 6],
                    "bands": [{ "tensor": "emb", "rows": tokens }] },
                "step": { "dtype": "I64", "shape": [1], "bands": [] },
            } })
        };
        json!({ "schema": 1, "side": "source", "tensors": tensors(), "ranks": [rank(0), rank(1)] })
    }

    /// The engine's side as its loader was seen to fill it.
    pub(super) fn captured() -> Value {
        let copy = |tensor: &str, offset: u64, shape: &[u64], stride: &[u64]| json!({ "tensor": tensor, "to": { "offset": offset, "shape": shape, "stride": stride } });
        json!({ "schema": 1, "side": "target", "tensors": tensors(), "ranks": [{ "rank": 0, "params": {
            "towers": { "dtype": "BF16", "shape": [2, 8, 6],
                "copies": [copy("left", 0, &[8, 6], &[6, 1]), copy("right", 48, &[8, 6], &[6, 1])] },
            "out": { "dtype": "BF16", "shape": [6, 8], "copies": [copy("out", 0, &[6, 8], &[8, 1])] },
            "bias": { "dtype": "BF16", "shape": [8], "copies": [copy("bias", 0, &[8], &[1])] },
            "emb": { "dtype": "BF16", "shape": [16, 6], "copies": [copy("emb", 0, &[10, 6], &[6, 1])],
                "fill": [{ "offset": 60, "shape": [6, 6], "stride": [6, 1] }] },
        } }] })
    }

    /// The whole case.
    pub(super) fn case(folder: &Path) {
        for rank in 0..2 {
            save(&folder.join(format!("source/rank{rank}.safetensors")), &trainer(rank));
        }
        save(&folder.join("target/rank0.safetensors"), &engine());
        fs::write(folder.join("source/bands.json"), written().to_string()).unwrap();
        fs::write(folder.join("target/bands.json"), captured().to_string()).unwrap();
        fs::write(folder.join("config.json"), r#"{"architectures": ["BraidForCausalLM"]}"#)
            .unwrap();
        let case = json!({
            "schema": 1, "model": "BraidForCausalLM",
            "source": { "ranks": [{ "rank": 0, "file": "source/rank0.safetensors" },
                                  { "rank": 1, "file": "source/rank1.safetensors" }] },
            "target": { "ranks": [{ "rank": 0, "file": "target/rank0.safetensors" }] },
        });
        fs::write(folder.join("case.json"), case.to_string()).unwrap();
    }
}

/// How `refit verify` ends for a case, and what it prints.
fn verify(folder: &Path) -> (Option<i32>, String) {
    let output = refit(&["verify", folder.to_str().unwrap()]);
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn a_model_that_no_code_knows_is_refitted() {
    let folder = tempfile::tempdir().unwrap();
    braid::case(folder.path());
    let (code, text) = verify(folder.path());
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("1 target ranks, 4 tensors, 496 bytes"), "{text}");

    // The bands decide: with left and right exchanged the first byte of the towers is another.
    let path = folder.path().join("source/bands.json");
    let text = braid::written().to_string();
    let swapped = text.replace("left", "L").replace("right", "left").replace('L', "right");
    fs::write(&path, swapped).unwrap();
    let (code, text) = verify(folder.path());
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("target rank 0: `towers` is wrong from byte 0 on"), "{text}");
}

#[test]
fn what_a_case_lacks_is_named() {
    type Break = fn(&Path);
    let edit = |folder: &Path, file: &str, from: &str, to: &str| {
        let path = folder.join(file);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
    };
    let breaks: [(i32, &str, Break); 7] = [
        (1, "model `BraidForCausalLM` is not supported", |case| {
            fs::remove_file(case.join("source/bands.json")).unwrap();
        }),
        (1, "brings target/bands.json", |case| {
            fs::remove_file(case.join("target/bands.json")).unwrap();
        }),
        (2, "source/bands.json: describes a target side", |case| {
            fs::copy(case.join("target/bands.json"), case.join("source/bands.json")).unwrap();
        }),
        (2, "target/bands.json: rank 0, parameter `emb`: 60 of its 96 elements", |case| {
            let mut bands = braid::captured();
            bands["ranks"][0]["params"]["emb"]["fill"] = json!([]);
            fs::write(case.join("target/bands.json"), bands.to_string()).unwrap();
        }),
        (1, "source rank 1: it holds `step`, which source/bands.json does not list", |case| {
            let mut bands = braid::written();
            bands["ranks"][1]["params"].as_object_mut().unwrap().remove("step");
            fs::write(case.join("source/bands.json"), bands.to_string()).unwrap();
        }),
        (
            1,
            "source rank 0: `bias` is F32 [4] in its file and F32 [5, 1] in source/bands.json",
            |case| {
                let mut bands = braid::written();
                bands["ranks"][0]["params"]["bias"]["shape"] = json!([5]);
                fs::write(case.join("source/bands.json"), bands.to_string()).unwrap();
            },
        ),
        (1, "source rank 1: source/bands.json does not describe it", |case| {
            let mut bands = braid::written();
            bands["ranks"].as_array_mut().unwrap().pop();
            fs::write(case.join("source/bands.json"), bands.to_string()).unwrap();
        }),
    ];
    for (status, says, break_it) in breaks {
        let folder = tempfile::tempdir().unwrap();
        braid::case(folder.path());
        break_it(folder.path());
        let (code, text) = verify(folder.path());
        assert_eq!(code, Some(status), "{says}: {text}");
        assert!(text.contains(says), "{says}: {text}");
    }

    // A case reads its own folder and no other.
    let folder = tempfile::tempdir().unwrap();
    braid::case(folder.path());
    edit(folder.path(), "case.json", "target/rank0", "target/../../elsewhere/rank0");
    let (code, text) = verify(folder.path());
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("lie in its own folder"), "{text}");
}
