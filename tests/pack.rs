//! Packing on the source's side: what a target asks for, what a source cuts, and that it ends with the same bytes.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use proptest::prelude::*;
use refit::planner::{
    Capabilities, LowerOptions, Packed, PlanOptions, Program, RankLayout, SourceLayout,
    TensorSlice, Wish, is_scattered, lower, pack, plan, wish,
};
use refit_tests::execute::{self, Sources};
use refit_tests::oracle::{self, Buffers};
use refit_tests::strategies::model;

/// What NIXL can do.
const PLAIN: Capabilities = Capabilities::plain(2_000, 5_000);

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
