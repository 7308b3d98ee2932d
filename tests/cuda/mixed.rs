//! What batches of mixed reads leave behind, against the host, and where in the stream they take place.

use std::sync::Arc;
use std::time::Instant;

use refit_planner::{Dim, Dims, Dtype, Transform};
use refit_pool::cuda::{CudaAllocator, Stream, set, upload};
use refit_pool::{Allocator, Key, Memory, Pool, PoolOptions};
use refit_transport::peer::{Engines, PeerOptions, PeerTransport};
use refit_transport::{
    LocalRange, Pull, ReadOp, RemoteRange, Transport, TransportError, TransportRegistrar,
};

use crate::gpu::{Gpus, pattern};
use crate::peer::{PATIENCE, agent, bytes_of};

const CANARY: u8 = 0xC5;

/// Deterministic numbers below a limit.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        (self.0 >> 33) % limit
    }
}

/// A read in offsets.
#[derive(Clone, Debug)]
struct Piece {
    from: u64,
    into: u64,
    run: u64,
    dims: Dims,
    transform: Transform,
    bulk: bool,
}

impl Piece {
    fn target_extent(&self) -> u64 {
        self.dims.target_extent(self.transform.target_bytes(self.run))
    }

    fn op(&self, source: &Memory, target: &Memory) -> ReadOp {
        ReadOp {
            from: RemoteRange {
                address: source.address() + self.from,
                len: self.dims.source_extent(self.run),
                kind: source.kind(),
            },
            into: LocalRange {
                address: target.address() + self.into,
                len: self.target_extent(),
                kind: target.kind(),
            },
            run: self.run,
            dims: self.dims.clone(),
            transform: self.transform,
            bulk: self.bulk,
        }
    }

    /// What it does, run by run, on the host.
    fn carry_out(&self, source: &[u8], target: &mut [u8]) {
        let size = |number: u64| usize::try_from(number).unwrap();
        for (from, into) in self.dims.offsets() {
            let from = &source[size(self.from + from)..][..size(self.run)];
            let into = &mut target[size(self.into + into)..];
            match self.transform {
                Transform::Cast { from: Dtype::F32, to: Dtype::Bf16 } => {
                    for (from, into) in from.chunks_exact(4).zip(into.chunks_exact_mut(2)) {
                        let float = f32::from_le_bytes(from.try_into().unwrap());
                        into.copy_from_slice(&half::bf16::from_f32(float).to_le_bytes());
                    }
                }
                _ => into[..from.len()].copy_from_slice(from),
            }
        }
    }
}

/// Reads of every kind, from anywhere, side by side in the target with gaps between them.
fn pieces(numbers: &mut Numbers, source_bytes: u64, target_bytes: u64) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut into = numbers.below(64);
    loop {
        let kind = numbers.below(4);
        let cast = kind == 3;
        let unit = if cast { 4 } else { 1 };
        let transform = if cast {
            Transform::Cast { from: Dtype::F32, to: Dtype::Bf16 }
        } else {
            Transform::Copy
        };
        let limit = [3, 100, 5000, 300_000][usize::try_from(numbers.below(4)).unwrap()];
        let run = (1 + numbers.below(limit)) * unit;
        let written = transform.target_bytes(run);
        let dims: Dims = match kind {
            0 | 1 => Dims::none(),
            _ => {
                let count = 2 + numbers.below(40);
                let stride = written + if cast { 2 * numbers.below(9) } else { numbers.below(17) };
                let inner =
                    Dim { count, source_stride: unit * numbers.below(2000), target_stride: stride };
                let outer = Dim {
                    count: 1 + numbers.below(3),
                    source_stride: unit * numbers.below(5000),
                    target_stride: (count - 1) * stride + written + 2 * numbers.below(30),
                };
                [outer, inner].into_iter().collect()
            }
        };
        into = into.next_multiple_of(if cast { 2 } else { 1 });
        let extent = dims.source_extent(run);
        if extent >= source_bytes {
            continue;
        }
        let from = numbers.below(source_bytes - extent) / unit * unit;
        let piece = Piece { from, into, run, dims, transform, bulk: kind == 1 };
        let end = into + piece.target_extent();
        if end > target_bytes {
            return pieces;
        }
        pieces.push(piece);
        into = end + numbers.below(40);
    }
}

