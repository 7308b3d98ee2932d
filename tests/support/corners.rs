//! The numbers that arithmetic goes wrong at, and reads made of them for any transport.

use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};
use refit::planner::{Dim, Dims, Transform};
use refit::pool::{Allocator, HostAllocator, MemoryKind};
use refit::transport::{LocalRange, Peer, ReadOp, RemoteRange, Transport, TransportError};

/// What sums and products wrap, truncate or vanish at.
pub const CORNERS: [u64; 9] =
    [0, 1, (1 << 31) - 1, 1 << 31, u32::MAX as u64, 1 << 32, (1 << 63) - 1, 1 << 63, u64::MAX];

/// A number of [`CORNERS`].
pub fn corner() -> impl Strategy<Value = u64> {
    select(&CORNERS[..])
}

/// Which numbers of a thing to replace, and by what: one to four of them.
pub fn replacements() -> impl Strategy<Value = Vec<(prop::sample::Index, u64)>> {
    prop::collection::vec((any::<prop::sample::Index>(), corner()), 1..5)
}

/// Bytes from the first to one past the last, where no number can wrap.
#[must_use]
pub fn extent(run: u64, dims: &[(u64, u64)]) -> u128 {
    let more =
        |&(count, stride): &(u64, u64)| u128::from(count.saturating_sub(1)) * u128::from(stride);
    u128::from(run) + dims.iter().map(more).sum::<u128>()
}

/// Registered bytes of each side in [`reads`].
const LEN: u64 = 4096;

/// Has a transport prepare reads whose every number is right or a corner. What it accepts lies in registered memory on
/// both sides, counted in 128 bits; returns how many it accepted and refused.
///
/// # Panics
/// When it accepts another, or panics.
pub fn reads<T: Transport>(source: &T, target: &T, cases: u32) -> (u32, u32) {
    let [from, into] = [(); 2].map(|()| HostAllocator.allocate(4096).unwrap());
    let (from_registration, into_registration) =
        (source.register(from.allocation()).unwrap(), target.register(into.allocation()).unwrap());
    let peer = target.connect(source.agent(), &source.metadata().unwrap()).unwrap();
    let (from, into) = (from.address(), into.address());
    // Address and length on either side, the run, and how it repeats.
    let right = [from, LEN, into, LEN, LEN, 1, LEN, LEN];
    let mut runner =
        TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(cases) });
    let counts = std::cell::Cell::new((0, 0));
    let check = |replaced: Vec<(prop::sample::Index, u64)>| {
        let mut numbers = right;
        replaced.iter().for_each(|(at, value)| numbers[at.index(8)] = *value);
        let [from_at, from_len, into_at, into_len, run, count, from_stride, into_stride] = numbers;
        let dim = Dim { count, source_stride: from_stride, target_stride: into_stride };
        let dims = if count == 1 || !target.capabilities().strided_reads {
            Dims::none()
        } else {
            Dims::one(dim)
        };
        let repeats = if dims.is_none() { 1 } else { count };
        let kind = MemoryKind::Host;
        let read = ReadOp {
            from: RemoteRange { address: from_at, len: from_len, kind },
            into: LocalRange { address: into_at, len: into_len, kind },
            run,
            dims,
            transform: Transform::Copy,
            bulk: false,
        };
        let inside = |at: u64, len: u64, stride: u64, first: u64| {
            let extent = extent(run, &[(repeats, stride)]);
            let end = u128::from(at) + extent;
            extent == u128::from(len) && at >= first && end <= u128::from(first + LEN)
        };
        let legal = run > 0
            && repeats > 0
            && inside(from_at, from_len, from_stride, from)
            && inside(into_at, into_len, into_stride, into);
        let (accepted, refused) = counts.get();
        match target.prepare(&peer, std::slice::from_ref(&read)) {
            Ok(_) => {
                prop_assert!(legal, "accepted {read:?}");
                counts.set((accepted + 1, refused));
            }
            Err(error) => {
                let named = matches!(
                    error,
                    TransportError::Prepare { .. }
                        | TransportError::NotRegistered { .. }
                        | TransportError::Overlap { .. }
                );
                prop_assert!(named, "{error}");
                counts.set((accepted, refused + 1));
            }
        }
        Ok(())
    };
    runner.run(&replacements(), check).unwrap();
    let _: Peer = peer;
    drop((from_registration, into_registration, Arc::new(())));
    counts.get()
}
