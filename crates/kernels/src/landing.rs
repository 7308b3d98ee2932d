//! Moves within one device, any number of times.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use refit_pool::cuda::{Event, Stream};
use refit_pool::{KeepAlive, Memory, Region};

use crate::error::{KernelError, Side};
use crate::mover::{Mover, Resident};
use crate::moves::{Extent, Move};
use crate::raw::ALIGN;
use crate::table::Table;

/// Moves from one piece of a device's memory, such as a staging area, to others of the same device, carried out as often
/// as wanted and without waiting.
///
/// Safe, since what it reads and writes is memory of a device that it keeps allocated, and no reference to such memory
/// exists: who writes there at the same time gets other bytes than they expect, and nothing worse. Order it by its
/// stream, or start it when what it reads is there.
#[derive(Debug)]
pub struct Landing {
    mover: Arc<Mover>,
    stream: Arc<Stream>,
    event: Event,
    /// Bytes that a source has to have; none where nothing is read.
    source: Option<u64>,
    /// Taken apart by hand: what a kernel may still use must not be freed.
    held: ManuallyDrop<Held>,
    state: State,
}

/// How far the last start has come, as far as is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing runs.
    Idle,
    /// Something may run, and no event tells when it has ended.
    Queued,
    /// The event tells.
    Marked,
}

/// What the kernel uses while it runs.
#[derive(Debug)]
struct Held {
    table: Resident,
    _target: Vec<KeepAlive>,
    source: Option<KeepAlive>,
}

impl Landing {
    /// Checks the moves, and brings them to the device.
    ///
    /// [`Move::from`] counts from the start of the memory that [`start`](Self::start) will be given, of which the moves
    /// read the first `source` bytes at most. [`Move::into`] is an address; every byte written, and what lies between
    /// the runs of a move, is in `targets`, where regions that touch or overlap count as one.
    ///
    /// # Errors
    /// As [`Table::new`]; [`KernelError::Outside`] when a move leaves its memory; [`KernelError::WrongDevice`] when a
    /// region or the stream is another device's; [`KernelError::Allocate`], [`KernelError::Cuda`].
    pub fn new(
        mover: &Arc<Mover>,
        stream: &Arc<Stream>,
        moves: &[Move],
        source: u64,
        targets: &[Region],
    ) -> Result<Self, KernelError> {
        let device = mover.device();
        if stream.device() != device {
            return Err(mover.wrong("the stream", stream.device().kind()));
        }
        if let Some(region) = targets.iter().find(|region| region.kind() != device.kind()) {
            return Err(mover.wrong("a region", region.kind()));
        }
        let bounds = targets
            .iter()
            .map(|region| (region.address(), region.address().saturating_add(region.len())));
        let reads = check(moves, source, &joined(bounds))?;
        let table = mover.upload(&Table::new(moves)?)?;
        let target = targets.iter().map(|region| region.keep_alive().clone()).collect();
        Ok(Self {
            mover: Arc::clone(mover),
            stream: Arc::clone(stream),
            event: Event::new(device)?,
            source: reads.then_some(source),
            held: ManuallyDrop::new(Held { table, _target: target, source: None }),
            state: State::Idle,
        })
    }

    /// The stream it runs on.
    #[must_use]
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Bytes written each time; saturated.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.held.table.bytes()
    }

    /// Queues the moves behind what the stream has. Waits first where an earlier start has not come to its end.
    ///
    /// `source` is what they read from; zeros need none.
    ///
    /// # Errors
    /// [`KernelError::SourceTooSmall`], [`KernelError::Misaligned`] and [`KernelError::WrongDevice`] when the source is
    /// not one; [`KernelError::Cuda`] when the driver fails, or an earlier start did.
    pub fn start(&mut self, source: Option<&Memory>) -> Result<(), KernelError> {
        let mut address = 0;
        if let Some(needed) = self.source {
            let found = source.map_or(0, |memory| memory.len() as u64);
            let Some(source) = source.filter(|_| found >= needed) else {
                return Err(KernelError::SourceTooSmall { needed, found });
            };
            if source.kind() != self.mover.device().kind() {
                return Err(self.mover.wrong("the source", source.kind()));
            }
            if !source.address().is_multiple_of(ALIGN) {
                return Err(KernelError::Misaligned { align: ALIGN });
            }
            address = source.address();
        }
        self.wait()?;
        if self.held.table.is_empty() {
            return Ok(());
        }
        // No kernel uses the one that it replaces.
        self.held.source = source.map(|memory| memory.allocation().keep_alive().clone());
        // Also where the launch fails: the driver may report what went wrong earlier.
        self.state = State::Queued;
        // SAFETY: `new` and the checks above found every address in memory of the device that `held` keeps, with the
        // table; it goes only when this has ended. Others that write there are excluded by nothing, but see nothing and
        // show nothing except bytes of a device. The address is a multiple.
        unsafe { self.mover.launch_from(address, &self.held.table, &self.stream) }?;
        self.event.record(&self.stream)?;
        self.state = State::Marked;
        Ok(())
    }

    /// Whether the last start has come to its end; so it has where there was none.
    ///
    /// # Errors
    /// [`KernelError::Cuda`] when the driver or the work failed.
    pub fn poll(&mut self) -> Result<bool, KernelError> {
        match self.state {
            State::Idle => return Ok(true),
            State::Marked if !self.event.is_done()? => return Ok(false),
            State::Marked => self.state = State::Idle,
            State::Queued => self.wait()?,
        }
        Ok(true)
    }

    /// Waits until the last start has come to its end.
    ///
    /// # Errors
    /// [`KernelError::Cuda`] when the driver or the work failed.
    pub fn wait(&mut self) -> Result<(), KernelError> {
        match self.state {
            State::Idle => {}
            State::Marked => self.event.wait()?,
            State::Queued => self.stream.synchronize()?,
        }
        self.state = State::Idle;
        Ok(())
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        match self.wait() {
            // SAFETY: dropped once, here, and not used again.
            Ok(()) => unsafe { ManuallyDrop::drop(&mut self.held) },
            Err(error) => {
                tracing::warn!(%error, "memory leaked: it is not known whether a landing still uses it");
            }
        }
    }
}

