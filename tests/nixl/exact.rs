//! P4 over NIXL: whatever was there before, every byte of a target is what the oracle says, and no other is written.

use std::sync::Arc;

use refit::planner::{Band, Dtype, LayoutBuilder, LowerOptions, Mode, Param, RankLayout};
use refit::{Publication, Source, Target, TargetOptions};
use refit_pool::{Allocator, HostAllocator, Memory};
use refit_tests::{models, oracle, ranks};
use refit_transport::Transport;
use refit_transport::conformance::Harness;

use crate::isolated::isolated;
use crate::{EMULATED, Nixl, ONE_SIDED};

/// Bytes before and after every parameter that nobody may write.
const CANARY_BYTES: usize = 4096;
const CANARY: u8 = 0x5c;

/// Memory for every parameter at an odd place, with canaries on both sides.
fn slots(layout: &RankLayout) -> (Vec<(String, Memory)>, Vec<Memory>) {
    let (mut params, mut canaries) = (Vec::new(), Vec::new());
    for (number, param) in layout.params().iter().enumerate() {
        let bytes = usize::try_from(param.bytes()).unwrap();
        let odd = 2 * number % 64 + 1;
        let whole = HostAllocator.allocate(odd + bytes + 2 * CANARY_BYTES).unwrap();
        let (before, rest) = whole.split_at(CANARY_BYTES + odd);
        let (held, after) = rest.split_at(bytes);
        for mut canary in [before, after] {
            canary.host_bytes_mut().unwrap().fill(CANARY);
            canaries.push(canary);
        }
        params.push((param.name().to_string(), held));
    }
    (params, canaries)
}

/// Parameters of no round size, cut by columns and rows, with zeros and one that is cast.
fn odd(sources: u32) -> (Vec<RankLayout>, RankLayout) {
    let (rows, cols) = (37, 3 * u64::from(sources));
    let source = |rank: u32| {
        let mut layout = LayoutBuilder::new(rank);
        let share = u64::from(rank) * 3..u64::from(rank) * 3 + 3;
        for (name, dtype) in [("bytes", Dtype::U8), ("halves", Dtype::Bf16), ("cast", Dtype::F32)] {
            let tensor = layout.tensor(name, rows, cols).unwrap();
            let band = Band::new(tensor, 0..rows, share.clone());
            layout.param(Param::new(name, dtype, rows, 3).band(band)).unwrap();
        }
        layout.build()
    };
    let mut target = LayoutBuilder::new(0);
    for (name, dtype) in [("bytes", Dtype::U8), ("halves", Dtype::Bf16), ("cast", Dtype::Bf16)] {
        let tensor = target.tensor(name, rows, cols).unwrap();
        // Every other row, with zeros between.
        let spread = Param::new(name, dtype, 2 * rows, cols)
            .band(Band::new(tensor, 0..rows, 0..cols).row_step(2));
        let zeros = |param: Param, row| param.fill(2 * row + 1..2 * row + 2, 0..cols);
        let spread = (0..rows).fold(spread, zeros);
        target.param(spread).unwrap();
    }
    ((0..sources).map(source).collect(), target.build())
}

fn refits(sources: &[RankLayout], wanted: &RankLayout, mode: Mode) {
    let trainer = Arc::new(Nixl.agent("trainer").unwrap());
    let engine = Arc::new(Nixl.agent("engine").unwrap());
    let sources: Vec<Source<_>> = sources
        .iter()
        .map(|layout| {
            let (params, _) = slots(layout);
            let pool = ranks::pool(&trainer);
            let mut source = Source::new(trainer.clone(), &pool, layout.clone(), params).unwrap();
            ranks::write(&mut source, &oracle::buffers(layout));
            source
        })
        .collect();
    let published: Vec<Publication> =
        sources.iter().map(|source| source.publication().unwrap()).collect();
    let layouts: Vec<RankLayout> = sources.iter().map(|source| source.layout().clone()).collect();
    let right = oracle::wanted(wanted, &layouts);
    let (params, canaries) = slots(wanted);
    let options = TargetOptions::default().with_lower(LowerOptions::default().with_mode(mode));
    let pool = ranks::pool(&engine);
    let mut target = Target::new(engine.clone(), pool, wanted.clone(), params, options).unwrap();
    for prefill in [0x00, 0xff] {
        for (_, memory) in target.params_mut() {
            memory.host_bytes_mut().unwrap().fill(prefill);
        }
        (target, _) = ranks::refit(target, &published);
        assert!(ranks::held(&target) == right, "{mode:?} over {prefill:#x}");
        for canary in &canaries {
            let alive = canary.host_bytes().unwrap().iter().all(|&byte| byte == CANARY);
            assert!(alive, "{mode:?} over {prefill:#x}: bytes beside a parameter were written");
        }
    }
    assert_eq!(engine.backend(), "nixl");
}

fn every_byte_once() {
    let (sources, target) = odd(3);
    for mode in [Mode::Direct, Mode::Staged] {
        refits(&sources, &target, mode);
        for (source_tp, target_tp) in [(1, 2), (2, 1), (4, 2)] {
            let sources = models::source(&models::tiny(), source_tp, 1, 1);
            for target in models::target(&models::tiny(), target_tp) {
                refits(&sources, &target, mode);
            }
        }
    }
}

#[test]
fn p04_every_byte_is_written_once_one_sided() {
    isolated("exact::p04_every_byte_is_written_once_one_sided", ONE_SIDED, every_byte_once);
}

#[test]
fn p04_every_byte_is_written_once_emulated() {
    isolated("exact::p04_every_byte_is_written_once_emulated", EMULATED, every_byte_once);
}

/// P5: NIXL's own check of ranges wraps; ours comes before it.
#[test]
fn p05_reads_at_the_corners_are_refused_before_nixl() {
    isolated("exact::p05_reads_at_the_corners_are_refused_before_nixl", ONE_SIDED, || {
        let (source, target) = (Nixl.agent("source").unwrap(), Nixl.agent("target").unwrap());
        let (accepted, refused) = refit_tests::corners::reads(&source, &target, 4_000);
        println!("{accepted} accepted, {refused} refused");
        assert!(accepted > 10 && refused > 1_000);
    });
}
