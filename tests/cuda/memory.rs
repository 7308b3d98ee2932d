//! Allocating, and bytes there and back.

use refit_pool::cuda::{CudaAllocator, CudaError, download, set, upload};
use refit_pool::{Allocator, HostAllocator, MemoryKind};

use crate::gpu::{Gpus, pattern};

/// The size of the buffers in between, around which copies may go wrong.
const CHUNK: usize = 4 << 20;

#[test]
fn bytes_come_back_whatever_their_number() {
    let Some(gpus) = Gpus::get("bytes_come_back_whatever_their_number", 1) else { return };
    for device in gpus.iter() {
        let allocator = CudaAllocator::new(device.clone());
        for bytes in [
            0,
            1,
            3,
            511,
            4097,
            CHUNK - 1,
            CHUNK,
            CHUNK + 1,
            2 * CHUNK,
            3 * CHUNK + 5,
            9 * CHUNK - 1,
        ] {
            let mut memory = allocator.allocate(bytes).unwrap();
            assert_eq!((memory.len(), memory.kind()), (bytes, device.kind()));
            assert!(memory.host_bytes().is_none() && memory.host_bytes_mut().is_none());
            let sent = pattern(bytes as u64, bytes);
            upload(device, &mut memory, 0, &sent).unwrap();
            let mut found = vec![0xEE; bytes];
            download(device, &memory, 0, &mut found).unwrap();
            assert!(found == sent, "{bytes} bytes");
        }
    }
}

#[test]
fn parts_are_written_and_nothing_beside_them() {
    let Some(gpus) = Gpus::get("parts_are_written_and_nothing_beside_them", 1) else { return };
    let device = &gpus[0];
    let bytes = 3 * CHUNK;
    let mut memory = CudaAllocator::new(device.clone()).allocate(bytes).unwrap();
    for (offset, len) in
        [(0, 1), (1, 1), (7, 513), (bytes - 1, 1), (CHUNK - 3, CHUNK + 7), (13, 2 * CHUNK), (99, 0)]
    {
        set(device, &mut memory, 0xC5).unwrap();
        let sent = pattern(offset as u64, len);
        upload(device, &mut memory, offset, &sent).unwrap();
        let mut found = vec![0; bytes];
        download(device, &memory, 0, &mut found).unwrap();
        assert!(found[offset..offset + len] == sent, "{len} bytes from {offset}");
        let beside = found[..offset].iter().chain(&found[offset + len..]);
        assert!(beside.into_iter().all(|&byte| byte == 0xC5), "beside {len} bytes from {offset}");
        let mut part = vec![0; len];
        download(device, &memory, offset, &mut part).unwrap();
        assert!(part == sent);
    }
}

#[test]
fn what_leaves_the_memory_is_refused() {
    let Some(gpus) = Gpus::get("what_leaves_the_memory_is_refused", 1) else { return };
    let device = &gpus[0];
    let mut memory = CudaAllocator::new(device.clone()).allocate(100).unwrap();
    set(device, &mut memory, 0xC5).unwrap();
    for (offset, len) in [(0, 101), (100, 1), (101, 0), (usize::MAX, 1), (1, 100)] {
        let mut bytes = vec![0; len];
        let refused =
            CudaError::OutOfRange { offset: offset as u64, len: len as u64, available: 100 };
        assert_eq!(upload(device, &mut memory, offset, &bytes), Err(refused.clone()));
        assert_eq!(download(device, &memory, offset, &mut bytes), Err(refused));
    }
    let mut found = [0; 100];
    download(device, &memory, 0, &mut found).unwrap();
    assert_eq!(found, [0xC5; 100]);
}

#[test]
fn memory_of_others_is_refused() {
    let Some(gpus) = Gpus::get("memory_of_others_is_refused", 1) else { return };
    let device = &gpus[0];
    let mut host = HostAllocator.allocate(100).unwrap();
    let refused = Err(CudaError::WrongDevice { found: MemoryKind::Host, device: 0 });
    assert_eq!(upload(device, &mut host, 0, &[1]), refused);
    assert_eq!(download(device, &host, 0, &mut [1]), refused);
    assert_eq!(set(device, &mut host, 1), refused);
    if let [first, second, ..] = &*gpus {
        let mut memory = CudaAllocator::new(second.clone()).allocate(100).unwrap();
        let refused = Err(CudaError::WrongDevice { found: MemoryKind::Cuda(1), device: 0 });
        assert_eq!(upload(first, &mut memory, 0, &[1]), refused);
    }
}

#[test]
fn memory_that_no_device_has_is_an_error() {
    let Some(gpus) = Gpus::get("memory_that_no_device_has_is_an_error", 1) else { return };
    let allocator = CudaAllocator::new(gpus[0].clone());
    for bytes in [1 << 50, isize::MAX.unsigned_abs(), usize::MAX] {
        let error = allocator.allocate(bytes).unwrap_err();
        assert_eq!((error.bytes(), error.kind()), (bytes as u64, MemoryKind::Cuda(0)));
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.starts_with("cuMemAlloc answered CUDA_ERROR_"), "{cause}");
    }
    // And the device goes on.
    drop(allocator.allocate(1 << 20).unwrap());
}

/// More at once than lanes are kept.
#[test]
fn many_threads_copy_at_once() {
    let Some(gpus) = Gpus::get("many_threads_copy_at_once", 1) else { return };
    let devices: Vec<_> = gpus.iter().cloned().collect();
    std::thread::scope(|scope| {
        for thread in 0..12_usize {
            let device = devices[thread % devices.len()].clone();
            scope.spawn(move || {
                let bytes = CHUNK + 1000 * thread + 1;
                let mut memory = CudaAllocator::new(device.clone()).allocate(bytes).unwrap();
                for cycle in 0..10 {
                    let sent = pattern((thread * 100 + cycle) as u64, bytes);
                    upload(&device, &mut memory, 0, &sent).unwrap();
                    let mut found = vec![0; bytes];
                    download(&device, &memory, 0, &mut found).unwrap();
                    assert!(found == sent, "thread {thread}, cycle {cycle}");
                }
            });
        }
    });
}

#[test]
fn what_is_freed_is_free() {
    let Some(gpus) = Gpus::get("what_is_freed_is_free", 1) else { return };
    let device = &gpus[0];
    let allocator = CudaAllocator::new(device.clone());
    drop(allocator.allocate(1 << 20).unwrap());
    let free = || device.memory().unwrap().0;
    let before = free();
    for _ in 0..8 {
        let memory = allocator.allocate(1 << 30).unwrap();
        assert!(free() + (1 << 30) <= before + SLACK);
        // The share outlives the memory, and keeps it.
        let share = memory.allocation().clone();
        drop(memory);
        assert!(free() + (1 << 30) <= before + SLACK);
        drop(share);
    }
    assert!(free() + SLACK >= before, "{} of {before} bytes are free", free());
}

/// What other processes on the device, and the driver itself, may take or give in between.
const SLACK: u64 = 256 << 20;
