//! Devices and what is current on a thread.

use cudarc::driver::result;
use refit_pool::cuda::{CudaAllocator, CudaError, Device, Driver, Event, Stream, download, set};
use refit_pool::{Allocator, MemoryKind};

use crate::gpu::{Gpus, current};

#[test]
fn devices_say_what_they_are() {
    let Some(gpus) = Gpus::get("devices_say_what_they_are", 1) else { return };
    let driver = Driver::load().unwrap();
    assert!(driver.version() >= 12_000);
    for (ordinal, device) in (0..).zip(gpus.iter()) {
        assert_eq!((device.ordinal(), device.kind()), (ordinal, MemoryKind::Cuda(ordinal)));
        assert!(!device.name().is_empty() && device.multiprocessors() > 0);
        let (free, total) = device.memory().unwrap();
        assert!(0 < free && free <= total);
        assert_eq!(*device, Device::primary(driver, ordinal).unwrap());
        assert!(device.can_access(device).unwrap());
        device.enable_access(device).unwrap();
        device.synchronize().unwrap();
        for other in gpus.iter().filter(|other| *other != device) {
            assert_ne!(device.uuid(), other.uuid());
        }
    }
    let count = driver.device_count().unwrap();
    for ordinal in [count, u32::MAX] {
        let error = Device::primary(driver, ordinal).unwrap_err();
        assert_eq!(error, CudaError::NoDevice { ordinal, count });
    }
}

#[test]
fn access_is_enabled_as_often_as_asked() {
    let Some(gpus) = Gpus::get("access_is_enabled_as_often_as_asked", 2) else { return };
    if !gpus[0].can_access(&gpus[1]).unwrap() {
        assert!(matches!(gpus[0].enable_access(&gpus[1]), Err(CudaError::Call { .. })));
        return;
    }
    gpus[0].enable_access(&gpus[1]).unwrap();
    gpus[0].enable_access(&gpus[1]).unwrap();
}

/// Whatever is current on the thread before a call is current after it, each call by itself.
#[test]
fn every_call_leaves_the_current_context_alone() {
    let Some(gpus) = Gpus::get("every_call_leaves_the_current_context_alone", 1) else { return };
    let device = &gpus[0];
    let everything = || {
        let before = current();
        let same = |what: &str| assert_eq!(current(), before, "{what}");
        let again = Device::primary(Driver::load().unwrap(), 0).unwrap();
        same("primary");
        again.memory().unwrap();
        same("memory");
        again.synchronize().unwrap();
        same("synchronize");
        let stream = Stream::new(&again).unwrap();
        same("Stream::new");
        let event = Event::new(&again).unwrap();
        same("Event::new");
        event.record(&stream).unwrap();
        stream.wait_for(&event).unwrap();
        stream.synchronize().unwrap();
        event.wait().unwrap();
        assert!(event.is_done().unwrap());
        same("streams and events");
        let mut memory = CudaAllocator::new(again.clone()).allocate(100).unwrap();
        same("allocate");
        set(&again, &mut memory, 7).unwrap();
        same("set");
        download(&again, &memory, 0, &mut [0; 100]).unwrap();
        same("download");
        CudaAllocator::new(again.clone()).allocate(1 << 50).unwrap_err();
        same("allocate too much");
        drop((memory, stream, event, again));
        same("drop");
    };
    let inside = |device: &Device| {
        let entered = device.enter().unwrap();
        assert_eq!(current().unwrap().cast(), device.context());
        everything();
        drop(entered);
    };
    everything();
    inside(device);
    gpus.iter().for_each(inside);
    // On a thread that has never seen CUDA, nothing is current, and stays so.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert_eq!(current(), None);
            everything();
            assert_eq!(current(), None);
            device.make_current().unwrap();
            assert_eq!(current().unwrap().cast(), device.context());
            everything();
        });
    });
}

/// The context is one that the process had anyway: what the runtime, and so torch, has.
#[test]
fn the_context_is_the_primary_one() {
    let Some(gpus) = Gpus::get("the_context_is_the_primary_one", 1) else { return };
    let device = result::device::get(0).unwrap();
    // SAFETY: the device exists.
    let retained = unsafe { result::primary_ctx::retain(device) }.unwrap();
    assert_eq!(retained.cast(), gpus[0].context());
    // SAFETY: retained above; `gpus` keeps the context.
    unsafe { result::primary_ctx::release(device) }.unwrap();
}
