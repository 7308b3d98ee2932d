//! Every role against golden runs: one parameter at a time, sharded by the trainer's and by the engine's own code.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "the lint spares test functions, not what they call"
)]

use std::sync::Arc;

use refit::planner::{
    Dtype, LayoutBuilder, Plan, PlanOptions, RankLayout, Replicas, SourceLayout, plan,
};
use refit_tests::execute;
use refit_tests::golden::{self, RoleLine};
use refit_translate::roles::{
    Column, GatedMlp, GatedQkv, GdnBa, GdnConv, GdnInProj, GdnLayout, GdnQkvz, InterleavedMlp,
    MambaConv, MambaInProj, Over, Placement, Qkv, Role, Row, SourceCoords, SourceRole, Stack,
    TargetCoords, TargetRole, View, Vocab,
};
use refit_translate::{Gdn, Mamba};

/// Golden values are 32-bit integers, so nothing is cast and every element is four bytes.
const DTYPE: Dtype = Dtype::I32;

type CaseOf = fn(&RoleLine) -> Case;

/// Every golden file that is looked at, and what its lines stand for.
const ROLES: &[(&str, CaseOf)] = &[
    ("column", |line| {
        pair(line, Column { what: "R", rows: line.size("R"), cols: Some(line.size("C")) })
    }),
    ("row", |line| pair(line, Row { rows: line.size("R"), what: "C", cols: line.size("C") })),
    ("qkv", |line| pair(line, qkv(line, Some(line.size("H"))))),
    ("qkv_bias", |line| pair(line, qkv(line, None))),
    ("gated_mlp", |line| pair(line, gated(line))),
    ("moe_w13", |line| experts(line, gated(line), gated(line))),
    ("moe_w2", |line| experts(line, down(line), down(line))),
    ("gptoss_w13", |line| {
        let GatedMlp { what, intermediate, cols } = gated(line);
        experts(line, gated(line), InterleavedMlp { what, intermediate, cols })
    }),
    ("gptoss_w2", |line| experts(line, down(line), down(line))),
    ("vocab", |line| pair(line, Vocab { tokens: line.size("V"), cols: line.size("H") })),
    ("qkv_gated", |line| {
        let Qkv { heads, kv_heads, head_dim, cols } = qkv(line, Some(line.size("H")));
        pair(line, GatedQkv { heads, kv_heads, head_dim, cols })
    }),
    ("mamba_in_proj", |line| {
        pair(line, MambaInProj { sizes: mamba(line, line.size("hd")), cols: line.src_shapes[0][1] })
    }),
    // These lines do not say how large a head is; it follows from the channels.
    ("mamba_conv1d", |line| {
        let channels: u64 = line.src_shapes.iter().map(|shape| shape[0]).sum();
        let inner = channels - 2 * line.size("ng") * line.size("ds");
        let sizes = mamba(line, inner / line.size("nheads"));
        pair(line, MambaConv { sizes, kernel: Some(line.src_shapes[0][2]) })
    }),
    ("gdn_int_qkvz", |line| {
        let source = gdn_in_proj(line, GdnLayout::Interleaved);
        one_of(line, source, &["qkvz", "ba"], GdnQkvz(source), &["qkvz"])
    }),
    ("gdn_int_ba", |line| {
        let source = gdn_in_proj(line, GdnLayout::Interleaved);
        one_of(line, source, &["qkvz", "ba"], GdnBa(source), &["ba"])
    }),
    ("gdn_flat_qkvz", |line| {
        let source = gdn_in_proj(line, GdnLayout::Flat);
        one_of(line, source, &["qkv", "z", "b", "a"], GdnQkvz(source), &["qkv", "z"])
    }),
    ("gdn_flat_ba", |line| {
        let source = gdn_in_proj(line, GdnLayout::Flat);
        one_of(line, source, &["qkv", "z", "b", "a"], GdnBa(source), &["b", "a"])
    }),
    // Nor do these: key heads are two channels wide, as in the lines of the input projections.
    ("gdn_conv", |line| {
        let (keys, values) = (line.size("nk"), line.size("nv"));
        let channels: u64 = line.src_shapes.iter().map(|shape| shape[0]).sum();
        let dims = (2, (channels - 2 * keys * 2) / values);
        let kernel = line.src_shapes[0][2];
        pair(line, GdnConv { sizes: Gdn::new((keys, values), dims, kernel) })
    }),
];

fn gated(line: &RoleLine) -> GatedMlp {
    GatedMlp { what: "I", intermediate: line.size("I"), cols: Some(line.size("H")) }
}

fn down(line: &RoleLine) -> Row {
    Row { rows: line.size("H"), what: "I", cols: line.size("I") }
}

fn mamba(line: &RoleLine, head_dim: u64) -> Mamba {
    Mamba::new((line.size("nheads"), head_dim), (line.size("ng"), line.size("ds")), 4)
}

fn gdn_in_proj(line: &RoleLine, layout: GdnLayout) -> GdnInProj {
    let (heads, dims) = ((line.size("nk"), line.size("nv")), (line.size("dk"), line.size("dv")));
    GdnInProj { sizes: Gdn::new(heads, dims, 4), layout, cols: line.src_shapes[0][1] }
}

fn qkv(line: &RoleLine, cols: Option<u64>) -> Qkv {
    Qkv { heads: line.size("nh"), kv_heads: line.size("ng"), head_dim: line.size("hd"), cols }
}

/// What one line is about: the source tensors, in its order, and the target's.
struct Case {
    sources: Vec<Held<Box<dyn SourceRole>, SourceCoords>>,
    target: Held<Box<dyn TargetRole>, TargetCoords>,
}

/// A tensor: its role, where its rank stands, and what its logical tensors are called.
struct Held<R, C> {
    role: R,
    at: C,
    logical: Vec<String>,
}

