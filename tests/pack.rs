//! Packing on the source's side: what a target asks for, what a source cuts, and that it ends with the same bytes.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::sync::Arc;

use proptest::prelude::*;
use refit::planner::{
    Band, Capabilities, Dtype, LayoutBuilder, LayoutError, LowerOptions, PackError, PackSlot,
    Packed, Param, PlanOptions, Program, RankLayout, SourceLayout, TensorSlice, Wish, is_scattered,
    lower, pack, plan, wish,
};
use refit::translate::{ModelConfig, megatron, vllm};
use refit::transport::TransportPool;
use refit::transport::local::{LocalOptions, LocalTransport, Network};
use refit::{PackRequest, RefitError, Source, TargetOptions};
use refit_cli::case::{SourceFile, TargetFile};
use refit_tests::execute::{self, Sources};
use refit_tests::golden::{self, Case};
use refit_tests::models;
use refit_tests::oracle::{self, Buffers};
use refit_tests::packing::{self, Outcome, Outcomes, Rank};
use refit_tests::ranks as support;
use refit_tests::strategies::model;

/// What NIXL can do.
const PLAIN: Capabilities = Capabilities::plain(2_000, 5_000);

/// What a copy between the processes of a host costs.
const LOCAL: Capabilities = Capabilities::plain(4_000, 100);

/// Reads that cost little and bytes that cost much: not one is read that nobody needs, and none twice.
const CAREFUL: Capabilities = Capabilities::plain(1, 999);

fn program(source: &[RankLayout], target: &RankLayout, capabilities: &Capabilities) -> Program {
    let joined = SourceLayout::new(source).unwrap();
    let plan = plan(&joined, target, &PlanOptions::default()).unwrap();
    lower(&plan, capabilities, &LowerOptions::default()).unwrap()
}

fn wish_of(source: &[RankLayout], target: &RankLayout, capabilities: &Capabilities) -> Wish {
    wish(&program(source, target, capabilities), target, source, |_| *capabilities).unwrap()
}

/// What every rank offers once it has done as all targets wish.
fn packed(source: &[RankLayout], wishes: &[Wish]) -> Vec<Packed> {
    let of_rank = |layout: &RankLayout| {
        let asks = |wish: &&Wish| wish.ranks.contains(&layout.rank());
        pack(layout, wishes.iter().filter(asks).flat_map(|wish| &wish.slices)).unwrap()
    };
    source.iter().map(of_rank).collect()
}

/// The slots as a rank would fill them, run by run, and its own parameters.
fn filled(layout: &RankLayout, packed: &Packed, held: &Buffers) -> Buffers {
    let mut buffers = held.clone();
    for slot in packed.slots() {
        let from = &held[layout.params()[slot.source].name().as_ref()];
        let mut bytes = vec![oracle::POISON; usize::try_from(slot.bytes).unwrap()];
        for (source, into) in slot.dims.offsets() {
            let from_at = usize::try_from(slot.source_offset + source).unwrap();
            let (into, run) = (usize::try_from(into).unwrap(), usize::try_from(slot.run).unwrap());
            bytes[into..into + run].copy_from_slice(&from[from_at..from_at + run]);
        }
        buffers.insert(slot.name.to_string(), bytes);
    }
    buffers
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    #[test]
    fn a_packed_source_gives_the_same_bytes(model in model(), careful in any::<bool>()) {
        let capabilities = if careful { CAREFUL } else { PLAIN };
        let held: Sources =
            model.source.iter().map(|layout| (layout.rank(), oracle::buffers(layout))).collect();
        let (mut layouts, mut sources) = (model.source.clone(), held.clone());
        let mut wishes = Vec::new();
        for round in 0.. {
            let more: Vec<Wish> = model.target.iter().map(|target| wish_of(&layouts, target, &capabilities)).collect();
            if more.iter().all(|wish| wish.slices.is_empty()) {
                break;
            }
            prop_assert!(round < 10, "wishes without an end: {more:?}");
            wishes.extend(more);
            let packed = packed(&model.source, &wishes);
            for (layout, packed) in model.source.iter().zip(&packed) {
                let filled = filled(layout, packed, &held[&layout.rank()]);
                // Slots hold what the bands of the packed layout say.
                let wanted = oracle::buffers(packed.layout());
                for slot in packed.slots() {
                    prop_assert_eq!(&filled[slot.name.as_ref()], &wanted[slot.name.as_ref()]);
                }
                let asked = wishes.iter().filter(|wish| wish.ranks.contains(&layout.rank()));
                let slices: Vec<_> = asked.flat_map(|wish| &wish.slices).collect();
                prop_assert!(!is_scattered(packed.layout(), slices.iter().copied()).unwrap());
                let again = pack(packed.layout(), slices).unwrap();
                prop_assert_eq!(again.layout(), packed.layout());
                prop_assert_eq!(again.slots(), []);
                let slots: u64 = packed.slots().iter().map(|slot| slot.bytes).sum();
                prop_assert!(slots <= layout.bytes(), "more than the rank holds");
                sources.insert(layout.rank(), filled);
            }
            layouts = packed.iter().map(|packed| packed.layout().clone()).collect();
            for target in &model.target {
                let program = program(&layouts, target, &capabilities);
                prop_assert_eq!(execute::program(&program, &sources), oracle::wanted(target, &model.source));
            }
        }
    }
}

