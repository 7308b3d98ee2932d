//! Memory that others allocated on a device, torch as a rule.

use std::any::Any;
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use cudarc::driver::sys::{self, CUpointer_attribute as Attribute};

use super::{CudaError, Device};
use crate::{Memory, MemoryKind};

/// Adopts device memory, such as a parameter of torch's. The whole block of `cudaMalloc` it lies in is its
/// [`allocation`](Memory::allocation), which is what gets registered: a thousand parameters in a block of torch's
/// allocator are one registration.
///
/// No bytes at all may have any address.
///
/// # Errors
/// Memory that cannot be registered or mapped by peers is refused, by an error that says how to get other memory:
/// [`CudaError::ExpandableSegments`], [`CudaError::PoolMemory`], [`CudaError::Managed`]. So is what is not where it is
/// said to be: [`CudaError::HostPointer`], [`CudaError::WrongDevice`], [`CudaError::OutOfRange`].
///
/// # Safety
/// - The memory, and the block it lies in, stay allocated as long as `owner` lives. (torch keeps a block while one
///   tensor in it lives.)
/// - While the returned value exists, nobody reads or writes its bytes except through it, through a transfer that it
///   was lent to, or at times when its holder is known not to use it (an engine that is running).
/// - No other `Memory` covers any of those bytes.
pub unsafe fn adopt(
    device: &Device,
    address: u64,
    len: usize,
    owner: Arc<dyn Any + Send + Sync>,
) -> Result<Memory, CudaError> {
    if len == 0 {
        return Ok(Memory::empty(device.kind()));
    }
    let attributes = Attributes::of(device, address)?;
    let allocation = classify(&attributes, device.ordinal(), address, len as u64)?;
    let start = usize::try_from(address).ok();
    let start = start.and_then(|start| NonNull::new(ptr::with_exposed_provenance_mut(start)));
    let Some(start) = start else {
        return Err(CudaError::HostPointer { device: device.ordinal() });
    };
    // SAFETY: the caller's promise; `classify` found that the block includes the part.
    Ok(unsafe { Memory::adopt_within(start, len, device.kind(), allocation, owner) })
}

/// What the driver knows about an address. All zero if nothing.
#[derive(Clone, Copy, Debug, Default)]
struct Attributes {
    /// A `CUmemorytype`; 0 for memory that CUDA does not know.
    memory: u64,
    ordinal: u64,
    managed: bool,
    /// Whether it comes from a stream-ordered pool.
    pooled: bool,
    /// Whether another process can map it by `cuIpcGetMemHandle`: what was mapped piece by piece never can.
    legacy_ipc: bool,
    start: u64,
    size: u64,
}

/// The block that `len` bytes from `address` on lie in, if peers can read it.
fn classify(
    attributes: &Attributes,
    device: u32,
    address: u64,
    len: u64,
) -> Result<Range<u64>, CudaError> {
    if attributes.memory != sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u64 {
        // Managed memory may be reported as unified, which is a better name for what is wrong with it.
        return Err(if attributes.managed {
            CudaError::Managed
        } else {
            CudaError::HostPointer { device }
        });
    }
    if attributes.managed {
        return Err(CudaError::Managed);
    }
    if attributes.ordinal != u64::from(device) {
        let found = u32::try_from(attributes.ordinal).unwrap_or(u32::MAX);
        return Err(CudaError::WrongDevice { found: MemoryKind::Cuda(found), device });
    }
    // Before the next one: pooled memory cannot be mapped by that call either, and deserves its own advice.
    if attributes.pooled {
        return Err(CudaError::PoolMemory { device });
    }
    if !attributes.legacy_ipc {
        return Err(CudaError::ExpandableSegments { device });
    }
    let end = attributes.start.checked_add(attributes.size);
    let inside = end.filter(|&end| {
        attributes.start <= address && address.checked_add(len).is_some_and(|last| last <= end)
    });
    match inside {
        Some(end) => Ok(attributes.start..end),
        None => Err(CudaError::OutOfRange {
            offset: address.saturating_sub(attributes.start),
            len,
            available: attributes.size,
        }),
    }
}

