//! Random tables of moves, and what memory is like after them: a loop over runs, one after another.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use refit::planner::{Dim, Dims, Dtype, ElementMap, Landing, Transform};
use refit_kernels::{Effect, Move};
use refit_translate::host;

/// Tables whose addresses are offsets into two pieces of memory, both of which start at multiples of [`ALIGN`].
#[derive(Clone, Debug)]
pub struct Case {
    /// The moves of every table; no two write the same byte.
    pub tables: Vec<Vec<Move>>,
    /// Bytes that the sources take.
    pub source: usize,
    /// Bytes that the targets take.
    pub target: usize,
}

/// More than any unit of the kernel needs.
pub const ALIGN: usize = 256;

/// Every transform that is defined.
#[must_use]
pub fn transforms() -> Vec<Transform> {
    let types = [Dtype::F32, Dtype::Bf16, Dtype::F16];
    let maps = [ElementMap::Identity, ElementMap::AddOne, ElementMap::NegExp];
    let mut all: Vec<Transform> = types
        .iter()
        .flat_map(|&from| types.iter().map(move |&to| (from, to)))
        .flat_map(|(from, to)| maps.map(|map| Transform::mapping(map, from, to)))
        .flatten()
        .collect();
    all.retain(|transform| *transform != Transform::Copy);
    all.push(Transform::Copy);
    all
}

impl Case {
    /// The tables with addresses, where sources and targets start at these.
    #[must_use]
    pub fn placed(&self, source: u64, target: u64) -> Vec<Vec<Move>> {
        let placed =
            |one: &Move| Move { from: one.from + source, into: one.into + target, ..one.clone() };
        self.tables.iter().map(|table| table.iter().map(placed).collect()).collect()
    }

    /// Bytes that all moves write.
    #[must_use]
    pub fn written(&self) -> u64 {
        let bytes = |one: &Move| written_run(one) * one.dims.runs();
        self.tables.iter().flatten().map(bytes).sum()
    }

    /// Carries out all moves.
    ///
    /// # Panics
    /// When a move leaves its memory.
    pub fn carry_out(&self, source: &[u8], target: &mut [u8]) {
        for one in self.tables.iter().flatten() {
            carry_out(one, source, target);
        }
    }
}

/// Bytes that a run of a move writes.
fn written_run(one: &Move) -> u64 {
    match one.effect {
        Effect::Transform(transform) => transform.target_bytes(one.run),
        _ => one.run,
    }
}

fn carry_out(one: &Move, source: &[u8], target: &mut [u8]) {
    let at = |offset: u64| usize::try_from(offset).unwrap();
    for (from, into) in one.dims.offsets() {
        let into = at(one.into + into);
        let into = &mut target[into..into + at(written_run(one))];
        match one.effect {
            Effect::Transform(transform) => {
                let from = at(one.from + from);
                let landing = Landing {
                    staging_offset: 0,
                    target: 0,
                    offset: 0,
                    run: one.run,
                    dims: Dims::none(),
                    transform,
                };
                host::land(&landing, &source[from..from + at(one.run)], into).unwrap();
            }
            _ => into.fill(0),
        }
    }
}

/// Bytes of every value, the same for the same seed.
#[must_use]
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::from_fn(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        Some(state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes())
    });
    words.take(len.div_ceil(8)).flatten().take(len).collect()
}

/// A move that is not placed yet: what it is, and the gaps around it.
#[derive(Clone, Debug)]
struct Loose {
    effect: Effect,
    /// Elements of a run.
    elements: u64,
    /// Every distance is a multiple of this many elements.
    grain: u64,
    /// Counts, gaps between occurrences on both sides, in grains, innermost first; and the order to give them in.
    dims: Vec<(u64, u64, u64)>,
    order: Vec<usize>,
    /// Bytes by which the first addresses miss a multiple of the grain, mostly 0; and grains left free before.
    shift: (u64, u64),
    before: (u64, u64),
    /// Whether the source is one run that is read again and again.
    constant: bool,
}

