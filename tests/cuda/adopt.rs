//! Memory that others allocated: what is taken, and what is refused by name.

use std::sync::Arc;

use cudarc::driver::{result, sys};
use refit_pool::cuda::{CudaAllocator, CudaError, Device, adopt, download, set, upload};
use refit_pool::{Allocator, Key, Memory, MemoryKind, Pool, PoolError, PoolOptions};

use crate::gpu::{Gpus, current, pattern};
use crate::pool::Recorder;

/// Adopts, and holds on to an owner that says when it goes.
fn take(device: &Device, address: u64, len: usize) -> Result<Memory, CudaError> {
    // SAFETY: the tests keep what they adopt, use it through one value at a time, and look at nothing beyond.
    unsafe { adopt(device, address, len, Arc::new(())) }
}

#[test]
fn parts_of_one_block_are_taken_with_all_of_it() {
    let Some(gpus) = Gpus::get("parts_of_one_block_are_taken_with_all_of_it", 1) else { return };
    let device = &gpus[0];
    let mut block = CudaAllocator::new(device.clone()).allocate(8 << 20).unwrap();
    set(device, &mut block, 0xC5).unwrap();
    let start = block.address();
    let mut parts = [(0, 1), (4096, 512), (1 << 20, 3 << 20), ((8 << 20) - 7, 7)]
        .map(|(offset, len)| take(device, start + offset, len).unwrap());
    for part in &parts {
        let allocation = part.allocation();
        assert_eq!((allocation.address(), allocation.kind()), (start, device.kind()));
        // The driver may round a block up.
        assert!((8 << 20..16 << 20).contains(&allocation.len()), "{}", allocation.len());
    }
    let sent = pattern(1, 3 << 20);
    upload(device, &mut parts[2], 0, &sent).unwrap();
    let mut found = vec![0; 8 << 20];
    download(device, &block, 0, &mut found).unwrap();
    assert!(found[1 << 20..4 << 20] == sent && found[(1 << 20) - 1] == 0xC5);

    // One registration for all of them, and for what is adopted by the same entry later.
    let pool = Pool::new(CudaAllocator::new(device.clone()), Recorder, PoolOptions::default());
    let lease = pool.lease(Key::from([1; 32]), |build| {
        build.register(parts.iter().map(Memory::allocation))?;
        build.register([parts[0].allocation()])?;
        Ok::<_, PoolError>(())
    });
    drop(lease.unwrap());
    assert_eq!(pool.stats().registrations, 1);
}

#[test]
fn memory_of_the_stream_ordered_pool_is_refused() {
    let Some(gpus) = Gpus::get("memory_of_the_stream_ordered_pool_is_refused", 1) else { return };
    let device = &gpus[0];
    let entered = device.enter().unwrap();
    let stream = std::ptr::null_mut();
    // SAFETY: the device is current; the memory is never looked at.
    let address = unsafe { result::malloc_async(stream, 1 << 20) }.unwrap();
    device.synchronize().unwrap();
    let refused = take(device, address, 1 << 20).unwrap_err();
    // SAFETY: allocated above, freed once.
    unsafe { result::free_async(address, stream) }.unwrap();
    drop(entered);
    device.synchronize().unwrap();
    assert_eq!(refused, CudaError::PoolMemory { device: 0 });
    assert!(refused.to_string().contains("cudaMallocAsync"), "{refused}");
}

/// What torch's expandable segments are made of.
#[test]
fn memory_mapped_piece_by_piece_is_refused() {
    let Some(gpus) = Gpus::get("memory_mapped_piece_by_piece_is_refused", 1) else { return };
    let device = &gpus[0];
    let entered = device.enter().unwrap();
    let mapped = Mapped::new(device);
    let refused = take(device, mapped.address, 4096).unwrap_err();
    drop((mapped, entered));
    assert_eq!(refused, CudaError::ExpandableSegments { device: 0 });
    assert!(refused.to_string().contains("expandable_segments"), "{refused}");
}

#[test]
fn managed_memory_is_refused() {
    let Some(gpus) = Gpus::get("managed_memory_is_refused", 1) else { return };
    let device = &gpus[0];
    let entered = device.enter().unwrap();
    let flags = sys::CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL;
    // SAFETY: the device is current; the memory is never looked at.
    let address = unsafe { result::malloc_managed(1 << 20, flags) }.unwrap();
    let refused = take(device, address, 4096).unwrap_err();
    // SAFETY: allocated above, freed once.
    unsafe { result::memory_free(address) }.unwrap();
    drop(entered);
    assert_eq!(refused, CudaError::Managed);
}

