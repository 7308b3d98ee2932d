//! Bytes arrive, all of them, and nothing else changes.

use refit_planner::{Dim, Dims};
use refit_pool::{Key, PoolOptions};

use super::world::{CANARY, Chunk, World, allocate, allocate_source, compare, pattern};
use super::{Failure, Harness, Outcome, Verdict, ensure, ensure_err};
use crate::{Cause, LocalRange, Transport, TransportError};

/// Reads land where they should, and the bytes around each destination stay.
pub fn bytes_arrive_between_canaries<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 1, 1 << 20)?;
    let chunks = [
        Chunk::plain(0, 4096, 100_000),
        Chunk::plain(500_000, 200_000, 4096),
        Chunk::plain((1 << 20) - 65_536, 300_000, 65_536),
    ];
    world.check(1 << 20, &[&chunks])?;
    Ok(Outcome::Passed)
}

/// Thousands of reads of a few bytes each, in an order that is neither side's.
pub fn many_small_reads<H: Harness>(harness: &H) -> Verdict {
    const READS: u64 = 4_000;
    let world = World::new(harness, 1, 1 << 18)?;
    let chunks: Vec<Chunk> =
        (0..READS).map(|read| Chunk::plain((read * 1_237 % READS) * 64, read * 32, 24)).collect();
    world.check(1 << 18, &[&chunks])?;
    Ok(Outcome::Passed)
}

/// Every size from 1 byte on, from and to odd addresses.
pub fn odd_sizes_and_offsets<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 1, 1 << 18)?;
    let mut at = 1;
    let mut chunks = Vec::new();
    for run in (1..130).chain([255, 4095, 4097, 65_537]) {
        chunks.push(Chunk::plain(at * 2 % 190_001, at, run));
        at += run + 1 + run % 7;
    }
    world.check(1 << 18, &[&chunks])?;
    Ok(Outcome::Passed)
}

/// A batch without reads, and a pull without batches, are done at once.
pub fn no_reads<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 1, 4096)?;
    world.check(4096, &[&[]])?;
    let lease = world.lease(2, 4096, &[])?;
    let settled = world.pull(lease, Vec::new())?;
    ensure!(settled.stats.bytes == 0, "{} bytes read by nothing", settled.stats.bytes);
    Ok(Outcome::Passed)
}

/// Strided reads are executed if `strided_reads` is declared, and refused if not.
pub fn strided_reads_where_declared<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 1, 1 << 20)?;
    let inner = Dim { count: 5, source_stride: 100, target_stride: 64 };
    let outer = Dim { count: 7, source_stride: 9_001, target_stride: 5 * 64 };
    let chunks = [
        Chunk::strided(3, 17, 33, rows(300, 512, 66)),
        // Interleaved with the first: its gaps are this one's runs.
        Chunk::strided(7, 17 + 33, 33, rows(300, 40, 66)),
        Chunk::strided(0, 100_000, 64, [outer, inner].into_iter().collect()),
    ];
    if world.target.capabilities_of(&world.sources[0].peer).strided_reads {
        world.check(1 << 20, &[&chunks])?;
        return Ok(Outcome::Passed);
    }
    let memory = allocate(harness, 1 << 20)?;
    let _registration = world.target.register(memory.allocation())?;
    let target = LocalRange { address: memory.address(), len: 1 << 20, kind: memory.kind() };
    for chunk in &chunks {
        let reads = [chunk.op(&world.sources[0].memory, target)];
        ensure_err!(
            world.try_prepare(&reads),
            TransportError::Prepare { cause: Cause::Strided { read: 0 }, .. },
            "a strided read"
        );
    }
    Ok(Outcome::Passed)
}

fn rows(count: u64, source_stride: u64, target_stride: u64) -> Dims {
    Dims::one(Dim { count, source_stride, target_stride })
}

