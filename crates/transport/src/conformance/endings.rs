//! What happens to reads when somebody leaves.

use std::sync::Arc;
use std::time::Instant;

use refit_pool::Key;

use super::world::{Chunk, World, allocate, compare};
use super::{Failure, Harness, Outcome, Verdict, ensure, ensure_err};
use crate::{Cause, LocalRange, Pull, PullError, Transport, TransportError};

/// After `disconnect`, batches prepared before fail, and give the memory back; new ones are refused.
pub fn disconnected_peers<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 1, 4096)?;
    let chunks = [Chunk::plain(0, 0, 4096)];
    let lease = world.lease(1, 4096, &[&chunks])?;
    let peer = world.sources[0].peer.clone();
    world.target.disconnect(&peer)?;
    let Err(error) = world.pull(lease, Vec::new()) else {
        return Err(Failure("read from a peer that was disconnected".into()));
    };
    ensure!(matches!(error, PullError::Failed { .. }), "failed with the wrong error: {error:?}");
    drop(error);
    ensure_err!(
        world.target.prepare(&peer, &[]),
        TransportError::Prepare { cause: Cause::UnknownPeer, .. },
        "reads from a peer that was disconnected"
    );
    ensure_err!(
        world.target.disconnect(&peer),
        TransportError::Connect { .. },
        "leaving a peer twice"
    );
    world.target.connect(&peer.name, &world.sources[0].transport.metadata()?)?;
    let settled = world.pull(world.lease(2, 4096, &[&chunks])?, Vec::new())?;
    compare(&harness.read(&settled.lease.arenas()[0]), &world.expected(4096, &[&chunks]))?;
    Ok(Outcome::Passed)
}

/// Reads end, one way or the other, when the memory they read was deregistered.
pub fn sources_that_deregister<H: Harness>(harness: &H) -> Verdict {
    let mut world = World::new(harness, 1, 1 << 16)?;
    let chunks = [Chunk::plain(0, 0, 1 << 15), Chunk::plain(1 << 15, 1 << 15, 1 << 15)];
    let lease = world.lease(1, 1 << 16, &[&chunks])?;
    if let Some(registration) = world.sources[0].registration.take() {
        world.sources[0].transport.deregister(registration)?;
    }
    without_owner(harness, world.pull(lease, Vec::new()))
}

/// Reads end, one way or the other, when the peer is gone.
pub fn sources_that_go_away<H: Harness>(harness: &H) -> Verdict {
    let mut world = World::new(harness, 1, 1 << 16)?;
    let lease = world.lease(1, 1 << 16, &[&[Chunk::plain(0, 0, 1 << 16)]])?;
    // Its memory stays, so that a read that arrives all the same reads memory.
    let _memory = world.sources.pop().map(|source| source.memory);
    without_owner(harness, world.pull(lease, Vec::new()))
}

fn without_owner<H: Harness, S>(
    harness: &H,
    result: Result<S, PullError<H::Transport>>,
) -> Verdict {
    match result {
        Err(PullError::Failed { .. }) => Ok(Outcome::Passed),
        Ok(_) if !harness.reads_fail_without_owner() => Ok(Outcome::Passed),
        Ok(_) => Err(Failure("read memory that nobody offers any more".into())),
        Err(error) => Err(Failure(format!("ended wrongly: {error:?}"))),
    }
}

/// A prepared batch keeps its destination registered and allocated, whoever deregisters and drops it.
pub fn registrations_outlived_by_batches<H: Harness>(harness: &H) -> Verdict {
    let world = World::new(harness, 1, 4096)?;
    let memory = allocate(harness, 4096)?;
    let target = LocalRange { address: memory.address(), len: 4096, kind: memory.kind() };
    let registration = world.target.register(memory.allocation())?;
    let batch = world.prepare(&world.sources[0], &[Chunk::plain(0, 0, 4096)], target)?;
    world.target.deregister(registration)?;
    let lease = world.pool.lease(Key::from([1; 32]), |_| Ok::<_, Failure>(vec![batch]))?;
    let settled = world.pull(lease, vec![memory])?;
    compare(
        &harness.read(&settled.live[0]),
        &world.expected(4096, &[&[Chunk::plain(0, 0, 4096)]]),
    )?;
    Ok(Outcome::Passed)
}

/// A pull dropped before it settled takes its memory out of circulation, and the agent takes no new reads.
pub fn pulls_dropped_in_flight<H: Harness>(harness: &H) -> Verdict {
    const BYTES: usize = 64 << 20;
    let mut world = World::new(harness, 1, BYTES)?;
    let peer = world.sources[0].peer.clone();
    let chunks = [Chunk::plain(0, 0, BYTES as u64)];
    let lease = world.lease(1, BYTES as u64, &[&chunks])?;
    let pull = Pull::start(Arc::clone(&world.target), lease, Vec::new(), ..)?;
    let pull = match pull.finish() {
        Ok(_) => {
            return Ok(Outcome::Skipped("it finishes reads before it returns from posting them"));
        }
        Err(PullError::Deadline { pull }) => pull,
        Err(error) => return Err(error.into()),
    };
    // A deadline in the past gives the pull back, and it still owns everything.
    let pull = match pull.wait(Instant::now()) {
        Ok(_) => return Ok(Outcome::Skipped("it settles within two polls")),
        Err(PullError::Deadline { pull }) => pull,
        Err(error) => return Err(error.into()),
    };
    ensure_err!(
        world.target.disconnect(&peer),
        TransportError::Connect { cause: Cause::InFlight { batches: 1 }, .. },
        "leaving a peer that is being read"
    );
    drop(pull);
    // The reads go on: where they are emulated, the source's own threads still read its memory.
    world.sources.drain(..).for_each(std::mem::forget);
    let stats = world.pool.stats();
    ensure!(
        stats.quarantined_bytes == BYTES as u64 && stats.quarantines == 1,
        "{} bytes in {} entries are quarantined, not {BYTES} in 1",
        stats.quarantined_bytes,
        stats.quarantines
    );
    ensure_err!(
        world.target.prepare(&peer, &[]),
        TransportError::Suspect { .. },
        "reads by an agent that abandoned some"
    );
    Ok(Outcome::Passed)
}
