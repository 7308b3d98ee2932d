//! What must be refused, before anything moves.

use std::sync::Arc;

use refit_pool::Key;

use super::world::{Chunk, World, allocate};
use super::{Failure, Harness, Outcome, Verdict, ensure, ensure_err};
use crate::{Cause, LocalRange, Peer, Pull, PullError, ReadOp, Side, Transport, TransportError};

/// A read of 4096 bytes between whole registered memories, to be spoilt.
struct Good<H: Harness> {
    op: ReadOp,
    _memory: refit_pool::Memory,
    _registration: <H::Transport as Transport>::Registration,
}

fn good<H: Harness>(world: &World<'_, H>) -> Result<Good<H>, Failure> {
    let memory = allocate(world.harness, 4096)?;
    let registration = world.target.register(memory.allocation())?;
    let target = LocalRange { address: memory.address(), len: 4096, kind: memory.kind() };
    let op = Chunk::plain(0, 0, 4096).op(&world.sources[0].memory, target);
    world.try_prepare(std::slice::from_ref(&op))?;
    Ok(Good { op, _memory: memory, _registration: registration })
}

fn resized(op: &ReadOp, run: u64) -> ReadOp {
    let mut op = op.clone();
    (op.from.len, op.into.len, op.run) = (run, run, run);
    op
}

/// The destination was never registered.
pub fn local_memory_not_registered<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 1, 4096)?;
    let good = good(&world)?;
    let stranger = allocate(harness, 4096)?;
    let mut op = good.op.clone();
    op.into.address = stranger.address();
    ensure_err!(
        world.try_prepare(&[good.op.clone(), op]),
        TransportError::NotRegistered { side: Side::Local, read: 1, .. },
        "unregistered local memory"
    );
    Ok(Outcome::Passed)
}

/// The destination starts or ends outside its registration.
pub fn local_range_too_long<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 1, 1 << 20)?;
    let good = good(&world)?;
    // A registration is exact, whatever the page size of the memory.
    let mut early = good.op.clone();
    early.into.address -= 1;
    for op in [resized(&good.op, 4097), resized(&good.op, 1 << 20), early] {
        ensure_err!(
            world.try_prepare(&[op]),
            TransportError::NotRegistered { side: Side::Local, .. },
            "a local range that leaves its registration"
        );
    }
    Ok(Outcome::Passed)
}

/// The source starts or ends outside what the peer published.
pub fn remote_range_not_registered<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 1, 8192)?;
    let good = good(&world)?;
    for offset in [-1, 4097, 8192, 1 << 40] {
        let mut op = good.op.clone();
        op.from.address = op.from.address.wrapping_add_signed(offset);
        ensure_err!(
            world.try_prepare(&[op]),
            TransportError::NotRegistered { side: Side::Remote, .. },
            "a remote range that leaves its registration"
        );
    }
    Ok(Outcome::Passed)
}

/// Lengths and addresses near the end of the address space do not wrap into something small.
pub fn lengths_that_would_wrap<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 1, 8192)?;
    let good = good(&world)?;
    let (local, remote) = (good.op.into.address, good.op.from.address);
    for run in
        [u64::MAX, u64::MAX - 4095, 0_u64.wrapping_sub(local), 0_u64.wrapping_sub(remote), 1 << 63]
    {
        ensure_err!(
            world.try_prepare(&[resized(&good.op, run)]),
            TransportError::NotRegistered { .. },
            format!("a read of {run} bytes")
        );
    }
    for address in [u64::MAX, u64::MAX - 4095, 0] {
        let mut op = good.op.clone();
        op.from.address = address;
        ensure_err!(
            world.try_prepare(&[op]),
            TransportError::NotRegistered { side: Side::Remote, .. },
            "a far source"
        );
        let mut op = good.op.clone();
        op.into.address = address;
        ensure_err!(
            world.try_prepare(&[op]),
            TransportError::NotRegistered { side: Side::Local, .. },
            "a far target"
        );
    }
    Ok(Outcome::Passed)
}

/// The two ranges and the run of a read must agree, and have bytes.
pub fn lengths_that_disagree<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 1, 8192)?;
    let good = good(&world)?;
    let (mut from, mut into, mut run) = (good.op.clone(), good.op.clone(), good.op.clone());
    from.from.len -= 1;
    into.into.len -= 1;
    run.run -= 1;
    for op in [from, into, run, resized(&good.op, 0)] {
        ensure_err!(
            world.try_prepare(&[op]),
            TransportError::Prepare { .. },
            "a read whose lengths disagree"
        );
    }
    Ok(Outcome::Passed)
}

/// No byte is written twice, within a batch or by two.
pub fn destinations_that_overlap<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 2, 8192)?;
    let good = good(&world)?;
    let (mut head, mut tail) = (resized(&good.op, 2049), resized(&good.op, 2048));
    tail.into.address += 2048;
    for reads in [
        [head.clone(), tail.clone()],
        [tail.clone(), head.clone()],
        [good.op.clone(), good.op.clone()],
    ] {
        ensure_err!(
            world.try_prepare(&reads),
            TransportError::Overlap { .. },
            "reads into the same bytes"
        );
    }
    head = resized(&head, 2048);
    world.try_prepare(&[head, tail])?;

    let lease =
        world.lease(1, 8192, &[&[Chunk::plain(0, 0, 4097)], &[Chunk::plain(0, 4096, 4096)]])?;
    ensure_err!(
        Pull::start(Arc::clone(&world.target), lease, Vec::new(), ..),
        PullError::Overlap { first: 0, second: 1, .. },
        "two batches into the same bytes"
    );
    Ok(Outcome::Passed)
}

