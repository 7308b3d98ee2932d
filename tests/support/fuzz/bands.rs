use refit::planner::{
    Capabilities, Dtype, LowerOptions, Mode, PlanOptions, Policy, RankLayout, Replicas,
    SourceLayout, lower, plan, prove_disjoint, prove_tiling,
};
use refit_translate::bands::{self, Bands, Side};

use super::parts;
use crate::execute::{self, Sources};
use crate::{landing, oracle};

/// A transport that takes few reads.
pub(super) const CAPABILITIES: Capabilities =
    Capabilities { max_reads: 1 << 12, ..Capabilities::plain(2_000, 5_000) };

/// Pieces of one plan.
const PIECES: u64 = 1 << 12;

/// Bands of one side.
const BANDS: usize = 1 << 12;

/// Target ranks planned for.
const RANKS: usize = 4;

/// Layouts that are small enough are moved, byte by byte.
const SMALL: u64 = 4 << 10;

/// Reads a side's bands, and behind a zero byte the other side's; where they are bands, writes them, reads them back,
/// joins them, lowers the plan in every way, and moves bytes where there are few.
pub fn bands(data: &[u8]) {
    let (first, second) = parts(data);
    let Some(first) = read(first) else { return };
    match second {
        // One side alone is joined with itself.
        None => join(&first.ranks, &first.ranks),
        Some(second) => {
            let Some(second) = read(second) else { return };
            join(&first.ranks, &second.ranks);
        }
    }
}

fn read(data: &[u8]) -> Option<Bands> {
    let read = bands::read(std::str::from_utf8(data).ok()?).ok()?;
    // What copies come to may be many times the text; writing and planning that shows nothing new.
    if read.ranks.iter().flat_map(RankLayout::bands).count() > BANDS {
        return None;
    }
    let text = bands::write(read.side, "fuzz", &read.ranks);
    assert_eq!(bands::read(&text).as_ref(), Ok(&read), "{text}");
    if read.side == Side::Target {
        assert!(read.ranks.iter().all(tiled));
    }
    Some(read)
}

fn tiled(layout: &RankLayout) -> bool {
    prove_tiling(layout.params(), &PlanOptions::default()).is_ok()
}

fn options() -> PlanOptions {
    PlanOptions::default().with_max_pieces(PIECES)
}

fn join(source: &[RankLayout], target: &[RankLayout]) {
    let Ok(joined) = SourceLayout::new(source.to_vec()) else { return };
    let sources = small(source).then(|| sources(source));
    for target in target.iter().take(RANKS) {
        for rule in [Replicas::Lowest, Replicas::Spread] {
            let Ok(plan) = plan(&joined, target, &options().with_replicas(rule)) else { continue };
            let coverage = plan.coverage();
            assert_eq!(coverage.target_bytes, target.bytes());
            assert_eq!(coverage.copied_bytes + coverage.filled_bytes, coverage.target_bytes);
            let moved = sources.as_ref().filter(|_| small(std::slice::from_ref(target)));
            let wanted = moved.map(|_| oracle::buffers(target));
            if let (Some(sources), Some(wanted)) = (moved, &wanted) {
                assert_eq!(execute::plan(&plan, sources), *wanted);
            }
            for (capabilities, options) in lowerings() {
                let Ok(program) = lower(&plan, &capabilities, &options) else { continue };
                assert!(program.reads().len() as u64 <= capabilities.max_reads);
                let reads: u64 = program.choices().iter().map(|choice| choice.reads).sum();
                assert_eq!(reads, program.reads().len() as u64);
                if let (Some(sources), Some(wanted)) = (moved, &wanted) {
                    assert_eq!(execute::program(&program, sources), *wanted);
                    assert_eq!(landing::program(&program, sources), *wanted);
                }
            }
        }
    }
}

fn lowerings() -> [(Capabilities, LowerOptions); 6] {
    let strided = Capabilities { strided_reads: true, ..CAPABILITIES };
    let options = LowerOptions::default();
    [
        (CAPABILITIES, options),
        (CAPABILITIES, options.with_wave_bytes(300)),
        (CAPABILITIES, options.with_mode(Mode::Staged)),
        (CAPABILITIES, options.with_policy(Policy::ReadPerRun)),
        (strided, options.with_policy(Policy::ExactWire)),
        (strided, options.with_wave_bytes(0).with_policy(Policy::ExactWire)),
    ]
}

/// Whether the layouts can be moved, and compared: a source that says of an element that it is two has no right answer.
fn small(layouts: &[RankLayout]) -> bool {
    let known = |dtype| matches!(dtype, Dtype::Bf16 | Dtype::F32 | Dtype::U8);
    let bytes = layouts.iter().fold(0, |sum: u64, layout| sum.saturating_add(layout.bytes()));
    bytes <= SMALL
        && layouts.iter().flat_map(RankLayout::params).all(|param| known(param.dtype()))
        && layouts.iter().all(|layout| prove_disjoint(layout.params(), &options()).is_ok())
}

fn sources(layouts: &[RankLayout]) -> Sources {
    layouts.iter().map(|layout| (layout.rank(), oracle::buffers(layout))).collect()
}
