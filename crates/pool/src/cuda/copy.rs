//! Bytes between host memory and a device, through pinned buffers.
//!
//! The device copies from and into pinned memory only. Two buffers alternate, so that the processor fills or empties
//! one while the device works on the other.

use std::ptr::{self, NonNull};

use cudarc::driver::{result, sys};
use parking_lot::Mutex;

use super::device::lost;
use super::{CudaError, Device};
use crate::Memory;

/// Copies `bytes` into device memory, `offset` bytes from its start on. They are there when this returns.
///
/// Work on other streams is not waited for; see the [module](super).
///
/// # Errors
/// [`CudaError::WrongDevice`] when the memory is not the device's, [`CudaError::OutOfRange`] when it is too small,
/// [`CudaError::Call`] when the driver fails; some of the bytes may have been written then.
pub fn upload(
    device: &Device,
    memory: &mut Memory,
    offset: usize,
    bytes: &[u8],
) -> Result<(), CudaError> {
    let address = span(device, memory, offset, bytes.len())?;
    if bytes.is_empty() {
        return Ok(());
    }
    with_lane(device, |lane| {
        let mut at = address;
        for (index, chunk) in bytes.chunks(CHUNK).enumerate() {
            let side = lane.side(index);
            if index >= 2 {
                side.wait()?;
            }
            // SAFETY: the buffer has `CHUNK` bytes, and the device is done with those of two chunks ago.
            unsafe { ptr::copy_nonoverlapping(chunk.as_ptr(), side.buffer.as_ptr(), chunk.len()) };
            let from = side.buffer.as_ptr().cast_const().cast();
            // SAFETY: the memory has the bytes, and `&mut` says that nobody else uses them; the buffer is not written
            // before the event behind this copy has come.
            unsafe { sys::cuMemcpyHtoDAsync_v2(at, from, chunk.len(), lane.stream) }
                .result()
                .map_err(CudaError::of("cuMemcpyHtoDAsync"))?;
            side.record(lane.stream)?;
            at += chunk.len() as u64;
        }
        lane.synchronize()
    })
}

/// Copies device memory into `bytes`, from `offset` bytes behind its start on.
///
/// Work on other streams is not waited for; see the [module](super).
///
/// # Errors
/// As [`upload`]; some of `bytes` may have been written then.
pub fn download(
    device: &Device,
    memory: &Memory,
    offset: usize,
    bytes: &mut [u8],
) -> Result<(), CudaError> {
    let address = span(device, memory, offset, bytes.len())?;
    if bytes.is_empty() {
        return Ok(());
    }
    with_lane(device, |lane| {
        let total = bytes.len();
        let ask = |index: usize| {
            // Beyond the end there is nothing to ask for.
            let Some(from) = index.checked_mul(CHUNK).filter(|&from| from < total) else {
                return Ok(());
            };
            let (side, len) = (lane.side(index), CHUNK.min(total - from));
            // SAFETY: the memory has the bytes; the buffer has `CHUNK`, and is not read before the event behind this
            // copy has come.
            unsafe {
                sys::cuMemcpyDtoHAsync_v2(
                    side.buffer.as_ptr().cast(),
                    address + from as u64,
                    len,
                    lane.stream,
                )
            }
            .result()
            .map_err(CudaError::of("cuMemcpyDtoHAsync"))?;
            side.record(lane.stream)
        };
        ask(0)?;
        ask(1)?;
        for (index, chunk) in bytes.chunks_mut(CHUNK).enumerate() {
            let side = lane.side(index);
            side.wait()?;
            // SAFETY: the copy of this chunk has come, and the next one into this buffer is asked for below.
            unsafe {
                ptr::copy_nonoverlapping(side.buffer.as_ptr(), chunk.as_mut_ptr(), chunk.len());
            }
            ask(index + 2)?;
        }
        lane.synchronize()
    })
}

/// Copies `len` bytes of device memory to another place in it, by the device itself.
///
/// Work on other streams is not waited for; see the [module](super).
///
/// # Errors
/// As [`upload`]; [`CudaError::Overlap`] when the two places share a byte.
pub fn copy_within(
    device: &Device,
    memory: &mut Memory,
    from: usize,
    into: usize,
    len: usize,
) -> Result<(), CudaError> {
    let (source, target) = (span(device, memory, from, len)?, span(device, memory, into, len)?);
    if from.abs_diff(into) < len {
        let [from, into, len] = [from, into, len].map(|value| value as u64);
        return Err(CudaError::Overlap { from, into, len });
    }
    if len == 0 {
        return Ok(());
    }
    with_lane(device, |lane| {
        // SAFETY: the memory has the bytes of both places, and `&mut` says that nobody else uses them.
        unsafe { sys::cuMemcpyDtoDAsync_v2(target, source, len, lane.stream) }
            .result()
            .map_err(CudaError::of("cuMemcpyDtoDAsync"))?;
        lane.synchronize()
    })
}

