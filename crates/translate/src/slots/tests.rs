//! What no family needs so far: sides that differ, sets to choose from, parameters of their own element type.

use alloc::string::ToString;
use alloc::vec;

use refit_planner::{Plan, PlanOptions, RankLayout, SourceLayout, plan};

use super::*;
use crate::megatron::{self, LayerSpec, SourceRank, TrainerOptions};
use crate::roles::{Column, GatedMlp, Over, Part, Placement, Role, Stack, View};
use crate::vllm::{self, TargetRank};
use crate::{Family, ModelConfig, TensorSpec, TranslateError};

const EXPERTS: u64 = 6;

fn config() -> ModelConfig {
    ModelConfig::new(Family::Qwen3)
}

/// A table: one layer's slots, global number 7, local number 1.
type Table = fn(&mut Slots);

fn fill(place: Place, table: Table) -> Slots {
    let mut slots = Slots::new(place);
    slots.layer_scope(Layer { local: 1, global: 7 });
    table(&mut slots);
    slots
}

fn rank(number: u32) -> SourceRank {
    SourceRank::new(number, vec![0])
}

fn expected(at: SourceCoords, table: Table, options: &TrainerOptions) -> Vec<TensorSpec> {
    let slots = fill(Place::Source(at), table).into_source();
    megatron::expect(&config(), &rank(0), &at, slots, options).unwrap()
}

fn source(
    number: u32,
    at: SourceCoords,
    table: Table,
    held: &[TensorSpec],
) -> Result<RankLayout, TranslateError> {
    let slots = fill(Place::Source(at), table).into_source();
    megatron::lay_out(&config(), &rank(number), &at, &slots, held)
}

fn target(at: TargetCoords, table: Table) -> (Vec<TensorSpec>, RankLayout) {
    let slots = || fill(Place::Target(at), table).into_target();
    let rank = TargetRank::new(0, 0, 1);
    let held = vllm::expect(&config(), &rank, &at, slots()).unwrap();
    let layout = vllm::lay_out(&config(), &rank, &at, slots(), &held).unwrap().layout;
    (held, layout)
}

/// The target's plan over these trainer ranks, which hold what is expected of them.
fn planned(sources: &[SourceCoords], at: TargetCoords, table: Table) -> Plan {
    let layout = |(number, &at): (u32, &SourceCoords)| {
        source(number, at, table, &expected(at, table, &TrainerOptions::default())).unwrap()
    };
    let layouts = (0..).zip(sources).map(layout);
    let sources = SourceLayout::new(layouts.collect::<Vec<_>>()).unwrap();
    plan(&sources, &target(at, table).1, &PlanOptions::default()).unwrap()
}

fn names(held: &[TensorSpec]) -> Vec<&str> {
    held.iter().map(|spec| spec.name.as_ref()).collect()
}

fn trainer(tp_rank: u32, tp_size: u32) -> SourceCoords {
    SourceCoords::new(tp_rank, tp_size).unwrap()
}

fn engine(tp_rank: u32, tp_size: u32) -> TargetCoords {
    TargetCoords::new(tp_rank, tp_size).unwrap()
}

/// One trainer parameter per expert, one engine parameter of all of them.
fn experts(slots: &mut Slots) {
    let each = Over::routed_experts(GatedMlp {
        what: "moe_intermediate_size",
        intermediate: 4,
        cols: Some(3),
    });
    let logical = |e: u64| ["gate", "up"].map(|half| format!("mlp.experts.{e}.{half}_proj.weight"));
    match slots.place() {
        Place::Source(at) => {
            for (k, e) in at.experts(EXPERTS).unwrap().enumerate() {
                let names = te(format!("mlp.experts.linear_fc1.weight{k}"))
                    .local(format!("mlp.experts.local_experts.{k}.linear_fc1.weight"));
                slots.source(each, logical(e), names);
            }
        }
        Place::Target(at) => {
            let local = at.experts(EXPERTS).unwrap();
            let role = Stack { count: local.len() as u64, each };
            let name = format!("mlp.{}w13_weight", at.expert_names.prefix());
            slots.target(role, local.into_iter().flat_map(logical), name);
        }
    }
}