/// Over the in-process transport, which must not take strided reads here: it would have nothing to ask for.
fn over_local(sources: &[Rank], targets: &[Rank]) -> Outcomes {
    let network = Network::new();
    let options = LocalOptions::default().with_strided_reads(false);
    let agent =
        |name: &str| Arc::new(LocalTransport::with_options(&network, name, options).unwrap());
    packing::packed(&agent("trainer"), &agent("engine"), sources, targets)
}

fn ranks(layouts: Vec<RankLayout>) -> Vec<Rank> {
    let rank = |layout: RankLayout| {
        let held = oracle::buffers(&layout);
        (layout, held)
    };
    layouts.into_iter().map(rank).collect()
}

/// The models of the golden cases that are dense.
fn dense() -> Vec<ModelConfig> {
    let mut dense = vec![models::tiny()];
    for folder in golden::cases(&golden::root()).unwrap() {
        let case = Case::open(&folder).unwrap();
        if ["llama", "qwen2_", "qwen3_"].iter().any(|name| case.name().starts_with(name)) {
            dense.push(ModelConfig::from_json(&case.config).unwrap());
        }
    }
    assert!(dense.len() > 3, "where are the golden models?");
    dense
}

#[test]
fn row_parallel_parameters_of_a_finer_engine_cross_the_wire_once_and_whole() {
    for config in dense() {
        for (source_tp, pp, target_tp) in [(1, 1, 2), (2, 1, 4), (1, 1, 4), (1, 2, 2)] {
            let sources = ranks(models::source(&config, source_tp, pp, 1));
            let targets = ranks(models::target(&config, target_tp));
            let Outcomes { targets: outcomes, slots } = over_local(&sources, &targets);
            let what = format!("TP{source_tp} PP{pp} -> TP{target_tp}");
            let layers = config.num_layers as usize;
            for Outcome { before, after, slices } in outcomes {
                // Of every layer the attention's output and the MLP's.
                assert_eq!(slices, 2 * layers, "{what}");
                assert!(before.wire_bytes > before.needed_bytes, "{what}");
                assert_eq!(after.wire_bytes, after.needed_bytes, "{what}");
                // Each is one read, as it was one with its neighbours before.
                assert_eq!(after.reads, before.reads, "{what}");
                // What is left to land are the heads of a whole QKV, if any.
                assert!(after.staging_bytes < before.staging_bytes / 10, "{what}");
            }
            // The row-parallel parameters once more, and what aligning them takes.
            for ((layout, _), slots) in sources.iter().zip(slots) {
                let is_row =
                    |name: &str| name.contains("linear_proj") || name.contains("linear_fc2");
                let params = layout.params().iter().filter(|param| is_row(param.name()));
                let bytes: u64 = params.filter(|param| param.cols() > 1).map(Param::bytes).sum();
                assert!(slots >= bytes && slots < bytes + 256 * 4 * 2 * layers as u64, "{what}");
            }
        }
    }
}