/// Copies whole memories of a device to others of the same sizes, by the device itself, all of them behind each other.
///
/// Work on other streams is not waited for; see the [module](super).
///
/// # Errors
/// As [`upload`]; [`CudaError::OutOfRange`] when two that belong together differ in size, before anything is copied.
pub fn copy_all<'a>(
    device: &Device,
    pairs: impl IntoIterator<Item = (&'a Memory, &'a mut Memory)>,
) -> Result<(), CudaError> {
    let mut copies = Vec::new();
    // Kept until the copies are done, as what they borrow is.
    let pairs: Vec<_> = pairs.into_iter().collect();
    for (from, into) in &pairs {
        let len = from.len();
        let copy = (span(device, from, 0, into.len())?, span(device, into, 0, len)?, len);
        if len > 0 {
            copies.push(copy);
        }
    }
    if copies.is_empty() {
        return Ok(());
    }
    with_lane(device, |lane| {
        for (source, target, len) in copies {
            // SAFETY: both memories have the bytes, `&mut` says that nobody else uses those written and `&` that nobody
            // writes those read, until `pairs` is dropped, which is behind the wait below or the one of `with_lane`.
            unsafe { sys::cuMemcpyDtoDAsync_v2(target, source, len, lane.stream) }
                .result()
                .map_err(CudaError::of("cuMemcpyDtoDAsync"))?;
        }
        lane.synchronize()
    })
}

/// Sets every byte of device memory.
///
/// Work on other streams is not waited for; see the [module](super).
///
/// # Errors
/// As [`upload`].
pub fn set(device: &Device, memory: &mut Memory, byte: u8) -> Result<(), CudaError> {
    let address = span(device, memory, 0, memory.len())?;
    if memory.is_empty() {
        return Ok(());
    }
    with_lane(device, |lane| {
        // SAFETY: the memory has the bytes, and `&mut` says that nobody else uses them.
        unsafe { result::memset_d8_async(address, byte, memory.len(), lane.stream) }
            .map_err(CudaError::of("cuMemsetD8Async"))?;
        lane.synchronize()
    })
}

/// The address of a part of the device's memory.
fn span(device: &Device, memory: &Memory, offset: usize, len: usize) -> Result<u64, CudaError> {
    if memory.kind() != device.kind() {
        return Err(CudaError::WrongDevice { found: memory.kind(), device: device.ordinal() });
    }
    within(offset, len, memory.len())?;
    // Inside the memory, so inside the address space.
    Ok(memory.address().saturating_add(offset as u64))
}

fn within(offset: usize, len: usize, available: usize) -> Result<(), CudaError> {
    if offset.checked_add(len).is_some_and(|end| end <= available) {
        return Ok(());
    }
    let [offset, len, available] = [offset, len, available].map(|value| value as u64);
    Err(CudaError::OutOfRange { offset, len, available })
}

/// Bytes of a pinned buffer: the device's engines reach their rate well below.
const CHUNK: usize = 4 << 20;

/// Lanes a device keeps; more than this many threads that copy at once make their own and free them.
const KEPT: usize = 4;

/// The lanes of a device that nobody uses.
#[derive(Default)]
pub(super) struct Lanes(Mutex<Vec<Lane>>);

impl Lanes {
    /// Frees them, with the device current.
    pub(super) fn free(&self) {
        for lane in std::mem::take(&mut *self.0.lock()) {
            lane.free();
        }
    }
}

/// A stream and two pinned buffers. Holds no [`Device`], which holds it: freed by hand.
struct Lane {
    stream: sys::CUstream,
    sides: [Side; 2],
}

/// A pinned buffer of [`CHUNK`] bytes, and the event behind the last copy from or into it.
#[derive(Clone, Copy)]
struct Side {
    buffer: NonNull<u8>,
    event: sys::CUevent,
}

// SAFETY: handles and memory that any thread may use.
unsafe impl Send for Lane {}

