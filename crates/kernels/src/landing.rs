//! Moves within one device, any number of times.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use refit_pool::cuda::{Event, Stream};
use refit_pool::{KeepAlive, Memory, Region};

use crate::error::{KernelError, Side};
use crate::mover::{Mover, Pace, Resident};
use crate::moves::{Extent, Move};
use crate::raw::ALIGN;
use crate::table::Table;

/// Moves within the memory of one device, carried out as often as wanted and without waiting.
///
/// Sources are offsets into staging memory, which is named at each start and may be another one each time; targets are
/// addresses.
///
/// Safe, since what it reads and writes is memory of a device that it keeps allocated, and no reference to such memory
/// exists: who writes there at the same time gets other bytes than they expect, and nothing worse. Order it by its
/// [`stream`](Self::stream), or start it when what it reads is there.
#[derive(Debug)]
pub struct Landing {
    mover: Arc<Mover>,
    stream: Arc<Stream>,
    event: Event,
    /// Bytes of staging memory that the moves may read; none where they read nothing.
    staged: Option<u64>,
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
    _targets: Arc<[KeepAlive]>,
    /// Of the last start, until it is known to have ended.
    staging: Option<KeepAlive>,
}

impl Landing {
    /// Checks the moves, and brings them to the device. Every byte they read, and what lies between their runs, is one of
    /// the first `staged` bytes of staging memory; every byte they write is in `regions`, all of them memory of the
    /// device. Regions that touch or overlap count as one.
    ///
    /// # Errors
    /// As [`Table::new`]; [`KernelError::Outside`] when a move leaves its memory; [`KernelError::WrongDevice`] when a
    /// region or the stream is another device's; [`KernelError::Allocate`], [`KernelError::Cuda`].
    pub fn new(
        mover: &Arc<Mover>,
        stream: &Arc<Stream>,
        moves: &[Move],
        staged: u64,
        regions: &[Region],
    ) -> Result<Self, KernelError> {
        let mut one = Self::series(mover, stream, &[moves], staged, regions)?;
        match one.pop() {
            Some(landing) => Ok(landing),
            None => unreachable!("as many landings as lists of moves"),
        }
    }

    /// A landing for each list of moves, as [`new`](Self::new) makes one, brought to the device in one copy: what a refit
    /// in many waves needs.
    ///
    /// # Errors
    /// As [`new`](Self::new); the index of a move is that in its own list.
    pub fn series<M: AsRef<[Move]>>(
        mover: &Arc<Mover>,
        stream: &Arc<Stream>,
        series: &[M],
        staged: u64,
        regions: &[Region],
    ) -> Result<Vec<Self>, KernelError> {
        let device = mover.device();
        if stream.device() != device {
            return Err(mover.wrong("the stream", stream.device().kind()));
        }
        if let Some(region) = regions.iter().find(|region| region.kind() != device.kind()) {
            return Err(mover.wrong("a region", region.kind()));
        }
        let bounds = regions
            .iter()
            .map(|region| (region.address(), region.address().saturating_add(region.len())));
        let bounds = joined(bounds);
        let (mut tables, mut reads) = (Vec::new(), Vec::new());
        for moves in series {
            reads.push(check(moves.as_ref(), staged, &bounds)?);
            tables.push(Table::new(moves.as_ref())?);
        }
        let targets: Arc<[KeepAlive]> =
            regions.iter().map(|region| region.keep_alive().clone()).collect();
        let tables = mover.upload_all(&tables)?.into_iter().zip(reads);
        let landing = |(table, reads): (Resident, bool)| {
            Ok(Self {
                mover: Arc::clone(mover),
                stream: Arc::clone(stream),
                event: Event::new(device)?,
                staged: reads.then_some(staged),
                held: ManuallyDrop::new(Held {
                    table,
                    _targets: Arc::clone(&targets),
                    staging: None,
                }),
                state: State::Idle,
            })
        };
        tables.map(landing).collect()
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

    /// Queues the moves out of this staging memory behind what the stream has. Waits first where an earlier start has not
    /// come to its end. Moves that read nothing need no staging memory.
    ///
    /// # Errors
    /// [`KernelError::Staging`] when that memory is missing, too short, not the device's or does not start at a multiple
    /// of 16; [`KernelError::Cuda`] when the driver fails, or an earlier start did.
    pub fn start(&mut self, staging: Option<&Memory>) -> Result<(), KernelError> {
        self.start_at(Pace::Alone, staging)
    }

    /// As [`start`](Self::start), at this pace.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_at(&mut self, pace: Pace, staging: Option<&Memory>) -> Result<(), KernelError> {
        self.wait()?;
        let base = match self.staged {
            None => 0,
            Some(staged) => self.base(staged, staging)?,
        };
        if self.held.table.is_empty() {
            return Ok(());
        }
        self.held.staging = staging.map(|memory| memory.allocation().keep_alive().clone());
        // Also where the launch fails: the driver may report what went wrong earlier.
        self.state = State::Queued;
        // SAFETY: `new` found every target in memory of the device and every source in the first bytes of the staging
        // memory, which `base` found there; `held` keeps both, with the table, and goes only when this has ended. Others
        // that write there are excluded by nothing, but see nothing and show nothing except bytes of a device.
        unsafe { self.mover.launch_from(base, &self.held.table, &self.stream, pace) }?;
        self.event.record(&self.stream)?;
        self.state = State::Marked;
        Ok(())
    }

    /// Where the moves read, if they can.
    fn base(&self, staged: u64, staging: Option<&Memory>) -> Result<u64, KernelError> {
        let kind = self.mover.device().kind();
        let fits = |memory: &&Memory| {
            memory.kind() == kind
                && memory.len() as u64 >= staged
                && memory.address().is_multiple_of(ALIGN)
        };
        let found = staging.map(|memory| (memory.kind(), memory.len() as u64));
        let memory = staging.filter(fits);
        memory.map(Memory::address).ok_or(KernelError::Staging { staged, kind, found })
    }

    /// Whether the last start has come to its end; so it has where there was none.
    ///
    /// # Errors
    /// [`KernelError::Cuda`] when the driver or the work failed.
    pub fn poll(&mut self) -> Result<bool, KernelError> {
        match self.state {
            State::Idle => return Ok(true),
            State::Marked if !self.event.is_done()? => return Ok(false),
            State::Marked | State::Queued => self.wait()?,
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
        self.held.staging = None;
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
fn check(moves: &[Move], staged: u64, bounds: &[Extent]) -> Result<bool, KernelError> {
    let mut reads = false;
    for (index, one) in moves.iter().enumerate() {
        let pattern = one.check(index)?;
        if let Some((_, end)) = pattern.source {
            if end > staged {
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