#[test]
fn many_trainer_parameters_become_one() {
    let at = trainer(0, 1).with_ep(1, 2).unwrap().with_etp(1, 2).unwrap();
    let held = expected(at, experts, &TrainerOptions::default());
    assert_eq!(names(&held)[0], "decoder.layers.1.mlp.experts.linear_fc1.weight0");
    assert_eq!((held.len(), &held[0].shape[..]), (3, &[4, 3][..]));
    let layout = source(0, at, experts, &held).unwrap();
    let first: Vec<_> = layout
        .bands()
        .map(|(_, tensor, band)| (&*tensor.name, band.logical_rows()))
        .take(2)
        .collect();
    let gate = "model.layers.7.mlp.experts.3.gate_proj.weight";
    let up = "model.layers.7.mlp.experts.3.up_proj.weight";
    assert_eq!(first, [(gate, 2..4), (up, 2..4)]);
    let local = TrainerOptions::default().with_spec(LayerSpec::Local);
    let held = expected(at, experts, &local);
    assert_eq!(names(&held)[2], "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight");
    // Either spec's names are taken, whichever is there.
    assert_eq!(source(0, at, experts, &held).unwrap().tensors(), layout.tensors());

    let sharded = engine(1, 2);
    let (held, _) = target(sharded, experts);
    assert_eq!(names(&held), ["model.layers.7.mlp.experts.routed_experts.w13_weight"]);
    assert_eq!(held[0].shape, [6, 4, 3]);
    let ranks: Vec<SourceCoords> = (0..3).map(|ep| trainer(0, 1).with_ep(ep, 3).unwrap()).collect();
    let bytes = |plan: &Plan| plan.coverage().target_bytes;
    let whole = planned(&ranks, sharded, experts);
    assert_eq!((bytes(&whole), whole.bytes_by_source().len()), (6 * 4 * 3 * 2, 3));
    // Whole experts of an engine's rank come from the one trainer rank that has them.
    let spread = engine(2, 3).with_expert_parallel(Placement::Linear);
    let plan = planned(&ranks, spread, experts);
    assert_eq!(
        (bytes(&plan), plan.bytes_by_source().into_keys().collect::<Vec<_>>()),
        (2 * 8 * 3 * 2, vec![2])
    );
    let spread = engine(2, 4).with_expert_parallel(Placement::RoundRobin);
    let plan = planned(&ranks, spread, experts);
    assert_eq!(plan.bytes_by_source().into_keys().collect::<Vec<_>>(), [1], "expert 2 alone");
}

/// Two trainer parameters, or one that is fused, become one; one becomes two, one of them in a type of its own.
fn projections(slots: &mut Slots) {
    let column = |rows| Column { what: "rows", rows, cols: Some(2) };
    slots.either(&[
        &|slots| {
            slots.source(column(4), ["q_a.weight"], "linear_q_down_proj.weight");
            slots.source(column(6), ["kv_a.weight"], "linear_kv_down_proj.weight");
        },
        &|slots| {
            slots.source(
                Joined([4, 6]),
                ["q_a.weight", "kv_a.weight"],
                "linear_qkv_down_proj.weight",
            );
        },
    ]);
    slots.target(Joined([4, 6]), ["q_a.weight", "kv_a.weight"], "fused_qkv_a_proj.weight");
    slots.source(
        Joined([4, 2]),
        ["qkvz.weight", "ba.weight"],
        te("in_proj.weight").also("in_proj_weight"),
    );
    slots.target(column(4), ["qkvz.weight"], "in_proj_qkvz.weight");
    slots.target(column(2), ["ba.weight"], "in_proj_ba.weight").dtype(Dtype::F32);
    slots.pair(column(2), ["bias"], "expert_bias", "e_score_correction_bias").dtype(Dtype::F32);
}

/// Rows of two tensors on top of each other, in equal parts on the trainer's side, whole on the engine's.
#[derive(Debug)]
struct Joined([u64; 2]);

impl Joined {
    fn view(&self, [first, second]: [core::ops::Range<u64>; 2]) -> View {
        let height = first.end - first.start;
        let rows = height + second.end - second.start;
        let parts = vec![Part::new(0, first, 0..2), Part::new(1, second, 0..2).at_row(height)];
        View::new(rows, Some(2), "joined", parts)
    }
}

