//! The memory of a GPU, and the bounce between it and the host.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use refit::DeviceLander;
use refit::pool::cuda::{self, CudaAllocator, Device, Driver, Stream};
use refit::pool::{AllocateError, Allocator, Memory, MemoryKind};

use super::{GpuInfo, Gpus};
use crate::error::CliError;

/// Copies to and from a GPU that are under way at a time: a few fill its bus, and more of them would each pin memory.
const COPIES: usize = 4;

/// A GPU that a rank keeps its memory on.
#[derive(Clone, Debug)]
pub(crate) struct Gpu {
    device: Device,
    gate: Arc<Gate>,
}

impl Gpu {
    pub(super) fn new(ordinal: u32) -> Result<Self, CliError> {
        let device = Device::primary(Driver::load()?, ordinal)?;
        Ok(Self { device, gate: Arc::new(Gate::new(COPIES)) })
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// What lands bytes in this memory.
    pub(crate) fn lander(&self) -> Result<DeviceLander, CliError> {
        Ok(DeviceLander::new(Arc::new(Stream::new(&self.device)?))?)
    }

    pub(super) fn kind(&self) -> MemoryKind {
        MemoryKind::Cuda(self.device.ordinal())
    }

    pub(super) fn allocate(&self, bytes: usize) -> Result<Memory, AllocateError> {
        CudaAllocator::new(self.device.clone()).allocate(bytes)
    }

    pub(super) fn set(&self, memory: &mut Memory, byte: u8) -> Result<(), CliError> {
        Ok(cuda::set(&self.device, memory, byte)?)
    }

    pub(super) fn upload(
        &self,
        memory: &mut Memory,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), CliError> {
        let _one_of_few = self.gate.enter();
        Ok(cuda::upload(&self.device, memory, offset, bytes)?)
    }

    pub(super) fn download(
        &self,
        memory: &Memory,
        offset: usize,
        bytes: &mut [u8],
    ) -> Result<(), CliError> {
        let _one_of_few = self.gate.enter();
        Ok(cuda::download(&self.device, memory, offset, bytes)?)
    }

    pub(super) fn copy_half(&self, memory: &mut Memory) -> Result<Duration, CliError> {
        let half = memory.len() / 2;
        let started = Instant::now();
        cuda::copy_within(&self.device, memory, 0, half, half)?;
        Ok(started.elapsed())
    }
}

pub(super) fn count() -> Result<u32, CliError> {
    Ok(Driver::load()?.device_count()?)
}

pub(super) fn look(ordinals: &[u32]) -> Result<Gpus, CliError> {
    let driver = Driver::load()?;
    let look = |&ordinal: &u32| {
        // Its context goes at once: ranks have their own.
        let device = Device::primary(driver, ordinal)?;
        let (free_bytes, total_bytes) = device.memory()?;
        Ok(GpuInfo { ordinal, name: device.name().to_owned(), free_bytes, total_bytes })
    };
    let gpus = ordinals.iter().map(look).collect::<Result<_, CliError>>()?;
    Ok(Gpus { driver: driver.version(), gpus })
}

/// Lets a few in at a time.
#[derive(Debug)]
struct Gate {
    free: Mutex<usize>,
    left: Condvar,
}

impl Gate {
    fn new(places: usize) -> Self {
        Self { free: Mutex::new(places), left: Condvar::new() }
    }

    /// Waits for a place, which is held until the guard goes.
    fn enter(&self) -> Inside<'_> {
        // A count cannot be left half written: whoever panicked held no lock over more than an addition.
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.left.wait_while(free, |free| *free == 0);
        *waited.unwrap_or_else(PoisonError::into_inner) -= 1;
        Inside(self)
    }
}

struct Inside<'a>(&'a Gate);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn few_are_inside_at_a_time_and_all_get_in() {
        let (gate, inside, done) = (Gate::new(3), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let _place = gate.enter();
                        assert!(inside.fetch_add(1, Ordering::SeqCst) < 3);
                        std::thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        done.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(done.into_inner(), 400);
    }
}