/// Between 1 and 4 tables of up to 6 moves.
pub fn case() -> impl Strategy<Value = Case> {
    vec(vec(loose(), 0..6), 1..5).prop_map(|tables| {
        let mut ends = (0, 0);
        let tables =
            tables.iter().map(|table| table.iter().map(|one| one.place(&mut ends)).collect());
        let tables = tables.collect();
        let size = |bytes: u64| usize::try_from(bytes).unwrap();
        // Some more, which nobody may touch.
        Case { tables, source: size(ends.0) + 64, target: size(ends.1) + 64 }
    })
}

fn loose() -> impl Strategy<Value = Loose> {
    let effect = prop_oneof![
        4 => Just(Effect::Transform(Transform::Copy)),
        1 => Just(Effect::Zero),
        3 => select(transforms()).prop_map(Effect::Transform),
    ];
    // Few occurrences of long runs, many of short ones.
    let form = prop_oneof![
        4 => (1u64..80, vec((1u64..5, 0u64..5, 0u64..5), 0..6)),
        2 => (1u64..1_200, vec((1u64..20, 0u64..5, 0u64..5), 0..3)),
        1 => (1_000u64..100_000, vec((1u64..4, 0u64..5, 0u64..5), 0..2)),
    ];
    let grain =
        prop_oneof![2 => Just(1u64), 1 => Just(2), 1 => Just(4), 1 => Just(8), 3 => Just(16)];
    let shift = prop_oneof![3 => Just((0u64, 0u64)), 1 => (0u64..16, 0u64..16), 1 => (0u64..16).prop_map(|n| (n, n))];
    let ragged = prop_oneof![2 => Just(0u64), 1 => 0u64..16];
    (effect, form, grain, ragged, shift, (0u64..9, 0u64..9), any::<u8>())
        .prop_flat_map(|(effect, (elements, dims), grain, ragged, shift, before, coin)| {
            let order = Just((0..dims.len()).collect::<Vec<_>>()).prop_shuffle();
            let elements = (elements.div_ceil(grain) * grain + ragged).min(100_000);
            let constant = coin < 20;
            (Just((effect, elements, grain, dims, shift, before, constant)), order)
        })
        .prop_map(|((effect, elements, grain, dims, shift, before, constant), order)| Loose {
            effect,
            elements,
            grain,
            dims,
            order,
            shift,
            before,
            constant,
        })
}

impl Loose {
    /// Puts the move behind the ends on either side, and moves the ends behind it.
    fn place(&self, ends: &mut (u64, u64)) -> Move {
        let (from, to) = match self.effect {
            Effect::Transform(Transform::Cast { from, to } | Transform::Map { from, to, .. }) => {
                (from.size(), to.size())
            }
            _ => (1, 1),
        };
        let (source_grain, target_grain) = (self.grain * from, self.grain * to);
        let (run, written) = (self.elements * from, self.elements * to);
        // Strides that keep occurrences apart in the target, and to the grain where the run is one.
        let (mut source, mut target) = (run, written);
        let mut dims = Vec::with_capacity(self.dims.len());
        for &(count, source_gap, target_gap) in &self.dims {
            let stride = |end: u64, gap: u64, grain: u64| end.next_multiple_of(grain) + gap * grain;
            let source_stride =
                if self.constant { 0 } else { stride(source, source_gap, source_grain) };
            let dim = Dim {
                count,
                source_stride,
                target_stride: stride(target, target_gap, target_grain),
            };
            source += source_stride * (count - 1);
            target += dim.target_stride * (count - 1);
            dims.push(dim);
        }
        let place = |end: u64, grain: u64, before: u64, shift: u64| {
            end.next_multiple_of(grain.max(16)) + before * grain + shift
        };
        let one = Move {
            from: place(ends.0, source_grain, self.before.0, self.shift.0),
            into: place(ends.1, target_grain, self.before.1, self.shift.1),
            run,
            dims: self.order.iter().rev().map(|&at| dims[at]).collect(),
            effect: self.effect,
        };
        *ends = (one.from + source, one.into + target);
        one
    }
}