impl Role for Joined {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        Ok(self.0.iter().map(|&rows| (rows, 2)).collect())
    }
}

impl SourceRole for Joined {
    fn megatron(&self, at: &SourceCoords, _: Option<&[u64]>) -> Result<View, TranslateError> {
        Ok(self.view([at.tp.cut("first", self.0[0])?, at.tp.cut("second", self.0[1])?]))
    }
}

impl TargetRole for Joined {
    fn vllm(&self, _: &TargetCoords) -> Result<View, TranslateError> {
        Ok(self.view([0..self.0[0], 0..self.0[1]]))
    }
}

fn spec(name: &str, dtype: Dtype, shape: [u64; 2]) -> TensorSpec {
    TensorSpec::new(["decoder.layers.1.", name].concat(), dtype, shape)
}

#[test]
fn sides_meet_in_logical_tensors_only() {
    let ranks = [trainer(0, 2), trainer(1, 2)];
    let at = engine(0, 1);
    let plan = planned(&ranks, at, projections);
    let rows = (4 + 6 + 4) * 2 * 2 + 2 * 2 * 4 + 2 * 2 * 4;
    assert_eq!(plan.coverage().target_bytes, rows);
    let layouts = ranks.iter().map(|&at| {
        let mut held = expected(at, projections, &TrainerOptions::default());
        held.retain(|spec| !spec.name.contains("down_proj"));
        held.push(spec("linear_qkv_down_proj.weight", Dtype::Bf16, [5, 2]));
        let number = u32::try_from(at.tp.rank()).unwrap();
        source(number, at, projections, &held).unwrap()
    });
    let fused = SourceLayout::new(layouts.collect::<Vec<_>>()).unwrap();
    let layout = target(at, projections).1;
    let plan = refit_planner::plan(&fused, &layout, &PlanOptions::default()).unwrap();
    assert_eq!(plan.coverage().target_bytes, rows);
}

#[test]
fn one_of_several_sets_is_chosen() {
    let at = trainer(0, 1);
    let options = TrainerOptions::default();
    let held = expected(at, projections, &options);
    let down = "decoder.layers.1.linear_kv_down_proj.weight";
    assert!(
        names(&held).contains(&down) && !names(&held).iter().any(|name| name.contains("qkv_down"))
    );
    let error = |held: &[TensorSpec]| source(0, at, projections, held).unwrap_err();
    // Half a set.
    let half: Vec<_> = held.iter().filter(|spec| &*spec.name != down).cloned().collect();
    assert!(matches!(error(&half), TranslateError::MissingParam { param, .. } if &*param == down));
    // None: the first is missed.
    let none: Vec<_> =
        held.iter().filter(|spec| !spec.name.contains("down_proj")).cloned().collect();
    let missing = error(&none).to_string();
    assert!(missing.contains("linear_q_down_proj"), "{missing}");
    // Both.
    let mut both = held.clone();
    both.push(spec("linear_qkv_down_proj.weight", Dtype::Bf16, [10, 2]));
    let ambiguous = error(&both);
    assert!(matches!(ambiguous, TranslateError::AmbiguousParam { .. }), "{ambiguous}");
    // Names of other releases are taken, never expected.
    let mut renamed = held;
    let old = renamed.iter_mut().find(|spec| spec.name.ends_with("in_proj.weight")).unwrap();
    old.name = old.name.replace("in_proj.weight", "in_proj_weight").into();
    source(0, at, projections, &renamed).unwrap();
}

