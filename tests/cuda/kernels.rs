//! The kernel on devices, against a loop over runs; and landings.

use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner};
use refit_kernels::{Effect, KernelError, Landing, Move, Mover, Shape, Side, Table};
use refit_planner::{Dim, Dims, Dtype, Transform};
use refit_pool::cuda::{CudaAllocator, Device, Stream, download, set, upload};
use refit_pool::{Allocator, HostAllocator, Memory};
use refit_tests::moves::{Case, case, noise, transforms};

use crate::gpu::Gpus;

const COPY: Effect = Effect::Transform(Transform::Copy);

fn allocate(device: &Device, bytes: usize) -> Memory {
    CudaAllocator::new(device.clone()).allocate(bytes).unwrap()
}

fn filled(device: &Device, bytes: &[u8]) -> Memory {
    let mut memory = allocate(device, bytes.len());
    upload(device, &mut memory, 0, bytes).unwrap();
    memory
}

fn content(device: &Device, memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; memory.len()];
    download(device, memory, 0, &mut bytes).unwrap();
    bytes
}

/// Carries out a case with sources on one device and targets on the one that runs the kernel, and compares all bytes.
fn check(case: &Case, from: &Device, mover: &Mover, seed: u64) -> Result<(), TestCaseError> {
    let device = mover.device();
    let bytes = noise(case.source, seed);
    let mut expected = noise(case.target, seed + 1);
    let source = filled(from, &bytes);
    let target = filled(device, &expected);
    let tables: Vec<_> = case
        .placed(source.address(), target.address())
        .iter()
        .map(|moves| mover.upload(&Table::new(moves).unwrap()).unwrap())
        .collect();
    let stream = Stream::new(device).unwrap();
    // SAFETY: the case stays inside both memories, which nobody else uses; all live until the stream is done.
    unsafe { mover.launch(&tables.iter().collect::<Vec<_>>(), &stream) }.unwrap();
    stream.synchronize().unwrap();
    case.carry_out(&bytes, &mut expected);
    let got = content(device, &target);
    let differs = got.iter().zip(&expected).position(|(got, expected)| got != expected);
    prop_assert_eq!(differs, None, "the first byte that differs");
    Ok(())
}

fn random_tables(from: &Device, mover: &Mover, cases: u32) {
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    TestRunner::new(config)
        .run(&(case(), any::<u32>()), |(case, seed)| check(&case, from, mover, seed.into()))
        .unwrap();
}

#[test]
fn tables_do_what_a_loop_over_runs_does() {
    let Some(gpus) = Gpus::get("tables_do_what_a_loop_over_runs_does", 1) else { return };
    let device = &gpus[0];
    for (blocks, threads, lanes) in [(3, 256, 128), (3, 256, 32), (1, 64, 64), (6, 128, 128)] {
        let shape = Shape { blocks, threads, lanes };
        let mover = Mover::with(device, shape, refit_kernels::internal::PTX).unwrap();
        random_tables(device, &mover, 200);
    }
}

#[test]
fn sources_may_be_on_another_device() {
    let Some(gpus) = Gpus::get("sources_may_be_on_another_device", 2) else { return };
    let (source, target) = (&gpus[0], &gpus[1]);
    assert!(target.can_access(source).unwrap());
    target.enable_access(source).unwrap();
    random_tables(source, &Mover::new(target).unwrap(), 200);
}

/// A gigabyte in tiles of the largest size, rows with gaps.
#[test]
fn large_tables_are_carried_out() {
    let Some(gpus) = Gpus::get("large_tables_are_carried_out", 1) else { return };
    let mover = Mover::new(&gpus[0]).unwrap();
    for (run, stride) in [(1 << 28, 0), (4096, 4608), (512, 1024)] {
        let count = (1 << 28) / run;
        let dims = Dims::one(Dim { count, source_stride: stride, target_stride: run });
        let size = |bytes: u64| usize::try_from(bytes).unwrap() + 256;
        let case = Case {
            source: size(dims.source_extent(run)),
            target: size(1 << 28),
            tables: vec![vec![Move { from: 0, into: 128, run, dims, effect: COPY }]],
        };
        check(&case, &gpus[0], &mover, run).unwrap();
    }
}