impl<R, C> Held<R, C> {
    fn new(role: R, at: C, logical: Vec<String>) -> Self {
        Self { role, at, logical }
    }
}

/// A parameter that both sides have, sharded over tensor-parallel ranks.
fn pair(line: &RoleLine, role: impl SourceRole + TargetRole + Copy + 'static) -> Case {
    let logical: Vec<String> =
        (0..role.logical().unwrap().len()).map(|tensor| tensor.to_string()).collect();
    let source = |rank| {
        let at = SourceCoords::new(rank, line.source_tp()).unwrap();
        Held::new(Box::new(role) as Box<dyn SourceRole>, at, logical.clone())
    };
    let at = TargetCoords::new(line.dst_rank, line.target_tp()).unwrap();
    Case {
        sources: (0..line.source_tp()).map(source).collect(),
        target: Held::new(Box::new(role), at, logical.clone()),
    }
}

/// One trainer parameter per local expert, one engine parameter of all: source tensors come by expert, then by expert
/// tensor-parallel rank.
fn experts(
    line: &RoleLine,
    source: impl SourceRole + Copy + 'static,
    target: impl TargetRole + 'static,
) -> Case {
    let tensors = source.logical().unwrap().len();
    let logical = |experts: &[u64]| {
        let name = |expert| (0..tensors).map(move |tensor| format!("{expert}.{tensor}"));
        experts.iter().flat_map(name).collect()
    };
    // Lines that say nothing have one trainer rank, and an engine that shares out every expert.
    let count = |key| if line.cfg.contains_key(key) { line.count(key) } else { 1 };
    let (total, ep, etp) = (line.size("E"), count("ep"), count("etp"));
    let mut sources = Vec::new();
    for ep_rank in 0..ep {
        let at = SourceCoords::new(0, 1).unwrap().with_ep(ep_rank, ep).unwrap();
        for expert in at.experts(total).unwrap() {
            sources.extend((0..etp).map(|etp_rank| {
                let at = at.with_etp(etp_rank, etp).unwrap();
                let role: Box<dyn SourceRole> = Box::new(Over::routed_experts(source));
                Held::new(role, at, logical(&[expert]))
            }));
        }
    }
    let mut at = TargetCoords::new(0, 1).unwrap();
    at = at.with_flat(line.dst_rank, line.target_tp()).unwrap();
    match line.cfg.get("dst").map(|_| line.word("dst")) {
        Some("ep") => at = at.with_expert_parallel(Placement::Linear),
        Some("tp") | None => {}
        Some(other) => panic!("experts spread by {other}"),
    }
    let local = at.experts(total).unwrap();
    let role = Stack { count: local.len() as u64, each: Over::routed_experts(target) };
    Case { sources, target: Held::new(Box::new(role), at, logical(&local)) }
}

/// A trainer parameter of which the engine parameter has a part.
fn one_of(
    line: &RoleLine,
    source: impl SourceRole + Copy + 'static,
    held: &[&str],
    target: impl TargetRole + 'static,
    wanted: &[&str],
) -> Case {
    let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
    let held_by = |rank| {
        let at = SourceCoords::new(rank, line.source_tp()).unwrap();
        Held::new(Box::new(source) as Box<dyn SourceRole>, at, names(held))
    };
    let at = TargetCoords::new(line.dst_rank, line.target_tp()).unwrap();
    Case {
        sources: (0..line.source_tp()).map(held_by).collect(),
        target: Held::new(Box::new(target), at, names(wanted)),
    }
}

fn layout(rank: u32, role: &dyn Role, view: &View, logical: &[String]) -> RankLayout {
    let mut layout = LayoutBuilder::new(rank);
    let param = view.param(&mut layout, role, &Arc::from("w"), DTYPE, logical).unwrap();
    layout.param(param).unwrap();
    layout.build()
}

/// Plans a line; source tensors are ranks of their own, so that runs can name them.
fn planned(line: &RoleLine, case: &Case) -> Plan {
    let mut source = Vec::new();
    assert_eq!(case.sources.len(), line.src_shapes.len(), "source tensors");
    for (number, (held, shape)) in (0..).zip(case.sources.iter().zip(&line.src_shapes)) {
        let view = held.role.megatron(&held.at, Some(shape)).unwrap();
        assert_eq!(&view.shape, shape, "shape of source tensor {number}");
        source.push(layout(number, held.role.as_ref(), &view, &held.logical));
    }
    let Held { role, at, logical } = &case.target;
    let view = role.vllm(at).unwrap();
    // Some lines have the view's shape instead of the parameter's.
    assert!(
        line.dst_shape == view.shape || line.dst_shape == [view.rows, view.cols],
        "shape of the target rank: {:?}",
        view.shape
    );
    let options = PlanOptions::default().with_replicas(Replicas::Lowest);
    let target = layout(line.dst_rank, role.as_ref(), &view, logical);
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
    line.cfg.get("V")?;
    let elements = line.size("V") * line.size("H");
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

fn check(name: &str, case_of: CaseOf) {
    let lines = golden::role(&golden::root(), name).unwrap();
    assert!(!lines.is_empty(), "no golden lines for {name}");
    let mut with_values = 0;
    for (number, line) in (1..).zip(&lines) {
        let plan = planned(line, &case_of(line));
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
fn every_role_is_laid_out_as_by_the_frameworks() {
    for &(name, case_of) in ROLES {
        check(name, case_of);
    }
}

/// Says which golden roles no test looks at.
#[test]
fn roles_that_are_not_covered() {
    for name in golden::roles(&golden::root()).unwrap() {
        if !ROLES.iter().any(|&(known, _)| known == name) {
            println!("role {name}: not covered");
        }
    }
}