#[test]
fn slots_may_have_element_types_of_their_own() {
    let at = trainer(0, 1);
    let dtype = |held: &[TensorSpec], name: &str| {
        held.iter().find(|spec| spec.name.ends_with(name)).unwrap().dtype
    };
    // Not the model's, and not what is said of all parameters either.
    let options = TrainerOptions::default().with_dtype(Dtype::F16);
    let mut held = expected(at, projections, &options);
    assert_eq!(
        (dtype(&held, "expert_bias"), dtype(&held, "in_proj.weight")),
        (Dtype::F32, Dtype::F16)
    );
    held = expected(at, projections, &TrainerOptions::default());
    assert_eq!(
        (dtype(&held, "expert_bias"), dtype(&held, "in_proj.weight")),
        (Dtype::F32, Dtype::Bf16)
    );
    let wanted = target(engine(0, 1), projections).0;
    assert_eq!(
        (dtype(&wanted, "_ba.weight"), dtype(&wanted, "_qkvz.weight")),
        (Dtype::F32, Dtype::Bf16)
    );
    // The check is against it: half floats can be cast to f32, not to bf16.
    let bias = held.iter_mut().find(|spec| spec.name.ends_with("expert_bias")).unwrap();
    bias.dtype = Dtype::F16;
    source(0, at, projections, &held).unwrap();
    let bias = held.iter_mut().find(|spec| spec.name.ends_with("in_proj.weight")).unwrap();
    bias.dtype = Dtype::F16;
    let error = source(0, at, projections, &held).unwrap_err();
    assert!(matches!(error, TranslateError::Dtype { model: Dtype::Bf16, .. }), "{error}");
}

/// Interleaved rows, an offset column, several ranges of zeros, three dimensions.
#[derive(Debug)]
struct Interleaved;

impl Role for Interleaved {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        Ok(vec![(2, 2), (2, 2)])
    }
}

impl TargetRole for Interleaved {
    fn vllm(&self, _: &TargetCoords) -> Result<View, TranslateError> {
        let part = |tensor: usize, at_row| {
            Part::new(tensor, 0..2, 0..1).at_row(at_row).row_step(2).at_col(1)
        };
        let rest = |tensor: usize, at_row| Part::new(tensor, 0..2, 1..2).at_row(at_row).row_step(2);
        let parts = vec![part(0, 1), part(1, 2), rest(0, 1), rest(1, 2)];
        let view = View::new(6, Some(2), "interleaved", parts).shaped(vec![6, 1, 2]);
        Ok(view.zero(0..1).zero(3..3).zero(5..6))
    }
}

#[test]
fn views_interleave_and_fill() {
    fn table(slots: &mut Slots) {
        slots.source(Column { what: "rows", rows: 2, cols: Some(2) }, ["gate"], "gate");
        slots.source(Column { what: "rows", rows: 2, cols: Some(2) }, ["up"], "up");
        let role = Stack { count: 2, each: Interleaved };
        slots.target(role, ["gate", "up", "gate", "up"], "w13");
    }
    let (held, layout) = target(engine(0, 1), table);
    assert_eq!(held[0].shape, [2, 6, 1, 2]);
    let param = layout.param("model.layers.7.w13").unwrap();
    assert_eq!((param.rows(), param.cols()), (12, 2));
    let fills: Vec<_> = param.fill_boxes().map(|(rows, _)| rows).collect();
    assert_eq!(fills, [0..1, 5..6, 6..7, 11..12]);
    let plan = planned(&[trainer(0, 1)], engine(0, 1), table);
    let coverage = plan.coverage();
    assert_eq!((coverage.target_bytes, coverage.filled_bytes), (48, 16));
}

#[test]
fn names_are_relative_to_scopes() {
    let mut slots = Slots::new(Place::Source(trainer(0, 1)));
    slots.begin_chunk("model1.".to_string());
    slots.scope("decoder.layers.0.", "backbone.layers.4.", "model.layers.4.");
    slots.pair(Column { what: "rows", rows: 2, cols: None }, ["mixer.D"], "mixer.D", "mixer.D");
    // Of the other side: nothing is added, and what is said of it changes nothing.
    slots.target(Interleaved, ["a", "b"], "w13").dtype(Dtype::F32).copy();
    let slots = slots.into_source();
    assert_eq!(slots.len(), 1);
    assert_eq!(slots[0].names.iter().collect::<Vec<_>>(), ["model1.decoder.layers.0.mixer.D"]);
    assert_eq!(slots[0].logical, ["backbone.layers.4.mixer.D"]);
    assert!(slots[0].facts.dtype.is_none() && !slots[0].facts.copy);
}