impl Attributes {
    fn of(device: &Device, address: u64) -> Result<Self, CudaError> {
        let _entered = device.enter()?;
        // The driver writes integers and booleans of up to 8 bytes, of which the first count: both of our targets
        // keep the low end there, and what is not written is zero.
        const { assert!(cfg!(target_endian = "little")) };
        let mut values = [0u64; 7];
        let mut attributes = [
            Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
            Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
            Attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED,
            Attribute::CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE,
            Attribute::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE,
            Attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
            Attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE,
        ];
        let mut data = values.each_mut().map(|value| ptr::from_mut(value).cast::<c_void>());
        // SAFETY: as many places as attributes, each of 8 bytes, more than any of them takes. The address is looked
        // up and not read; of one that the driver does not know it answers zeros.
        unsafe {
            sys::cuPointerGetAttributes(7, attributes.as_mut_ptr(), data.as_mut_ptr(), address)
        }
        .result()
        .map_err(CudaError::of("cuPointerGetAttributes"))?;
        let [memory, ordinal, managed, pool, legacy_ipc, start, size] = values;
        Ok(Self {
            memory,
            ordinal,
            managed: managed != 0,
            pooled: pool != 0,
            legacy_ipc: legacy_ipc != 0,
            start,
            size,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: u64 = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u64;
    const HOST: u64 = sys::CUmemorytype::CU_MEMORYTYPE_HOST as u64;
    const UNIFIED: u64 = sys::CUmemorytype::CU_MEMORYTYPE_UNIFIED as u64;

    /// What `cudaMalloc` gives on device 1.
    const PLAIN: Attributes = Attributes {
        memory: DEVICE,
        ordinal: 1,
        managed: false,
        pooled: false,
        legacy_ipc: true,
        start: 0x1000,
        size: 0x800,
    };

    fn of(attributes: Attributes) -> Result<Range<u64>, CudaError> {
        classify(&attributes, 1, 0x1200, 0x100)
    }

    #[test]
    fn plain_memory_is_taken_with_its_whole_block() {
        assert_eq!(of(PLAIN), Ok(0x1000..0x1800));
        assert_eq!(classify(&PLAIN, 1, 0x1000, 0x800), Ok(0x1000..0x1800));
        assert_eq!(classify(&PLAIN, 1, 0x17ff, 1), Ok(0x1000..0x1800));
    }

    #[test]
    fn what_peers_cannot_map_is_refused_by_name() {
        let mapped = Attributes { legacy_ipc: false, ..PLAIN };
        assert_eq!(of(mapped), Err(CudaError::ExpandableSegments { device: 1 }));
        // Pooled memory cannot be mapped either, and is called what it is.
        for legacy_ipc in [false, true] {
            let pooled = Attributes { pooled: true, legacy_ipc, ..PLAIN };
            assert_eq!(of(pooled), Err(CudaError::PoolMemory { device: 1 }));
        }
        for memory in [DEVICE, UNIFIED, HOST] {
            let managed = Attributes { memory, managed: true, legacy_ipc: false, ..PLAIN };
            assert_eq!(of(managed), Err(CudaError::Managed));
        }
    }

    #[test]
    fn memory_elsewhere_is_refused() {
        let host = CudaError::HostPointer { device: 1 };
        assert_eq!(of(Attributes::default()), Err(host.clone()), "nobody's memory");
        assert_eq!(of(Attributes { memory: HOST, ..PLAIN }), Err(host.clone()), "pinned memory");
        assert_eq!(of(Attributes { memory: 99, ..PLAIN }), Err(host));
        for (ordinal, found) in [(0, 0), (2, 2), (u64::MAX, u32::MAX)] {
            let found = MemoryKind::Cuda(found);
            assert_eq!(
                of(Attributes { ordinal, ..PLAIN }),
                Err(CudaError::WrongDevice { found, device: 1 })
            );
        }
    }

    #[test]
    fn ranges_that_leave_their_block_are_refused_and_nothing_wraps() {
        for (address, len) in
            [(0x1000, 0x801), (0xfff, 2), (0x1800, 1), (0x1200, u64::MAX), (u64::MAX, 2)]
        {
            let refused = classify(&PLAIN, 1, address, len);
            assert!(matches!(refused, Err(CudaError::OutOfRange { .. })), "{address:x} + {len:x}");
        }
        let endless = Attributes { size: u64::MAX, ..PLAIN };
        assert!(matches!(of(endless), Err(CudaError::OutOfRange { .. })));
        let none = Attributes { start: 0, size: 0, ..PLAIN };
        assert!(matches!(of(none), Err(CudaError::OutOfRange { .. })));
    }
}