/// More entries than the memory holds that tables share as a rule.
#[test]
fn tables_of_many_entries_are_carried_out() {
    let Some(gpus) = Gpus::get("tables_of_many_entries_are_carried_out", 1) else { return };
    let mover = Mover::new(&gpus[0]).unwrap();
    for count in [1_u64, 40_001, 100_003] {
        let one = |index| Move {
            from: 48 * index,
            into: 32 * (count - 1 - index),
            run: 16,
            dims: Dims::none(),
            effect: COPY,
        };
        let size = |bytes: u64| usize::try_from(bytes).unwrap();
        let case = Case {
            source: size(48 * count),
            target: size(32 * count),
            tables: vec![(0..count).map(one).collect()],
        };
        check(&case, &gpus[0], &mover, count).unwrap();
    }
}

/// Every half-precision value, and singles of every kind: the device's arithmetic is that of the host.
#[test]
fn every_transform_has_the_bits_of_the_reference() {
    let Some(gpus) = Gpus::get("every_transform_has_the_bits_of_the_reference", 1) else { return };
    let device = &gpus[0];
    let mover = Mover::new(device).unwrap();
    let halves: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let lower = [0u32, 1, 0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff];
    let singles = (0..=0xffff_u32).flat_map(|upper| lower.map(|low| upper << 16 | low));
    // Values everywhere: exponentials are where two libraries may differ.
    let scattered = (0..1u32 << 24).map(|index| index.wrapping_mul(0x9e37_79b9));
    let singles: Vec<u8> = singles.chain(scattered).flat_map(u32::to_le_bytes).collect();
    for transform in transforms() {
        let (Transform::Cast { from, to } | Transform::Map { from, to, .. }) = transform else {
            continue;
        };
        let values = if from == Dtype::F32 { &singles } else { &halves };
        for shift in [0, 2] {
            let run = values.len() as u64;
            let one = Move {
                from: shift,
                into: shift,
                run,
                dims: Dims::none(),
                effect: Effect::Transform(transform),
            };
            let written = usize::try_from(transform.target_bytes(run)).unwrap();
            let case =
                Case { tables: vec![vec![one]], source: values.len() + 64, target: written + 64 };
            let mut bytes = noise(case.source, 1);
            let at = usize::try_from(shift).unwrap();
            bytes[at..at + values.len()].copy_from_slice(values);
            let mut expected = noise(case.target, 2);
            let (source, target) = (filled(device, &bytes), filled(device, &expected));
            let placed = case.placed(source.address(), target.address());
            let table = mover.upload(&Table::new(&placed[0]).unwrap()).unwrap();
            let stream = Stream::new(device).unwrap();
            // SAFETY: as in `check`.
            unsafe { mover.launch(&[&table], &stream) }.unwrap();
            stream.synchronize().unwrap();
            case.carry_out(&bytes, &mut expected);
            let got = content(device, &target);
            let differs = got.iter().zip(&expected).position(|(got, expected)| got != expected);
            if let Some(byte) = differs {
                let size = |dtype: Dtype| usize::try_from(dtype.size()).unwrap();
                let element = byte.saturating_sub(at) / size(to);
                let element = values.chunks(size(from)).nth(element);
                panic!("{transform:?} of {element:?}, byte {byte}");
            }
        }
    }
}

/// 64 KiB of staging, rows of which go into the middle of a parameter.
fn landing(mover: &Arc<Mover>, stream: &Arc<Stream>, target: &Memory) -> Landing {
    let dims = Dims::one(Dim { count: 64, source_stride: 1024, target_stride: 2048 });
    let moves = [
        Move { from: 0, into: target.address() + 512, run: 1024, dims: dims.clone(), effect: COPY },
        Move { from: 0, into: target.address(), run: 512, dims, effect: Effect::Zero },
    ];
    Landing::new(mover, stream, &moves, 65_536, &[target.allocation().clone()]).unwrap()
}

fn landed(staged: &[u8], before: u8) -> Vec<u8> {
    let mut expected = vec![before; 131_072];
    for (row, staged) in expected.chunks_mut(2048).zip(staged.chunks(1024)) {
        row[..512].fill(0);
        row[512..1536].copy_from_slice(staged);
    }
    expected
}