/// Two thirds of a shard are one slot, the third is another: no width has to divide anything.
#[test]
fn uneven_shares_are_slots_too() {
    let mut config = models::tiny();
    (config.num_heads, config.num_kv_heads, config.vocab_size) = (12, 6, 576);
    for (source_tp, target_tp) in [(2, 3), (3, 2), (2, 6)] {
        let sources = ranks(models::source(&config, source_tp, 1, 1));
        let targets = ranks(models::target(&config, target_tp));
        for Outcome { after, .. } in over_local(&sources, &targets).targets {
            assert_eq!(after.wire_bytes, after.needed_bytes, "TP{source_tp} -> TP{target_tp}");
        }
    }
}

/// Every copy is asked, so that it does not matter which is read.
#[test]
fn data_parallel_copies_are_packed_alike() {
    let sources = ranks(models::source(&models::tiny(), 2, 1, 3));
    let targets = ranks(models::target(&models::tiny(), 4));
    let Outcomes { targets, slots } = over_local(&sources, &targets);
    assert!(slots.iter().all(|bytes| *bytes == slots[0] && *bytes > 0), "{slots:?}");
    for Outcome { after, .. } in targets {
        assert_eq!(after.wire_bytes, after.needed_bytes);
    }
}

/// Engines cut into two and four: two of four slots are a half, two reads side by side.
#[test]
fn engines_of_several_sizes_are_served_by_the_same_slots() {
    let sources = models::source(&models::tiny(), 1, 1, 1);
    let targets = [models::target(&models::tiny(), 2), models::target(&models::tiny(), 4)].concat();
    let wishes: Vec<_> = targets.iter().map(|target| wish_of(&sources, target, &LOCAL)).collect();
    let packed = packed(&sources, &wishes);
    let held = oracle::buffers(&sources[0]);
    let buffers = Sources::from([(0, filled(&sources[0], &packed[0], &held))]);
    let layouts = [packed[0].layout().clone()];
    for target in &targets {
        let program = program(&layouts, target, &LOCAL);
        assert_eq!(program.wire_bytes(), program.needed_bytes());
        assert_eq!(execute::program(&program, &buffers), oracle::buffers(target));
    }
    let slots: u64 = packed[0].slots().iter().map(|slot| slot.bytes).sum();
    let rows = sources[0].params().iter().filter(|param| {
        let name = param.name();
        (name.contains("linear_proj") || name.contains("linear_fc2")) && param.cols() > 1
    });
    assert_eq!(slots, rows.map(Param::bytes).sum::<u64>(), "once, whoever asks for it");
}

/// Of an engine's fused experts each is a slice: a row of each of them is a million reads.
#[test]
fn experts_are_packed_in_the_order_in_which_they_are_fused() {
    let mixtral =
        ModelConfig::from_json(include_str!("../crates/cli/presets/mixtral-8x7b.json")).unwrap();
    let sources = models::source(&mixtral, 1, 1, 1);
    let targets = models::target(&mixtral, 4);
    let wishes: Vec<_> = targets.iter().map(|target| wish_of(&sources, target, &PLAIN)).collect();
    let packed = packed(&sources, &wishes);
    let layouts = [packed[0].layout().clone()];
    // The slots of a target follow each other, those of a fused parameter in its order.
    let order = packed[0].slots().chunk_by(|a, b| {
        let suffix =
            |slot: &PackSlot| slot.name.rsplit_once('#').map(|(_, number)| number.to_owned());
        suffix(a) == suffix(b)
    });
    assert_eq!(order.count(), 4);
    for target in &targets {
        let before = program(&sources, target, &PLAIN);
        let after = program(&layouts, target, &PLAIN);
        assert!(before.reads().len() > 1_000_000 && before.wire_bytes() > before.needed_bytes());
        assert!(after.reads().len() < 2_000, "{}", after.reads().len());
        assert_eq!((after.wire_bytes(), after.staging_bytes()), (after.needed_bytes(), 0));
    }
}