/// Reads that ask for the second engine bring the same bytes as the others, beside them, cycle after cycle; where there
/// is no second engine they are as good.
pub fn bulk_reads_among_others<H: Harness>(harness: &H) -> Verdict {
    const BYTES: usize = 1 << 20;
    let mut world = World::new(harness, 1, BYTES)?;
    let mut chunks = vec![
        Chunk::bulk(0, 0, 300_000),
        Chunk::plain(300_000, 300_000, 4097),
        Chunk::bulk(500_001, 304_099, 65_537),
        Chunk::bulk((1 << 20) - 3, 400_000, 3),
        Chunk::bulk(1, 400_003, 1),
    ];
    if world.target.capabilities_of(&world.sources[0].peer).strided_reads {
        chunks.push(Chunk::strided(600_000, 500_000, 100, rows(1000, 150, 200)));
        // A wish, not an order: what the second engine cannot do, the first does.
        let wish = Chunk::strided(600_000, 500_100, 100, rows(1000, 150, 200));
        chunks.push(Chunk { bulk: true, ..wish });
    }
    for cycle in 0..3 {
        harness.write(&mut world.sources[0].memory, &pattern(cycle, BYTES));
        world.check(BYTES, &[&chunks])?;
    }
    Ok(Outcome::Passed)
}

/// Batches of several peers are posted together, all or some of them, and each writes what is its own.
pub fn many_batches_in_one_post<H: Harness>(harness: &H) -> Verdict {
    const SOURCES: usize = 6;
    const STRIPE: u64 = 64;
    let world = World::new(harness, SOURCES, 1 << 18)?;
    let stripes = |source: u64| -> Vec<Chunk> {
        let step = STRIPE * SOURCES as u64;
        let mut chunks: Vec<Chunk> = (0..50)
            .map(|row| Chunk::plain(row * 1000, row * step + source * STRIPE, STRIPE - source))
            .collect();
        let rest = 50 * step + source * 10_000;
        chunks.push(Chunk::bulk(100_000, rest, 9_999 - source));
        chunks
    };
    let all: Vec<Vec<Chunk>> = (0..SOURCES as u64).map(stripes).collect();
    let all: Vec<&[Chunk]> = all.iter().map(Vec::as_slice).collect();
    world.check(1 << 17, &all)?;
    // The last two, then the first four.
    let lease = world.lease(2, 1 << 17, &all)?;
    let settled = world.pull_some(lease, Vec::new(), 4..)?;
    let mut some: Vec<&[Chunk]> = vec![&[]; SOURCES];
    some[4..].copy_from_slice(&all[4..]);
    compare(&harness.read(&settled.lease.arenas()[0]), &world.expected(1 << 17, &some))?;
    let settled = world.pull_some(settled.lease, Vec::new(), ..4)?;
    compare(&harness.read(&settled.lease.arenas()[0]), &world.expected(1 << 17, &all))?;
    Ok(Outcome::Passed)
}

/// One prepared batch, posted again and again, brings what the source holds at the time. Nothing is built anew.
pub fn a_batch_posted_again_reads_what_is_there<H: Harness>(harness: &H) -> Verdict {
    const BYTES: usize = 1 << 16;
    let mut world = World::new(harness, 1, BYTES)?;
    let chunks: Vec<Chunk> =
        (0..16).map(|read| Chunk::plain(read * 4096, read * 4096, 4000)).collect();
    for cycle in 0..100 {
        harness.write(&mut world.sources[0].memory, &pattern(cycle, BYTES));
        let lease = world.lease(1, BYTES as u64, &[&chunks])?;
        ensure!(
            lease.is_hit() == (cycle > 0),
            "cycle {cycle} did not find what the one before prepared"
        );
        let settled = world.pull(lease, Vec::new())?;
        compare(&harness.read(&settled.lease.arenas()[0]), &world.expected(BYTES, &[&chunks]))
            .map_err(|Failure(what)| Failure(format!("cycle {cycle}: {what}")))?;
    }
    Ok(Outcome::Passed)
}