/// Lends a lane to `work` with the device current. Whatever `work` started has ended when this returns.
fn with_lane<R>(
    device: &Device,
    work: impl FnOnce(&Lane) -> Result<R, CudaError>,
) -> Result<R, CudaError> {
    let _entered = device.enter()?;
    let kept = device.lanes().0.lock().pop();
    let lane = match kept {
        Some(lane) => lane,
        None => Lane::new()?,
    };
    let result = work(&lane);
    if result.is_err() {
        // The copies before the failed one may be under way. If even that fails the context is lost, and nothing is.
        if let Err(error) = lane.synchronize() {
            tracing::debug!(%error, "after a failed copy");
        }
        lane.free();
        return result;
    }
    let mut kept = device.lanes().0.lock();
    if kept.len() < KEPT {
        kept.push(lane);
    } else {
        drop(kept);
        lane.free();
    }
    result
}

impl Lane {
    /// Of the current device.
    fn new() -> Result<Self, CudaError> {
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(CudaError::of("cuStreamCreate"))?;
        let sides = Side::new().and_then(|first| match Side::new() {
            Ok(second) => Ok([first, second]),
            Err(error) => {
                first.free();
                Err(error)
            }
        });
        match sides {
            Ok(sides) => Ok(Self { stream, sides }),
            Err(error) => {
                destroy(stream);
                Err(error)
            }
        }
    }

    fn side(&self, index: usize) -> Side {
        self.sides[index % 2]
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the stream is valid.
        unsafe { result::stream::synchronize(self.stream) }
            .map_err(CudaError::of("cuStreamSynchronize"))
    }

    /// Nothing of it is in use; the device is current.
    fn free(self) {
        destroy(self.stream);
        for side in self.sides {
            side.free();
        }
    }
}

impl Side {
    fn new() -> Result<Self, CudaError> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map_err(CudaError::of("cuEventCreate"))?;
        // Not write-combined: the processor reads what was downloaded.
        // SAFETY: a context is current; nothing is read before it is written.
        let buffer = unsafe { result::malloc_host(CHUNK, sys::CU_MEMHOSTALLOC_PORTABLE) };
        let buffer = buffer.map_err(CudaError::of("cuMemHostAlloc")).and_then(|buffer| {
            let none = CudaError::call("cuMemHostAlloc", sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY);
            NonNull::new(buffer.cast()).ok_or(none)
        });
        match buffer {
            Ok(buffer) => Ok(Self { buffer, event }),
            Err(error) => {
                // SAFETY: made above and used by nobody.
                if let Err(error) = unsafe { result::event::destroy(event) } {
                    lost("cuEventDestroy", error);
                }
                Err(error)
            }
        }
    }

    fn record(self, stream: sys::CUstream) -> Result<(), CudaError> {
        // SAFETY: both are valid, and of the device that is current.
        unsafe { result::event::record(self.event, stream) }.map_err(CudaError::of("cuEventRecord"))
    }

    fn wait(self) -> Result<(), CudaError> {
        // SAFETY: the event is valid.
        unsafe { result::event::synchronize(self.event) }
            .map_err(CudaError::of("cuEventSynchronize"))
    }

    fn free(self) {
        // SAFETY: made by `new`, freed once, and nothing copies from or into it any more.
        if let Err(error) = unsafe { result::free_host(self.buffer.as_ptr().cast()) } {
            lost("cuMemFreeHost", error);
        }
        // SAFETY: made by `new`, destroyed once.
        if let Err(error) = unsafe { result::event::destroy(self.event) } {
            lost("cuEventDestroy", error);
        }
    }
}

fn destroy(stream: sys::CUstream) {
    // SAFETY: made by `Lane::new`, destroyed once.
    if let Err(error) = unsafe { result::stream::destroy(stream) } {
        lost("cuStreamDestroy", error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_stay_inside_and_nothing_wraps() {
        for (offset, len) in [(0, 0), (0, 100), (100, 0), (99, 1)] {
            assert_eq!(within(offset, len, 100), Ok(()));
        }
        for (offset, len) in [(0, 101), (100, 1), (101, 0), (usize::MAX, 1), (1, usize::MAX)] {
            let refused = within(offset, len, 100).unwrap_err();
            let [offset, len] = [offset, len].map(|value| value as u64);
            assert_eq!(refused, CudaError::OutOfRange { offset, len, available: 100 });
        }
    }
}
