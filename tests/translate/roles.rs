//! Every role against golden runs: one parameter at a time, sharded by the trainer's and by the engine's own code.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "the lint spares test functions, not what they call"
)]

use std::collections::BTreeMap;
use std::sync::Arc;

use refit::planner::{
    Dtype, LayoutBuilder, Plan, PlanOptions, RankLayout, Replicas, SourceLayout, plan,
};
use refit_tests::execute;
use refit_tests::golden::{self, RoleLine};
use refit_translate::roles::{
    Column, GatedMlp, Qkv, Role, Row, SourceCoords, TargetCoords, View, Vocab,
};

/// Golden values are 32-bit integers, so nothing is cast and every element is four bytes.
const DTYPE: Dtype = Dtype::I32;
const NAMES: [&str; 3] = ["first", "second", "third"];

/// The role of a golden file with one line's extents; `None` for roles that are not there yet.
fn role_of(name: &str, cfg: &BTreeMap<String, u64>) -> Option<Box<dyn Role>> {
    let qkv = |cols| Qkv { heads: cfg["nh"], kv_heads: cfg["ng"], head_dim: cfg["hd"], cols };
    Some(match name {
        "column" => Box::new(Column { what: "R", rows: cfg["R"], cols: Some(cfg["C"]) }),
        "row" => Box::new(Row { rows: cfg["R"], what: "C", cols: cfg["C"] }),
        "qkv" => Box::new(qkv(Some(cfg["H"]))),
        "qkv_bias" => Box::new(qkv(None)),
        "gated_mlp" => Box::new(GatedMlp { intermediate: cfg["I"], cols: cfg["H"] }),
        "vocab" => Box::new(Vocab { tokens: cfg["V"], cols: cfg["H"] }),
        _ => return None,
    })
}

fn layout(rank: u32, role: &dyn Role, view: &View) -> RankLayout {
    let mut layout = LayoutBuilder::new(rank);
    let names = &NAMES[..role.logical().unwrap().len()];
    view.place(&mut layout, role, &Arc::from("w"), DTYPE, names).unwrap();
    layout.build()
}

fn planned(line: &RoleLine, role: &dyn Role) -> Plan {
    let mut source = Vec::new();
    for (rank, shape) in (0..line.src_tp).zip(&line.src_shapes) {
        let at = SourceCoords::new(rank, line.src_tp).unwrap();
        let view = role.megatron(&at, Some(shape)).unwrap();
        assert_eq!(&view.shape, shape, "shape of source rank {rank}");
        source.push(layout(rank, role, &view));
    }
    let at = TargetCoords::new(line.dst_rank, line.dst_tp).unwrap();
    let view = role.vllm(&at).unwrap();
    assert_eq!(view.shape, line.dst_shape, "shape of the target rank");
    let options = PlanOptions::default().with_replicas(Replicas::Lowest);
    let target = layout(line.dst_rank, role, &view);
    plan(&SourceLayout::new(source).unwrap(), &target, &options).unwrap()
}

/// The plan's segments one run at a time, by target element, neighbours merged.
fn runs(plan: &Plan) -> Vec<(u32, u64, u64, u64)> {
    let mut runs = Vec::new();
    for segment in plan.segments() {
        let tensor = plan.sources()[segment.source as usize].rank;
        for (from, into) in segment.dims.offsets() {
            let (from, into) = (segment.source_offset + from, segment.target_offset + into);
            runs.push((tensor, from / 4, into / 4, segment.run / 4));
        }
    }
    runs.sort_unstable_by_key(|&(_, _, into, _)| into);
    let mut merged: Vec<(u32, u64, u64, u64)> = Vec::new();
    for run in runs {
        match merged.last_mut() {
            Some(last)
                if last.0 == run.0 && last.1 + last.3 == run.1 && last.2 + last.3 == run.2 =>
            {
                last.3 += run.3;
            }
            _ => merged.push(run),
        }
    }
    merged
}

/// The golden vocabulary comes without its source values, which are the logical elements' numbers from 1; rows of
/// padding get a value that no target may show.
fn numbered(line: &RoleLine) -> Option<Vec<Vec<i32>>> {
    let elements = line.cfg.get("V")? * line.cfg["H"];
    let value = |number: u64| if number <= elements { i32::try_from(number).unwrap() } else { -1 };
    let mut next = 1;
    let mut shard = |shape: &Vec<u64>| {
        let first = next;
        next += shape.iter().product::<u64>();
        (first..next).map(value).collect()
    };
    Some(line.src_shapes.iter().map(&mut shard).collect())
}

fn bytes(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn check(name: &str) {
    let lines = golden::role(&golden::root(), name).unwrap();
    assert!(!lines.is_empty(), "no golden lines for {name}");
    let mut with_values = 0;
    for (number, line) in (1..).zip(&lines) {
        let role = role_of(name, &line.cfg).unwrap();
        let plan = planned(line, role.as_ref());
        assert_eq!(runs(&plan), line.runs, "{name}, line {number}: {:?}", line.cfg);
        let src = line.src.clone().or_else(|| numbered(line));
        if let (Some(src), Some(dst)) = (&src, &line.dst) {
            let held = |values: &Vec<i32>| [("w".to_owned(), bytes(values))].into();
            let sources = (0..).zip(src.iter().map(held)).collect();
            assert_eq!(execute::plan(&plan, &sources)["w"], bytes(dst), "{name}, line {number}");
            with_values += 1;
        }
    }
    println!("{name}: {} lines, {with_values} of them with values", lines.len());
}

#[test]
fn column() {
    check("column");
}

#[test]
fn row() {
    check("row");
}

#[test]
fn qkv() {
    check("qkv");
}

#[test]
fn qkv_bias() {
    check("qkv_bias");
}

#[test]
fn gated_mlp() {
    check("gated_mlp");
}

#[test]
fn vocab() {
    check("vocab");
}

/// Says which golden roles no test looks at.
#[test]
fn roles_that_are_not_covered() {
    for name in golden::roles(&golden::root()).unwrap() {
        let any: BTreeMap<String, u64> =
            ["R", "C", "nh", "ng", "hd", "H", "I", "V"].map(|key| (key.to_owned(), 1)).into();
        if role_of(&name, &any).is_none() {
            println!("role {name}: not covered");
        }
    }
}