/// Real tensors, whatever the sizes: where there is nothing to pack, nothing is.
#[test]
fn golden_cases_end_with_the_same_bytes() {
    let mut packed = 0;
    for folder in golden::cases(&golden::root()).unwrap() {
        let (sources, targets) = golden_ranks(&Case::open(&folder).unwrap());
        let Outcomes { targets, slots } = over_local(&sources, &targets);
        packed += usize::from(slots.iter().any(|bytes| *bytes > 0));
        for Outcome { before, after, slices } in targets {
            // Small gaps between whole rows are still read where that costs less than another read.
            let fewer = after.wire_bytes < before.wire_bytes || after.reads < before.reads;
            assert!(after.wire_bytes <= before.wire_bytes, "{}", folder.display());
            assert_eq!(fewer, slices > 0, "{}", folder.display());
        }
    }
    assert!(packed > 1, "{packed} cases were packed");
}

fn golden_ranks(case: &Case) -> (Vec<Rank>, Vec<Rank>) {
    let config = ModelConfig::from_json(&case.config).unwrap();
    let source = |file: &SourceFile| {
        let held = case.tensors(&file.file).unwrap();
        (megatron::layout(&config, &case.source.place(file), &held.specs).unwrap(), held.bytes)
    };
    let target = |file: &TargetFile| {
        let held = case.tensors(&file.file).unwrap();
        (vllm::layout(&config, &case.target.place(file), &held.specs).unwrap().layout, held.bytes)
    };
    (case.source.ranks.iter().map(source).collect(), case.target.ranks.iter().map(target).collect())
}

struct One {
    source: Source<LocalTransport>,
    pool: TransportPool<LocalTransport>,
    requests: Vec<PackRequest>,
}

/// A source that is asked for halves.
fn asked() -> One {
    let network = Network::new();
    let options = LocalOptions::default().with_strided_reads(false);
    let agent =
        |name: &str| Arc::new(LocalTransport::with_options(&network, name, options).unwrap());
    let (trainer, engine) = (agent("trainer"), agent("engine"));
    let layout = models::source(&models::tiny(), 1, 1, 1).remove(0);
    let source = support::source(&trainer, &layout);
    let published = [source.publication().unwrap()];
    let request = |layout: &RankLayout| {
        let (mut target, _, _) = support::target(&engine, layout, TargetOptions::default());
        target.pack_request(&published).unwrap()
    };
    let requests = models::target(&models::tiny(), 2).iter().map(request).collect();
    One { source, pool: support::pool(&trainer), requests }
}

#[test]
fn slots_over_the_budget_are_refused_and_the_source_goes_on() {
    let One { source, pool, requests } = asked();
    let failed = source.pack(&pool, &requests, 1_000).unwrap_err();
    let RefitError::SlotBudget { rank: 0, bytes, budget: 1_000 } = failed.error else {
        panic!("{}", failed.error);
    };
    assert_eq!(pool.stats().allocations, 0);
    let packed = failed.state.pack(&pool, &requests, bytes).unwrap();
    assert_eq!((packed.slot_bytes(), pool.stats().allocations), (bytes, 1));
    assert!(packed.repacked().bytes > 0 && packed.repacked().bytes <= bytes);
    assert_ne!(packed.layout(), packed.unpacked_layout());

    // The same requests, in another order, find the same memory and become the same layout.
    let layout = packed.layout().clone();
    let again: Vec<_> = requests.iter().rev().cloned().collect();
    let packed = packed.unpack().pack(&pool, &again, u64::MAX).unwrap();
    assert_eq!((packed.layout(), pool.stats().allocations), (&layout, 1));
    // Nothing asked, nothing packed.
    let source = packed.unpack();
    let before = source.publication().unwrap();
    let packed = source.pack(&pool, &[PackRequest::nothing(0)], 0).unwrap();
    assert_eq!(packed.publication().unwrap().digest(), before.digest());
}