/// A region inside a registration shares it; one that crosses its border is refused.
pub fn registrations_that_overlap<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 1, 8192)?;
    let memory = allocate(harness, 8192)?;
    let first = world.target.register(memory.allocation())?;
    let second = world.target.register(memory.allocation())?;
    let target = LocalRange { address: memory.address(), len: 8192, kind: memory.kind() };
    let read = [Chunk::plain(0, 0, 8192).op(&world.sources[0].memory, target)];
    world.try_prepare(&read)?;
    world.target.deregister(first)?;
    world.try_prepare(&read)?;
    world.target.deregister(second)?;
    ensure_err!(
        world.try_prepare(&read),
        TransportError::NotRegistered { side: Side::Local, .. },
        "memory that was deregistered as often as registered"
    );
    Ok(Outcome::Passed)
}

/// Reads from, and connections to, agents that were never introduced.
pub fn peers_that_nobody_knows<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 1, 4096)?;
    let stranger = Peer { name: "nobody".into() };
    ensure_err!(
        world.target.prepare(&stranger, &[]),
        TransportError::Prepare { cause: Cause::UnknownPeer, .. },
        "reads from an unknown peer"
    );
    ensure_err!(
        world.target.disconnect(&stranger),
        TransportError::Connect { .. },
        "leaving an unknown peer"
    );
    let own = world.target.metadata()?;
    ensure_err!(
        world.target.connect(world.target.agent(), &own),
        TransportError::Connect { .. },
        "connecting to itself"
    );
    Ok(Outcome::Passed)
}

/// Metadata is taken only for the agent that published it, and names only if they are plain.
pub fn metadata_of_somebody_else<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 2, 4096)?;
    let [first, second] =
        [0, 1].map(|index: usize| world.sources[index].transport.agent().to_owned());
    let metadata = world.sources[0].transport.metadata()?;
    for name in [second.as_str(), "nobody", "", "a\0b", &format!("{first}\0"), &"x".repeat(1000)] {
        ensure_err!(
            world.target.connect(name, &metadata),
            TransportError::Connect { .. },
            format!("metadata under the name {name:?}")
        );
    }
    world.target.connect(&first, &metadata)?;
    world.check(4096, &[&[Chunk::plain(0, 0, 4096)]])?;
    Ok(Outcome::Passed)
}

/// Truncated, damaged and invented metadata. The good one still works afterwards.
pub fn metadata_that_is_damaged<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 1, 4096)?;
    let fresh = harness.agent("fresh")?;
    let name = world.sources[0].transport.agent();
    let metadata = world.sources[0].transport.metadata()?;
    let refuse = |bytes: &[u8], what: &str, at: usize| -> Result<(), Failure> {
        ensure_err!(
            fresh.connect(name, bytes),
            TransportError::Connect { .. },
            format!("metadata {what} {at}")
        );
        Ok(())
    };
    for len in 0..metadata.len() {
        refuse(&metadata[..len], "cut at byte", len)?;
    }
    for at in 0..metadata.len() {
        let mut damaged = metadata.clone();
        damaged[at] ^= 1 << (at % 8);
        refuse(&damaged, "with a flipped bit in byte", at)?;
    }
    for len in [1, 64, 65_536] {
        refuse(&super::world::pattern(len, len), "invented, of length", len)?;
    }
    let mut longer = metadata.clone();
    longer.push(0);
    refuse(&longer, "with bytes behind its", metadata.len())?;
    fresh.connect(name, &metadata)?;
    Ok(Outcome::Passed)
}

/// A pull is refused unless it is given everything its batches write.
pub fn memory_that_the_pull_does_not_own<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 1, 8192)?;
    let live = allocate(harness, 8192)?;
    let target = LocalRange { address: live.address(), len: 8192, kind: live.kind() };
    let lease = world.pool.lease(Key::from([1; 32]), |build| {
        build.register([live.allocation()])?;
        Ok::<_, Failure>(vec![world.prepare(
            &world.sources[0],
            &[Chunk::plain(0, 4000, 200)],
            target,
        )?])
    })?;
    let (half, _rest) = live.split_at(4096);
    let Err(error) = Pull::start(Arc::clone(&world.target), lease, vec![half], ..) else {
        return Err(Failure("a pull into memory that it does not own was started".into()));
    };
    let PullError::NotOwned { batch: 0, len: 200, live, .. } = error else {
        return Err(Failure(format!("refused with the wrong error: {error:?}")));
    };
    ensure!(live.len() == 1, "{} of 1 memories came back", live.len());
    Ok(Outcome::Passed)
}

/// A batch works only with the agent that prepared it.
pub fn batches_of_another_agent<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 1, 4096)?;
    let lease = world.lease(1, 4096, &[&[Chunk::plain(0, 0, 4096)]])?;
    let other = Arc::new(harness.agent("other")?);
    ensure_err!(
        Pull::start(other, lease, Vec::new(), ..),
        PullError::Failed { .. },
        "a batch that another agent prepared"
    );
    Ok(Outcome::Passed)
}