#[test]
fn addresses_of_the_host_are_refused() {
    let Some(gpus) = Gpus::get("addresses_of_the_host_are_refused", 1) else { return };
    let device = &gpus[0];
    let refused = CudaError::HostPointer { device: 0 };
    let plain = [0_u8; 4096];
    for address in [plain.as_ptr().addr() as u64, 1, 0x1000, u64::MAX - 4096] {
        assert_eq!(take(device, address, 16).unwrap_err(), refused, "{address:#x}");
    }
    let entered = device.enter().unwrap();
    // SAFETY: the device is current; the memory is never looked at.
    let pinned = unsafe { result::malloc_host(4096, sys::CU_MEMHOSTALLOC_PORTABLE) }.unwrap();
    let answer = take(device, pinned.addr() as u64, 16);
    // SAFETY: allocated above, freed once.
    unsafe { result::free_host(pinned) }.unwrap();
    drop(entered);
    assert_eq!(answer.unwrap_err(), refused);
    // Nothing at all may lie anywhere.
    assert!(take(device, 0, 0).unwrap().is_empty());
}

#[test]
fn memory_of_another_device_is_refused() {
    let Some(gpus) = Gpus::get("memory_of_another_device_is_refused", 2) else { return };
    let memory = CudaAllocator::new(gpus[1].clone()).allocate(4096).unwrap();
    let refused = take(&gpus[0], memory.address(), 4096).unwrap_err();
    assert_eq!(refused, CudaError::WrongDevice { found: MemoryKind::Cuda(1), device: 0 });
    take(&gpus[1], memory.address(), 4096).unwrap();
}

#[test]
fn what_leaves_its_block_is_refused() {
    let Some(gpus) = Gpus::get("what_leaves_its_block_is_refused", 1) else { return };
    let device = &gpus[0];
    // Of several granules, so that there is a known end even where the driver rounds up.
    let memory = CudaAllocator::new(device.clone()).allocate(4 << 20).unwrap();
    let whole = take(device, memory.address(), 4 << 20).unwrap().allocation().len();
    let whole = usize::try_from(whole).unwrap();
    for (offset, len) in [(0, whole + 1), (1, whole), (8, usize::MAX)] {
        let refused = take(device, memory.address() + offset, len).unwrap_err();
        assert!(matches!(refused, CudaError::OutOfRange { .. }), "{refused}");
    }
}

/// Memory that is reserved, created and mapped by hand. The bindings' structures differ between releases of CUDA; what
/// the driver reads does not.
struct Mapped {
    address: u64,
    size: usize,
    handle: u64,
}

#[repr(C, align(8))]
struct Properties {
    kind: u32,
    handle_types: u32,
    location_kind: u32,
    location: u32,
    rest: [u64; 2],
}

#[repr(C)]
struct Access {
    location_kind: u32,
    location: u32,
    flags: u32,
}

impl Mapped {
    /// 2 MiB of the device, which is current.
    fn new(device: &Device) -> Self {
        assert_eq!(current().unwrap().cast(), device.context());
        let size = 2 << 20;
        let location = device.ordinal();
        let properties =
            Properties { kind: 1, handle_types: 0, location_kind: 1, location, rest: [0; 2] };
        let access = Access { location_kind: 1, location, flags: 3 };
        let (mut handle, mut address) = (0, 0);
        // SAFETY: pinned memory of the device, in the layout that the driver reads.
        unsafe { sys::cuMemCreate(&raw mut handle, size, (&raw const properties).cast(), 0) }
            .result()
            .unwrap();
        // SAFETY: the driver picks addresses that nobody uses.
        unsafe { sys::cuMemAddressReserve(&raw mut address, size, 0, 0, 0) }.result().unwrap();
        // SAFETY: both were made above, of this size.
        unsafe { sys::cuMemMap(address, size, 0, handle, 0) }.result().unwrap();
        // SAFETY: mapped above; one description follows, in the layout that the driver reads.
        unsafe { sys::cuMemSetAccess(address, size, (&raw const access).cast(), 1) }
            .result()
            .unwrap();
        Self { address, size, handle }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and looked at by nobody.
        unsafe { sys::cuMemUnmap(self.address, self.size) }.result().unwrap();
        // SAFETY: reserved by `new`.
        unsafe { sys::cuMemAddressFree(self.address, self.size) }.result().unwrap();
        // SAFETY: created by `new`.
        unsafe { sys::cuMemRelease(self.handle) }.result().unwrap();
    }
}
