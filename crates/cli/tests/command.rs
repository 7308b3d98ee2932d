//! The command as a person runs it: what it prints, where it exits, and what it says to the obvious mistakes.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn refit(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_refit")).args(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(case)
}

fn golden_text(case: &str) -> String {
    golden(case).display().to_string()
}

/// A copy of a case that a test may break.
fn copy(case: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for part in ["", "source", "target"] {
        fs::create_dir_all(folder.path().join(part)).unwrap();
        for entry in fs::read_dir(golden(case).join(part)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                fs::copy(&path, folder.path().join(part).join(path.file_name().unwrap())).unwrap();
            }
        }
    }
    folder
}

#[test]
fn bench_plan_measures_and_writes_what_it_measured() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("plan.json");
    let file = file.to_str().unwrap();
    let output = refit(&["bench-plan", "--preset", "qwen3-4b", "--rounds", "2", "--json", file]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}{}", stderr(&output));
    assert!(text.starts_with("qwen3-4b: TP4 -> TP2\n"), "{text}");
    let written: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let row = &written["rows"][0];
    assert_eq!((written["rounds"].as_u64(), row["params"].as_u64()), (Some(2), Some(580)));
    for number in ["index_s", "plan_s", "lower_s", "ns_per_param", "most_asked_of_mean"] {
        assert!(row[number].as_f64().unwrap() > 0.0, "{number}: {row}");
    }
    // The embedding is tied: what both ranks read is the model, and a copy of its norms for one of them.
    let wire = row["wire_bytes"].as_u64().unwrap();
    assert!((8_044_000_000..8_046_000_000).contains(&wire), "{wire}");
    assert!(row["peak_bytes"].as_u64().unwrap() > 1 << 20, "{row}");

    let layouts = folder.path().join("layouts");
    let output = refit(&[
        "bench-plan",
        "--preset",
        "llama-70b-8to4",
        "--layouts",
        layouts.to_str().unwrap(),
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_str(&fs::read_to_string(layouts.join(name)).unwrap()).unwrap()
    };
    assert_eq!(read("sides.json")["source"]["layouts"], 8);
    assert_eq!(read("source-7.json")["rank"], 7);
    assert_eq!(read("target-3.json")["params"].as_array().unwrap().len(), 80 * 6 + 3);

    let output = refit(&["bench-plan", "--preset", "gpt-2"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("kimi-k2-256x128"), "{}", stderr(&output));
    let output = refit(&["bench-plan", "--json", "/nowhere/plan.json", "--preset", "qwen3-4b"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("cannot write /nowhere/plan.json"), "{}", stderr(&output));
}

#[test]
fn verify_replays_golden_cases() {
    let output = refit(&[
        "verify",
        &golden_text("qwen3_tp4_to_tp2"),
        &golden_text("qwen2_pp2_tied_to_tp2_te"),
    ]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert_eq!(text.lines().filter(|line| line.starts_with("ok ")).count(), 2, "{text}");
    assert_eq!(text.lines().last(), Some("2 passed, 0 failed"));
}

#[test]
fn verify_finds_every_case_of_a_folder() {
    let output = refit(&["verify", &golden_text("..")]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.lines().last().unwrap().ends_with("passed, 0 failed"), "{text}");
}

#[test]
fn verify_names_the_first_wrong_byte() {
    let case = copy("qwen3_tp4_to_tp2");
    let file = case.path().join("target/rank1.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&file, bytes).unwrap();
    let output =
        refit(&["verify", case.path().to_str().unwrap(), &golden_text("qwen3_tp4_to_tp2")]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("target rank 1: `model.norm.weight` is wrong from byte 127 on"),
        "{text}"
    );
    assert_eq!(text.lines().last(), Some("1 passed, 1 failed"));
}

#[test]
fn verify_says_which_file_is_broken() {
    type Break = fn(&Path);
    let breaks: [(&str, Break); 6] = [
        ("rank2.safetensors", |case| {
            let file = case.join("source/rank2.safetensors");
            let bytes = fs::read(&file).unwrap();
            fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
        }),
        ("rank0.safetensors", |case| {
            fs::write(case.join("target/rank0.safetensors"), b"").unwrap()
        }),
        ("case.json", |case| fs::write(case.join("case.json"), "{\"schema\": 1").unwrap()),
        ("schema 2", |case| fs::write(case.join("case.json"), "{\"schema\": 2}").unwrap()),
        ("config.json", |case| fs::remove_file(case.join("config.json")).unwrap()),
        ("neither a case", |case| fs::remove_file(case.join("case.json")).unwrap()),
    ];
    for (named, break_it) in breaks {
        let case = copy("qwen3_tp4_to_tp2");
        break_it(case.path());
        let output = refit(&["verify", case.path().to_str().unwrap()]);
        let text = stdout(&output);
        assert_eq!(output.status.code(), Some(2), "{named}: {text}");
        assert!(text.contains(named), "{named}: {text}");
        assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
        assert_eq!(text.lines().last(), Some("0 passed, 1 failed"));
    }
}

#[test]
fn verify_refuses_tensors_of_another_model() {
    let case = copy("qwen3_tp4_to_tp2");
    let config = fs::read_to_string(case.path().join("config.json")).unwrap();
    let smaller = config.replace("\"intermediate_size\": 176", "\"intermediate_size\": 160");
    assert_ne!(config, smaller);
    fs::write(case.path().join("config.json"), smaller).unwrap();
    let output = refit(&["verify", case.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("linear_fc1.weight"), "{}", stdout(&output));
}

#[test]
fn plan_prints_json() {
    let output = refit(&["plan", "--source", "tp=4,pp=2", "--target", "tp=2", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(plan["ranks"].as_array().unwrap().len(), 2);
    for rank in plan["ranks"].as_array().unwrap() {
        assert_eq!(rank["amplification"], 1.0);
        assert_eq!(rank["wire_bytes"], rank["needed_bytes"]);
        assert_eq!(rank["plan_hash"].as_str().unwrap().len(), 64);
        assert!(rank["reads"].as_u64().unwrap() < 1000);
    }
}

#[test]
fn plan_shows_what_packing_saves() {
    let plan = |more: &[&str]| -> serde_json::Value {
        let sizes = ["plan", "--source", "tp=2", "--target", "tp=4", "--json"];
        let output = refit(&[&sizes, more].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let (plain, packed) = (plan(&[]), plan(&["--pack"]));
    assert!(plain.get("packed").is_none());
    assert_eq!(packed["packed"].as_array().unwrap().len(), 2);
    for rank in 0..4 {
        let (plain, packed) = (&plain["ranks"][rank], &packed["ranks"][rank]);
        assert_eq!(plain["needed_bytes"], packed["needed_bytes"]);
        assert!(plain["amplification"].as_f64().unwrap() > 1.3);
        assert_eq!(
            (&packed["wire_bytes"], &packed["staging_bytes"]),
            (&packed["needed_bytes"], &0.into())
        );
    }
    // Asked for by every rank, also where only one is shown.
    assert_eq!(plan(&["--pack", "--rank", "3"])["packed"], packed["packed"]);
    let output = refit(&["plan", "--source", "tp=4", "--target", "tp=2", "--pack"]);
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.contains("packed: nothing"), "{printed}");
}

#[test]
fn plan_takes_sizes_of_experts_and_chunks() {
    let source = "tp=2,pp=2,vpp=3,dp=2,ep=2,etp=2";
    let output = refit(&["plan", "--source", source, "--target", "tp=2,dp=2,ep,sp", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(plan["source"], "TP2 PP2 VPP3 DP2 EP2 ETP2");
    assert_eq!(
        (&plan["target"], plan["ranks"].as_array().unwrap().len()),
        (&"TP2 DP2 EP SP".into(), 4)
    );
}

#[test]
fn verify_reads_the_chunks_of_a_rank() {
    let case = copy("qwen3_tp4_to_tp2");
    let path = case.path().join("case.json");
    let text: String = fs::read_to_string(&path).unwrap().split_whitespace().collect();
    let chunks = text.replace("\"layers\":[0,1]", "\"chunks\":[[0,1]]");
    assert_ne!(text, chunks);
    fs::write(&path, &chunks).unwrap();
    let output = refit(&["verify", case.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    // Two chunks' tensors would be told apart by their names.
    fs::write(&path, chunks.replace("[[0,1]]", "[[0],[1]]")).unwrap();
    let output = refit(&["verify", case.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("holds no `model0.decoder.layers.0."), "{}", stdout(&output));
}

#[test]
fn mistakes_are_one_line_and_status_2() {
    let mistakes: [(&[&str], &str); 16] = [
        (&["plan", "--config", "no-such-model"], "bundled are: qwen3-4b"),
        (&["plan", "--source", "tp=3"], "megatron tp_size = 3"),
        (&["plan", "--source", "tp=0"], "between 1 and 4096"),
        (&["plan", "--source", "4"], "name=size"),
        (&["plan", "--source", "tp=2,cp=2"], "`cp` is not a size"),
        (&["plan", "--source", "tp=2,ep=2,dp=3,etp=4"], "ep_size * etp_size = 8"),
        (&["plan", "--target", "tp=2,ep=2"], "`ep` takes no size"),
        (&["plan", "--target", "tp=2,sp"], "sequence-parallel MoE"),
        (&["plan", "--target", "tp=2,pp=2"], "pipeline stages"),
        (&["plan", "--source", "pp=5"], "pp_size = 5"),
        (&["plan", "--rank", "2"], "ranks 0..2"),
        (&["plan", "--config", "mixtral-8x7b", "--source", "ep=3"], "number of experts = 8"),
        (&["plan", "--config", "mixtral-8x7b", "--target", "tp=8,dp=2,ep"], "8 experts leave some"),
        (&["plan", "--config", "gpt-oss-20b", "--target", "tp=16"], "num_key_value_heads = 8"),
        (&["bench", "--layers", "40"], "the model has 36"),
        (&["bench", "--source", "tp=7", "--layers", "1"], "tp_size = 7"),
    ];
    for (arguments, named) in mistakes {
        let output = refit(arguments);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {text}");
        assert!(text.contains(named), "{arguments:?}: {text}");
        assert!(!text.contains("panicked"), "{text}");
    }
}

/// What is said about memory and transports that do not go together, in every build.
#[test]
fn memory_and_transports_that_do_not_fit_are_one_line_and_status_2() {
    let of = ["pull", "--rendezvous", "dir:x", "--rank", "0", "--target", "tp=1"];
    let peer = [&of[..], &["--transport", "peer"]].concat();
    let mistakes: [(&[&str], &str); 7] = [
        (&peer, "add --gpu N, or take --transport nixl"),
        (&["bench", "--transport", "peer"], "add --device cuda, or take --transport nixl or local"),
        (&["verify", "--transport", "peer", "x"], "add --device cuda"),
        (&["bench", "--device", "cuda", "--transport", "local"], "take --transport auto, peer or"),
        (&["verify", "--device", "cuda", "--transport", "local", "x"], "moves host memory only"),
        (&["bench", "--source-devices", "0,1"], "add --device cuda"),
        (&["bench", "--target-devices", "1"], "add --device cuda"),
    ];
    for (arguments, named) in mistakes {
        let output = refit(arguments);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {text}");
        assert!(text.contains(named) && text.lines().count() == 1, "{arguments:?}: {text}");
    }
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_build_without_cuda_says_so() {
    for arguments in [&["bench", "--device", "cuda"][..], &["verify", "--device=cuda", "x"]] {
        let output = refit(arguments);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains("no CUDA") && text.contains("--features cuda"), "{text}");
    }
}

/// What a machine without GPUs says, which is one line with advice; and on one that has some, what is said about one that
/// it has not.
#[cfg(feature = "cuda")]
#[test]
fn gpus_that_are_not_there_are_one_line_and_status_2() {
    for arguments in [
        &["bench", "--device", "cuda", "--layers", "1", "--source-devices", "4096"][..],
        &["bench", "--device", "cuda", "--layers", "1", "--target-devices", "0,4096"],
    ] {
        let output = refit(arguments);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{text}");
        let said =
            ["install the NVIDIA driver", "CUDA_VISIBLE_DEVICES", "counted from 0", "answered"];
        assert!(said.iter().any(|said| text.contains(said)), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
    let output = refit(&["verify", "--device", "cuda", &golden_text("qwen3_tp4_to_tp2")]);
    match output.status.code() {
        Some(0) => assert!(stdout(&output).ends_with("1 passed, 0 failed\n"), "{output:?}"),
        code => {
            assert_eq!(code, Some(2), "{output:?}");
            assert!(stderr(&output).starts_with("refit: GPUs cannot be used"), "{output:?}");
        }
    }
}

/// A bench small enough for a test, as JSON.
fn bench(transport: &str, also: &[&str]) -> serde_json::Value {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.json");
    let tiny = r#"{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16",
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 1000, "tie_word_embeddings": false}"#;
    fs::write(&config, tiny).unwrap();
    let config = ["--config", config.to_str().unwrap()];
    let sizes = ["--source=tp=4", "--target=tp=2"];
    let sizes = if also.iter().any(|word| word.starts_with("--source")) { &[][..] } else { &sizes };
    bench_of(transport, &[&config[..], sizes, also].concat())
}

fn bench_of(transport: &str, also: &[&str]) -> serde_json::Value {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("out.json");
    let always = ["bench", "--layers=2", "--cycles=2", "--transport", transport, "--json"];
    let output = refit(&[&always[..], &[json.to_str().unwrap()], also].concat());
    assert_eq!(output.status.code(), Some(0), "{}{}", stdout(&output), stderr(&output));
    serde_json::from_slice(&fs::read(json).unwrap()).unwrap()
}

fn check_bench(result: &serde_json::Value) {
    let cycles = result["cycles"].as_array().unwrap();
    let modes: Vec<&str> = cycles.iter().map(|cycle| cycle["mode"].as_str().unwrap()).collect();
    assert_eq!(modes, ["uncached", "cached", "read_per_run", "uncached", "cached", "read_per_run"]);
    for cycle in cycles {
        let times = ["plan_s", "alloc_s", "register_s", "prepare_s", "pull_s", "land_s", "total_s"];
        assert!(times.iter().all(|name| cycle[name].is_f64()), "{cycle}");
        assert_eq!(cycle["wire_bytes"], cycle["needed_bytes"]);
        let done = ["plans", "allocations", "registrations", "prepared_reads"];
        let idle = done.iter().all(|name| cycle[name] == 0);
        assert_eq!(idle, cycle["mode"] == "cached", "{cycle}");
        // Two ranks: parameters and staging each.
        assert!(cycle["registrations"].as_u64().unwrap() <= 4, "{cycle}");
    }
    for ceiling in ["memcpy_gbps", "big_read_gbps"] {
        assert!(result["ceilings"][ceiling].as_f64().unwrap() > 0.0);
    }
    let pair = &result["pairs"][0];
    assert_eq!(pair["receivers"].as_array().unwrap().len(), 2);
    let list = |value: &serde_json::Value| value.as_array().unwrap().clone();
    let (receivers, reads) = (list(&pair["receivers"]), list(&pair["reads"]));
    for ((receiver, reads), rank) in receivers.iter().zip(reads).zip(list(&cycles[0]["ranks"])) {
        for number in ["seconds", "gbps", "of_big_read", "ready_s", "posting_s", "cold_seconds"] {
            assert!(receiver[number].as_f64().unwrap() > 0.0, "{number}: {receiver}");
        }
        // Each reads from two of the four, and what is replicated from any of them.
        let routes = reads["routes"].as_object().unwrap();
        assert!((2..=4).contains(&routes.len()), "{reads}");
        assert!(routes.values().all(|route| *route == result["transport"]), "{reads}");
        let moved = |way: &str| reads[way]["bytes"].as_u64().unwrap();
        let wire = rank["wire_bytes"].as_u64().unwrap();
        assert_eq!(moved("direct") + moved("staged"), wire, "{reads}");
    }
}

#[test]
fn bench_verifies_every_byte_in_one_process() {
    check_bench(&bench("local", &["--read-per-row"]));
}

/// Parameters of the trainer in allocations of their own are registered one by one; the engine's are in one.
#[test]
fn bench_takes_sources_without_an_arena() {
    let separate = bench("local", &["--separate"]);
    assert_eq!(separate["separate_sources"], true);
    let regions = |result: &serde_json::Value| result["cycles"][0]["registrations"].as_u64();
    assert_eq!(regions(&separate), regions(&bench("local", &[])));
}

/// A transport that reads rows by itself asks for nothing to be packed.
#[test]
fn bench_packs_nothing_that_is_read_well_as_it_is() {
    let packed = bench("local", &["--source=tp=1", "--target=tp=2", "--pack"]);
    assert!(packed["pairs"][0]["packed"].is_null());
}

/// One trainer rank packs for two of the engine what each would read row by row: the same bytes, fewer reads.
#[cfg(feature = "nixl")]
#[test]
fn bench_takes_sources_that_pack() {
    let sizes = ["--source=tp=1", "--target=tp=2"];
    let (plain, packed) =
        (bench("nixl", &sizes), bench("nixl", &[&sizes[..], &["--pack"]].concat()));
    let first = |result: &serde_json::Value, count: &str| result["cycles"][0][count].as_u64();
    assert_eq!(first(&plain, "needed_bytes"), first(&packed, "needed_bytes"));
    assert_eq!(first(&packed, "wire_bytes"), first(&packed, "needed_bytes"));
    let more = |count: &str| first(&plain, count) > first(&packed, count);
    assert!(more("wire_bytes") || more("reads"), "{}", plain["cycles"][0]);
    assert!(packed["pairs"][0]["packed"]["bytes"].as_u64().unwrap() > 0);
    assert!(plain["pairs"][0]["packed"].is_null());
}

/// Models of which the trainer stores some parameters in f32, and one of which the engine stores as something else.
#[test]
fn bench_takes_models_with_more_than_one_element_type() {
    for (case, sizes) in [
        ("nemotronh_tp2_to_tp4_te", ["--source=tp=2", "--target=tp=4"]),
        ("qwen3next_tp2ep2_to_tp4_te", ["--source=tp=2,ep=2", "--target=tp=4"]),
        ("deepseekv3_tp2ep2_to_tp2", ["--source=tp=2,ep=2", "--target=tp=2"]),
    ] {
        let config = golden(case).join("config.json");
        let result = bench_of("local", &["--config", config.to_str().unwrap(), sizes[0], sizes[1]]);
        assert_eq!(result["cycles"].as_array().unwrap().len(), 4, "{case}");
        assert!(result["cycles"][0]["needed_bytes"].as_u64().unwrap() > 0, "{case}");
    }
}

#[cfg(feature = "nixl")]
#[test]
fn bench_verifies_every_byte_between_processes_over_nixl() {
    check_bench(&bench("nixl", &["--read-per-row"]));
}

#[cfg(feature = "nixl")]
#[test]
fn verify_replays_over_nixl() {
    let output =
        refit(&["verify", "--transport", "nixl", &golden_text("qwen3_fp32norm_tp2_to_tp1")]);
    assert_eq!(stdout(&output).lines().last(), Some("1 passed, 0 failed"), "{}", stderr(&output));
}

#[cfg(not(feature = "nixl"))]
#[test]
fn a_build_without_nixl_says_so() {
    for arguments in
        [["verify", "--transport", "nixl", "x"], ["bench", "--transport", "nixl", "--layers=1"]]
    {
        let output = refit(&arguments);
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains("no NIXL"), "{}", stderr(&output));
    }
}

/// Every plan in the documentation is what its command prints, times apart.
#[test]
fn documented_plans_are_what_the_command_prints() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/plans");
    let listed = fs::read_to_string(folder.join("README.md")).unwrap();
    let timeless = |text: &[u8]| {
        let mut plan: serde_json::Value = serde_json::from_slice(text).unwrap();
        for rank in plan["ranks"].as_array_mut().unwrap() {
            for time in ["plan_s", "lower_s"] {
                assert!(rank.as_object_mut().unwrap().remove(time).is_some_and(|it| it.is_f64()));
            }
        }
        plan
    };
    let mut plans = 0;
    for row in listed.lines().filter(|row| row.starts_with("| [")) {
        let (file, rest) = row[3..].split_once(']').unwrap();
        let command = rest.split('`').nth(1).unwrap();
        let arguments: Vec<&str> = command.split(' ').collect();
        assert_eq!(arguments[0], "refit", "{command}");
        let output = refit(&arguments[1..]);
        assert_eq!(output.status.code(), Some(0), "{command}: {}", stderr(&output));
        let documented = fs::read(folder.join(file)).unwrap();
        let (documented, printed) = (timeless(&documented), timeless(&output.stdout));
        assert!(
            documented == printed,
            "docs/plans/{file} is out of date: {command} > docs/plans/{file}"
        );
        plans += 1;
    }
    let files = fs::read_dir(&folder).unwrap().count() - 1;
    assert!(plans > 0 && plans == files, "{plans} of {files} plans are listed");
}