#[test]
fn landings_start_again_and_follow_their_source() {
    let Some(gpus) = Gpus::get("landings_start_again_and_follow_their_source", 1) else { return };
    let device = &gpus[0];
    let mover = Mover::new(device).unwrap();
    let stream = Arc::new(Stream::new(device).unwrap());
    let mut target = allocate(device, 131_072);
    let mut landing = landing(&mover, &stream, &target);
    assert_eq!(landing.bytes(), 64 * 1536);
    assert!(landing.poll().unwrap(), "nothing runs before the first start");
    for seed in 0..20 {
        set(device, &mut target, 0xC5).unwrap();
        let staged = noise(65_536, seed);
        let staging = filled(device, &staged);
        landing.start(Some(&staging)).unwrap();
        if seed % 2 == 0 {
            // While it runs, perhaps: it waits for itself, and keeps what it reads.
            landing.start(Some(&staging)).unwrap();
            drop(staging);
            while !landing.poll().unwrap() {
                std::thread::yield_now();
            }
        } else {
            landing.wait().unwrap();
        }
        assert!(content(device, &target) == landed(&staged, 0xC5), "{seed}");
    }
}

#[test]
fn a_landing_that_is_dropped_has_landed() {
    let Some(gpus) = Gpus::get("a_landing_that_is_dropped_has_landed", 1) else { return };
    let device = &gpus[0];
    let mover = Mover::new(device).unwrap();
    let stream = Arc::new(Stream::new(device).unwrap());
    let mut target = allocate(device, 131_072);
    for seed in 0..10 {
        set(device, &mut target, 0x3A).unwrap();
        let staged = noise(65_536, seed);
        let staging = filled(device, &staged);
        let mut landing = landing(&mover, &stream, &target);
        landing.start(Some(&staging)).unwrap();
        drop(landing);
        assert!(content(device, &target) == landed(&staged, 0x3A), "{seed}");
    }
}

#[test]
fn landings_refuse_what_is_not_theirs() {
    let Some(gpus) = Gpus::get("landings_refuse_what_is_not_theirs", 1) else { return };
    let device = &gpus[0];
    let mover = Mover::new(device).unwrap();
    let stream = Arc::new(Stream::new(device).unwrap());
    let target = allocate(device, 131_072);
    let mut landing = landing(&mover, &stream, &target);
    let small = allocate(device, 65_535);
    let host = HostAllocator.allocate(65_536).unwrap();
    let (_, odd) = allocate(device, 65_544).split_at(8);
    for staging in [None, Some(&small), Some(&host), Some(&odd)] {
        match landing.start(staging).unwrap_err() {
            KernelError::Staging { staged: 65_536, found, .. } => {
                let given = staging.map(|memory| (memory.kind(), memory.len() as u64));
                assert_eq!(found, given);
            }
            error => panic!("{error}"),
        }
    }
    let one = |from: u64, into: u64| Move {
        from,
        into: target.address() + into,
        run: 16,
        dims: Dims::none(),
        effect: COPY,
    };
    let regions = [target.allocation().clone()];
    for (from, into, side) in [(49, 0, Side::Source), (0, 131_057, Side::Target)] {
        match Landing::new(&mover, &stream, &[one(from, into)], 64, &regions).unwrap_err() {
            KernelError::Outside { index: 0, side: found } => assert_eq!(found, side),
            error => panic!("{error}"),
        }
    }
    let regions = [host.allocation().clone()];
    let error = Landing::new(&mover, &stream, &[one(0, 0)], 64, &regions).unwrap_err();
    assert!(matches!(error, KernelError::WrongDevice { what: "a region", .. }), "{error}");
}

#[test]
fn the_driver_says_what_it_does_not_take() {
    let Some(gpus) = Gpus::get("the_driver_says_what_it_does_not_take", 1) else { return };
    let error = Mover::with(&gpus[0], Shape::default(), ".version 8.0\n.target sm_80\nnonsense\n");
    match error.unwrap_err() {
        KernelError::Load { log, .. } => assert!(log.contains("nonsense"), "{log}"),
        error => panic!("{error}"),
    }
}