/// Whether anything is read, if all moves stay inside.
fn check(moves: &[Move], source: u64, bounds: &[Extent]) -> Result<bool, KernelError> {
    let mut reads = false;
    for (index, one) in moves.iter().enumerate() {
        let pattern = one.check(index)?;
        if let Some((_, end)) = pattern.source {
            if end > source {
                return Err(KernelError::Outside { index, side: Side::Source });
            }
            reads = true;
        }
        if !inside(pattern.target, bounds) {
            return Err(KernelError::Outside { index, side: Side::Target });
        }
    }
    Ok(reads)
}

/// In order, with those that touch joined.
fn joined(extents: impl Iterator<Item = Extent>) -> Vec<Extent> {
    let mut all: Vec<Extent> = extents.collect();
    all.sort_unstable();
    let mut joined: Vec<Extent> = Vec::with_capacity(all.len());
    for (start, end) in all {
        match joined.last_mut() {
            Some((_, last)) if start <= *last => *last = end.max(*last),
            _ => joined.push((start, end)),
        }
    }
    joined
}

fn inside((start, end): Extent, bounds: &[Extent]) -> bool {
    let behind = bounds.partition_point(|(first, _)| *first <= start);
    behind.checked_sub(1).is_some_and(|at| end <= bounds[at].1)
}

#[cfg(test)]
mod tests {
    use refit_planner::{Dim, Dims, Dtype, Transform};

    use super::*;
    use crate::moves::Effect;

    #[test]
    fn regions_that_touch_are_one() {
        let bounds = joined([(30, 40), (0, 10), (10, 20), (12, 15), (50, 50)].into_iter());
        assert_eq!(bounds, [(0, 20), (30, 40), (50, 50)]);
        for (extent, expected) in [
            ((0, 20), true),
            ((5, 15), true),
            ((30, 40), true),
            ((0, 21), false),
            ((15, 35), false),
            ((29, 31), false),
            ((40, 41), false),
            ((60, 61), false),
        ] {
            assert_eq!(inside(extent, &bounds), expected, "{extent:?}");
        }
        assert!(!inside((0, 1), &[]));
    }

    #[test]
    fn every_byte_of_both_sides_counts() {
        let dims = Dims::one(Dim { count: 3, source_stride: 16, target_stride: 20 });
        let cast = Transform::Cast { from: Dtype::Bf16, to: Dtype::F32 };
        // Reads 1000..1040 and writes 2000..2056.
        let one = Move { from: 1000, into: 2000, run: 8, dims, effect: Effect::Transform(cast) };
        let outside = |source: u64, bounds: &[Extent]| match check(
            std::slice::from_ref(&one),
            source,
            bounds,
        ) {
            Ok(reads) => {
                assert!(reads);
                None
            }
            Err(KernelError::Outside { index: 0, side }) => Some(side),
            Err(other) => panic!("{other}"),
        };
        assert_eq!(outside(1040, &[(2000, 2056)]), None);
        assert_eq!(outside(1039, &[(2000, 2056)]), Some(Side::Source));
        assert_eq!(outside(0, &[(2000, 2056)]), Some(Side::Source));
        assert_eq!(outside(1040, &[(2000, 2055)]), Some(Side::Target));
        assert_eq!(outside(1040, &[(2001, 2056)]), Some(Side::Target));
        // Zeros have no source.
        let zero = Move { effect: Effect::Zero, ..one };
        assert!(!check(&[zero], 0, &[(2000, 2048)]).unwrap());
    }
}