/// Batches of two peers run side by side into one arena.
pub fn two_peers_at_once<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 2, 1 << 20)?;
    let stripes = |odd: u64| -> Vec<Chunk> {
        (0..50).map(|read| Chunk::plain(read * 10_000, (2 * read + odd) * 5_000, 4_999)).collect()
    };
    let (even, odd) = (stripes(0), stripes(1));
    world.check(1 << 20, &[&even, &odd])?;
    Ok(Outcome::Passed)
}

/// Batches of one lease run one after the other into the same memory, cycle after cycle.
pub fn batches_in_turn_into_the_same_memory<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 2, 1 << 16)?;
    let first = [Chunk::plain(0, 0, 30_000), Chunk::plain(40_000, 30_000, 5_000)];
    let second = [Chunk::plain(7, 0, 35_000)];
    for _ in 0..20 {
        let lease = world.lease(1, 40_000, &[&first, &second])?;
        let settled = world.pull_some(lease, Vec::new(), ..1)?;
        compare(&harness.read(&settled.lease.arenas()[0]), &world.expected(40_000, &[&first]))?;
        let settled = world.pull_some(settled.lease, settled.live, 1..)?;
        compare(
            &harness.read(&settled.lease.arenas()[0]),
            &world.expected(40_000, &[&[], &second]),
        )?;
    }
    Ok(Outcome::Passed)
}

/// A pull may write memory outside the arena that it is given for the time.
pub fn live_memory_beside_the_arena<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 1, 8192)?;
    let mut whole = allocate(harness, 8192)?;
    harness.write(&mut whole, &[CANARY; 8192]);
    let target = LocalRange { address: whole.address(), len: 8192, kind: whole.kind() };
    let chunks = [Chunk::plain(0, 100, 1000), Chunk::plain(5000, 4100, 3000)];
    let lease = world.pool.lease(Key::from([1; 32]), |build| {
        build.register([whole.allocation()])?;
        Ok::<_, Failure>(vec![world.prepare(&world.sources[0], &chunks, target)?])
    })?;
    // Two parameters of one allocation; the second read ends at the last byte but some.
    let (first, second) = whole.split_at(4096);
    let settled = world.pull(lease, vec![first, second])?;
    ensure!(settled.live.len() == 2, "{} of 2 memories came back", settled.live.len());
    let found: Vec<u8> = settled.live.iter().flat_map(|memory| harness.read(memory)).collect();
    compare(&found, &world.expected(8192, &[&chunks]))?;
    Ok(Outcome::Passed)
}

/// A read may cross from one registration into the next, where they touch.
pub fn reads_cross_registrations<H: Harness>(harness: &H) -> Verdict {
    let options = PoolOptions { max_registration: Some(8192), ..PoolOptions::default() };
    let world = World::with_options(harness, 1, 1 << 16, options)?;
    let chunks = [Chunk::plain(5, 8_000, 20_000), Chunk::plain(30_000, 32_768, 16_384)];
    world.check(1 << 16, &[&chunks])?;
    Ok(Outcome::Passed)
}

/// Memory that a peer registers later can be read after connecting again, and batches built before stay good.
pub fn memory_registered_after_connecting<H: Harness>(harness: &H) -> Verdict {
    let mut world = World::new(harness, 1, 4096)?;
    let chunks = [Chunk::plain(0, 0, 4096)];
    drop(world.lease(1, 4096, &[&chunks])?);

    let mut later = allocate_source(harness, 4096)?;
    harness.write(&mut later, &pattern(9, 4096));
    let source = &mut world.sources[0];
    let _registration = source.transport.register(later.allocation())?;
    let earlier = std::mem::replace(&mut source.memory, later);
    ensure!(
        world.lease(2, 4096, &[&chunks]).is_err(),
        "memory was readable before it was published"
    );

    let source = &world.sources[0];
    world.target.connect(source.transport.agent(), &source.transport.metadata()?)?;
    let settled = world.pull(world.lease(2, 4096, &[&chunks])?, Vec::new())?;
    compare(&harness.read(&settled.lease.arenas()[0]), &world.expected(4096, &[&chunks]))?;
    drop(settled);
    world.sources[0].memory = earlier;
    world.check(4096, &[&chunks])?;
    Ok(Outcome::Passed)
}
