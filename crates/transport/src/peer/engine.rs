//! What queues work on the device: the caller's stream for the kernel, others beside it for the copy engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use refit_kernels::{Mover, Resident};
use refit_pool::cuda::{CudaError, Device, Event, Stream};

use super::driver::copy;
use crate::Cause;

/// Most tables of one launch.
const TABLES: usize = 64;

/// Most streams for copies: more than any device has engines.
const MOST_SIDES: usize = 32;

/// A contiguous copy for the copy engine, by addresses of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Copy {
    pub(super) from: u64,
    pub(super) into: u64,
    pub(super) len: usize,
}

/// Where an agent's work is queued.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) stream: Arc<Stream>,
    pub(super) mover: Arc<Mover>,
    /// Locked while work is queued, so that what belongs together stays together.
    lanes: Mutex<Lanes>,
    /// Events that nobody waits for any more.
    idle: Mutex<Vec<Event>>,
}

/// The streams beside the caller's.
#[derive(Debug)]
struct Lanes {
    /// Where the caller's stream was when they left it.
    forked: Event,
    sides: Vec<Lane>,
}

#[derive(Debug)]
struct Lane {
    stream: Stream,
    /// Its last copy.
    joined: Event,
    /// Bytes queued by the launch under way.
    bytes: u64,
}

/// Work that was queued together, and the mark behind all of it.
#[derive(Debug)]
pub(super) struct Flight {
    /// `None` once it was given back.
    event: Option<Event>,
    done: AtomicBool,
    engine: Arc<Engine>,
}

/// Work that could not be queued.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) cause: Cause,
    /// Whether some of it was, which nobody sees the end of then.
    pub(super) started: bool,
}

impl Engine {
    pub(super) fn new(
        stream: Arc<Stream>,
        mover: Arc<Mover>,
        copy_streams: usize,
    ) -> Result<Arc<Self>, Cause> {
        let device = stream.device();
        let lane = |_| {
            let (stream, joined) = (Stream::new(device)?, Event::new(device)?);
            Ok::<_, CudaError>(Lane { stream, joined, bytes: 0 })
        };
        let sides = (0..copy_streams.clamp(1, MOST_SIDES)).map(lane).collect::<Result<_, _>>()?;
        let lanes = Mutex::new(Lanes { forked: Event::new(device)?, sides });
        Ok(Arc::new(Self { stream, mover, lanes, idle: Mutex::default() }))
    }

    pub(super) fn device(&self) -> &Device {
        self.stream.device()
    }

    /// Queues tables for one launch of the kernel, and copies beside it. All of it starts behind what the caller's
    /// stream holds, and what the caller queues afterwards starts behind all of it.
    ///
    /// # Safety
    /// Until the flight is done or for ever, if it is not seen to be: everything that tables and copies read and write
    /// stays mapped, and nobody accesses what they write.
    pub(super) unsafe fn launch(
        self: &Arc<Self>,
        tables: &[&Resident],
        copies: &[&[Copy]],
    ) -> Result<Arc<Flight>, Fault> {
        let mut lanes = self.lanes.lock();
        let untouched = |error: CudaError| Fault { cause: error.into(), started: false };
        let _entered = self.device().enter().map_err(untouched)?;
        let event = match self.idle.lock().pop() {
            Some(event) => event,
            None => Event::new(self.device()).map_err(untouched)?,
        };
        let copying = copies.iter().any(|copies| !copies.is_empty());
        if copying {
            // Before the kernel: copies run beside it, not behind it.
            lanes.fork(&self.stream).map_err(untouched)?;
        }
        if !tables.is_empty() {
            // SAFETY: the caller's promise.
            unsafe { self.mover.launch(tables, &self.stream) }.map_err(|error| Fault {
                cause: Cause::Call { call: "the launch of the kernel", status: error.to_string() },
                // More tables than that take several launches, and nobody says how many there were.
                started: tables.len() > TABLES,
            })?;
        }
        for copies in copies {
            // SAFETY: the caller's promise; the device is current.
            if let Err(error) = unsafe { lanes.copy(copies) } {
                let started = !tables.is_empty() || lanes.sides.iter().any(|lane| lane.bytes > 0);
                return Err(Fault { cause: error.into(), started });
            }
        }
        let started = |error: CudaError| Fault { cause: error.into(), started: true };
        if copying {
            lanes.join(&self.stream).map_err(started)?;
        }
        event.record(&self.stream).map_err(started)?;
        let done = AtomicBool::new(false);
        Ok(Arc::new(Flight { event: Some(event), done, engine: Arc::clone(self) }))
    }
}

impl Lanes {
    /// Has the side streams wait for what the caller's stream holds.
    fn fork(&mut self, stream: &Stream) -> Result<(), CudaError> {
        self.forked.record(stream)?;
        for lane in &mut self.sides {
            lane.bytes = 0;
            lane.stream.wait_for(&self.forked)?;
        }
        Ok(())
    }

    /// Queues each copy where the least is queued.
    ///
    /// # Safety
    /// As [`Engine::launch`], and the device is current.
    unsafe fn copy(&mut self, copies: &[Copy]) -> Result<(), CudaError> {
        for &Copy { from, into, len } in copies {
            let Some(lane) = self.sides.iter_mut().min_by_key(|lane| lane.bytes) else {
                unreachable!("there is at least one lane");
            };
            // SAFETY: the caller's promise.
            unsafe { copy(from, into, len, &lane.stream) }?;
            lane.bytes += len as u64;
        }
        Ok(())
    }

    /// Has the caller's stream wait for the side streams.
    fn join(&self, stream: &Stream) -> Result<(), CudaError> {
        for lane in self.sides.iter().filter(|lane| lane.bytes > 0) {
            lane.joined.record(&lane.stream)?;
            stream.wait_for(&lane.joined)?;
        }
        Ok(())
    }
}

impl Flight {
    /// Whether all of it is done.
    pub(super) fn is_done(&self) -> Result<bool, CudaError> {
        if self.done.load(Ordering::Acquire) {
            return Ok(true);
        }
        let done = match &self.event {
            Some(event) => event.is_done()?,
            None => true,
        };
        if done {
            self.done.store(true, Ordering::Release);
        }
        Ok(done)
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        // An event that nothing is queued behind; others may still be recorded.
        if let Some(event) = self.event.take().filter(|_| *self.done.get_mut()) {
            self.engine.idle.lock().push(event);
        }
    }
}
