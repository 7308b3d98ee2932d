use std::ptr::{self, NonNull};
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::device::lost;
use super::{CudaError, Device};
use crate::{AllocateError, Allocator, Memory, MemoryKind};

/// Plain device memory (`cuMemAlloc`), not zeroed, freed when the last share goes.
///
/// Never of a stream-ordered pool, which is what most bindings take: neither a NIC nor another process can map that.
#[derive(Clone, Debug)]
pub struct CudaAllocator {
    device: Device,
}

impl CudaAllocator {
    /// An allocator of this device's memory.
    #[must_use]
    pub fn new(device: Device) -> Self {
        Self { device }
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    fn block(&self, bytes: usize) -> Result<(NonNull<u8>, Block), CudaError> {
        let _entered = self.device.enter()?;
        // SAFETY: the context is current; what the memory holds is nobody's business before it is written.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(CudaError::of("cuMemAlloc"))?;
        let block = Block { address, device: self.device.clone() };
        let start = usize::try_from(address).ok();
        let start = start.and_then(|start| NonNull::new(ptr::with_exposed_provenance_mut(start)));
        let nowhere = CudaError::HostPointer { device: self.device.ordinal() };
        Ok((start.ok_or(nowhere)?, block))
    }
}

impl Allocator for CudaAllocator {
    fn kind(&self) -> MemoryKind {
        self.device.kind()
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, AllocateError> {
        if bytes == 0 {
            return Ok(Memory::empty(self.kind()));
        }
        let failed = |error| AllocateError::new(self.kind(), bytes as u64, error);
        let (start, block) = self.block(bytes).map_err(failed)?;
        // SAFETY: the block has so many bytes of the device, nobody else knows it, and it stays until `block`, which
        // the memory owns, is dropped.
        Ok(unsafe { Memory::adopt(start, bytes, self.kind(), Arc::new(block)) })
    }
}

/// A block of device memory that is ours.
struct Block {
    address: sys::CUdeviceptr,
    device: Device,
}

impl Drop for Block {
    fn drop(&mut self) {
        let Some(_entered) = self.device.enter_to_free() else { return };
        // SAFETY: allocated by us and freed once. `Memory` handed out no access that outlives its owner, and the call
        // waits for work of this process that still uses it.
        if let Err(error) = unsafe { result::free_sync(self.address) } {
            lost("cuMemFree", error);
        }
    }
}