#[test]
fn stale_slots_are_not_published() {
    let One { source, pool, requests } = asked();
    let mut packed = source.pack(&pool, &requests, u64::MAX).unwrap();
    let published = *packed.publication().unwrap().digest();
    let change = std::panic::AssertUnwindSafe(|| {
        packed.update(2, |mut params| {
            let (_, memory) = params.next().unwrap();
            memory.host_bytes_mut().unwrap().fill(7);
            panic!("half way");
        })
    });
    assert!(std::panic::catch_unwind(change).is_err());
    let error = packed.publication().unwrap_err();
    assert!(matches!(error, RefitError::StaleSlots { rank: 0 }), "{error}");
    // What was begun is still to be committed: filling the slots is part of that.
    packed.begin_update().unwrap().commit(2).unwrap();
    assert_eq!(packed.publication().unwrap().digest(), &published);
    // What a change returns comes back, and an error of its own leaves the slots as new as the parameters.
    assert_eq!(
        packed.update(3, |params| params.count()).unwrap(),
        packed.unpacked_layout().params().len()
    );
    assert_eq!(packed.update(4, |_| Err::<(), _>("no")).unwrap(), Err("no"));
    assert!(packed.publication().is_ok());
}

#[test]
fn nonsense_is_refused_by_name() {
    let layout = models::source(&models::tiny(), 1, 1, 1).remove(0);
    let tensor = layout.tensors().iter().find(|tensor| tensor.cols > 1).unwrap();
    let slice = |rows: std::ops::Range<u64>, cols: std::ops::Range<u64>| TensorSlice {
        tensor: tensor.name.clone(),
        rows,
        cols,
    };
    for wrong in
        [slice(0..tensor.rows + 1, 0..1), slice(0..1, tensor.cols..u64::MAX), slice(3..3, 0..1)]
    {
        let error = pack(&layout, [&wrong]).unwrap_err();
        assert!(matches!(&error, PackError::OutsideTensor { .. }), "{error}");
    }
    // Other ranks hold it.
    let elsewhere = TensorSlice { tensor: "elsewhere".into(), rows: 0..1, cols: 0..1 };
    assert_eq!(pack(&layout, [&elsewhere]).unwrap().layout(), &layout);
    // A slot would have the name of another parameter.
    let mut builder = LayoutBuilder::new(0);
    let tensor = builder.tensor("t", 4, 4).unwrap();
    for name in ["w", "w#0"] {
        builder
            .param(Param::new(name, Dtype::Bf16, 4, 4).band(Band::new(tensor, 0..4, 0..4)))
            .unwrap();
    }
    let half = TensorSlice { tensor: "t".into(), rows: 0..4, cols: 0..2 };
    let error = pack(&builder.build(), [&half]).unwrap_err();
    assert!(matches!(error, PackError::Layout(LayoutError::DuplicateParam { .. })), "{error}");
    // More boxes than any engine has ranks.
    let mut builder = LayoutBuilder::new(0);
    let tensor = builder.tensor("t", 4, 100_000).unwrap();
    builder
        .param(Param::new("w", Dtype::Bf16, 4, 100_000).band(Band::new(tensor, 0..4, 0..100_000)))
        .unwrap();
    let slices: Vec<_> = (0..100_000)
        .map(|col| TensorSlice { tensor: "t".into(), rows: 0..4, cols: col..col + 1 })
        .collect();
    let error = pack(&builder.build(), &slices).unwrap_err();
    assert!(matches!(error, PackError::TooComplex { .. }), "{error}");
    // A program of other layouts.
    let sources = models::source(&models::tiny(), 1, 1, 1);
    let targets = models::target(&models::tiny(), 2);
    let program = program(&sources, &targets[0], &PLAIN);
    let none: [RankLayout; 0] = [];
    let error = wish(&program, &targets[0], &none, |_| PLAIN).unwrap_err();
    assert!(matches!(error, PackError::OtherLayouts { .. }), "{error}");
}

#[test]
fn strided_reads_leave_nothing_to_ask_for() {
    let sources = models::source(&models::tiny(), 1, 1, 1);
    let strided = Capabilities { strided_reads: true, ..PLAIN };
    for target in models::target(&models::tiny(), 4) {
        assert_eq!(wish_of(&sources, &target, &strided), Wish::default());
    }
}