/// Mixed programs of several sources and engines leave exactly what the host makes of them, canaries included.
#[test]
fn mixed_reads_agree_with_the_host() {
    let Some(gpus) = Gpus::get("mixed::mixed_reads_agree_with_the_host", 1) else { return };
    const SOURCE: usize = 2 << 20;
    const TARGET: usize = 8 << 20;
    for seed in 0..12 {
        let engines = [Engines::AsPlanned, Engines::Kernel, Engines::Copy]
            [usize::try_from(seed % 3).unwrap()];
        let mut numbers = Numbers(seed);
        let device = &gpus[0];
        let target = Arc::new(agent(device, PeerOptions::new("target").with_engines(engines)));
        let sources: Vec<_> = (0..3)
            .map(|index: usize| {
                let device = &gpus[index % gpus.len()];
                let transport = agent(device, PeerOptions::new("source"));
                let mut memory = CudaAllocator::new(device.clone()).allocate(SOURCE).unwrap();
                let mut bytes = pattern(seed * 3 + index as u64, SOURCE);
                // No NaN: which one it becomes is nobody's promise.
                bytes.chunks_exact_mut(4).for_each(|float| float[3] &= 0x3F);
                upload(device, &mut memory, 0, &bytes).unwrap();
                let registration = transport.register(memory.allocation()).unwrap();
                (transport, memory, registration, bytes)
            })
            .collect();
        let mut lists = vec![Vec::new(); 3];
        for piece in pieces(&mut numbers, SOURCE as u64, TARGET as u64) {
            lists[usize::try_from(numbers.below(3)).unwrap()].push(piece);
        }
        let mut expected = vec![CANARY; TARGET];
        for (list, source) in lists.iter().zip(&sources) {
            list.iter().for_each(|piece| piece.carry_out(&source.3, &mut expected));
        }
        let pool = Pool::new(
            CudaAllocator::new(device.clone()),
            TransportRegistrar::new(Arc::clone(&target)),
            PoolOptions::default(),
        );
        for cycle in 0..3 {
            let lease = pool.lease(Key::from([0; 32]), |build| {
                let arena = build.arena(TARGET as u64).unwrap();
                let whole =
                    LocalRange { address: arena.address(), len: TARGET as u64, kind: arena.kind() };
                let batches = lists.iter().zip(&sources).map(|(list, source)| {
                    let peer = target.connect(source.0.agent(), &source.0.metadata()?)?;
                    let ops: Vec<ReadOp> = list
                        .iter()
                        .map(|piece| {
                            let mut op = piece.op(&source.1, &source.1);
                            op.into.address = whole.address + piece.into;
                            op.into.kind = whole.kind;
                            op
                        })
                        .collect();
                    target.prepare(&peer, &ops)
                });
                batches.collect::<Result<Vec<_>, TransportError>>()
            });
            let mut lease = lease.unwrap();
            set(device, &mut lease.arenas_mut()[0], CANARY).unwrap();
            let pull = Pull::start(Arc::clone(&target), lease, Vec::new(), ..).unwrap();
            let posting = pull.stats().posting;
            let settled = pull.wait(Instant::now() + PATIENCE).unwrap();
            if cycle == 2 {
                let reads: usize = lists.iter().map(Vec::len).sum();
                println!("seed {seed}: {reads} reads posted in {posting:?}");
            }
            let found = bytes_of(device, &settled.lease.arenas()[0]);
            let wrong = found.iter().zip(&expected).position(|(found, expected)| found != expected);
            if let Some(at) = wrong {
                let of = lists.iter().flatten().find(|piece| {
                    (piece.into..piece.into + piece.target_extent()).contains(&(at as u64))
                });
                panic!(
                    "seed {seed}, {engines:?}: byte {at} is {:#x}, not {:#x}: {of:?}",
                    found[at], expected[at]
                );
            }
        }
    }
}

/// Work that the caller queues behind a pull sees its bytes, and a pull sees what was queued before it.
#[test]
fn pulls_keep_their_place_in_the_stream() {
    let Some(gpus) = Gpus::get("mixed::pulls_keep_their_place_in_the_stream", 1) else { return };
    const BYTES: usize = 64 << 20;
    let device = &gpus[0];
    for engines in [Engines::Kernel, Engines::Copy] {
        let stream = Arc::new(Stream::new(device).unwrap());
        let options = PeerOptions::new("target").with_engines(engines);
        let target = Arc::new(PeerTransport::new(Arc::clone(&stream), options).unwrap());
        let source = agent(device, PeerOptions::new("source"));
        let allocator = CudaAllocator::new(device.clone());
        let (mut weights, after) =
            (allocator.allocate(BYTES).unwrap(), allocator.allocate(BYTES).unwrap());
        set(device, &mut weights, 1).unwrap();
        let _registration = source.register(weights.allocation()).unwrap();
        let peer = target.connect(source.agent(), &source.metadata().unwrap()).unwrap();
        let pool = Pool::new(
            allocator,
            TransportRegistrar::new(Arc::clone(&target)),
            PoolOptions::default(),
        );
        let lease = pool.lease(Key::from([0; 32]), |build| {
            let arena = build.arena(BYTES as u64).unwrap();
            let whole = Piece {
                from: 0,
                into: 0,
                run: BYTES as u64,
                dims: Dims::none(),
                transform: Transform::Copy,
                bulk: true,
            };
            let mut op = whole.op(&weights, &weights);
            op.into.address = arena.address();
            Ok::<_, TransportError>(vec![target.prepare(&peer, &[op])?])
        });
        let lease = lease.unwrap();
        let arena = lease.arenas()[0].address();
        let raw: cudarc::driver::sys::CUstream = stream.raw().cast();
        let entered = device.enter().unwrap();
        // SAFETY: the test alone uses these bytes, and looks at them when the stream is done.
        unsafe { cudarc::driver::result::memset_d8_async(weights.address(), 7, BYTES, raw) }
            .unwrap();
        let pull = Pull::start(Arc::clone(&target), lease, Vec::new(), ..).unwrap();
        // SAFETY: the same; this reads what the pull writes, behind it.
        unsafe { cudarc::driver::result::memcpy_dtod_async(after.address(), arena, BYTES, raw) }
            .unwrap();
        stream.synchronize().unwrap();
        drop(entered);
        assert!(bytes_of(device, &after).iter().all(|&byte| byte == 7), "{engines:?}");
        pull.wait(Instant::now() + PATIENCE).unwrap();
    }
}
