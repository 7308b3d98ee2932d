//! Streams of ours and of others.

use cudarc::driver::result;
use refit_pool::Allocator;
use refit_pool::cuda::{CudaAllocator, CudaError, Event, Stream, download};

use crate::gpu::Gpus;

#[test]
fn events_come_when_the_work_before_them_is_done() {
    let Some(gpus) = Gpus::get("events_come_when_the_work_before_them_is_done", 1) else { return };
    let device = &gpus[0];
    let memory = CudaAllocator::new(device.clone()).allocate(1 << 30).unwrap();
    let [first, second] = [(); 2].map(|()| Stream::new(device).unwrap());
    let event = Event::new(device).unwrap();
    assert!(event.is_done().unwrap(), "an event that was never recorded is done");
    let fill = |stream: &Stream, byte| {
        let _entered = device.enter().unwrap();
        // SAFETY: the memory has the bytes and stays until both streams are done.
        unsafe {
            result::memset_d8_async(memory.address(), byte, memory.len(), stream.raw().cast())
        }
        .unwrap();
    };
    // A hundred passes over a gigabyte take milliseconds, so that the order shows.
    for _ in 0..100 {
        fill(&first, 1);
    }
    event.record(&first).unwrap();
    assert!(!event.is_done().unwrap(), "the work cannot be done yet");
    second.wait_for(&event).unwrap();
    fill(&second, 2);
    second.synchronize().unwrap();
    assert!(event.is_done().unwrap());
    event.wait().unwrap();
    for offset in [0, memory.len() / 2, memory.len() - 1] {
        let mut byte = [0];
        download(device, &memory, offset, &mut byte).unwrap();
        assert_eq!(byte, [2]);
    }
}

#[test]
fn streams_of_others_are_used_and_not_destroyed() {
    let Some(gpus) = Gpus::get("streams_of_others_are_used_and_not_destroyed", 1) else { return };
    let device = &gpus[0];
    let own = Stream::new(device).unwrap();
    for raw in [own.raw(), std::ptr::null_mut()] {
        // SAFETY: `own` outlives it; null is the default stream.
        let adopted = unsafe { Stream::adopt(device, raw) }.unwrap();
        assert_eq!((adopted.raw(), adopted.device()), (raw, device));
        let event = Event::new(device).unwrap();
        event.record(&adopted).unwrap();
        drop(adopted);
        event.wait().unwrap();
    }
    own.synchronize().unwrap();
}

#[test]
fn streams_of_other_devices_are_refused() {
    let Some(gpus) = Gpus::get("streams_of_other_devices_are_refused", 2) else { return };
    let other = Stream::new(&gpus[1]).unwrap();
    // SAFETY: `other` outlives what is adopted.
    let refused = unsafe { Stream::adopt(&gpus[0], other.raw()) }.unwrap_err();
    assert_eq!(refused, CudaError::WrongStream { device: 0 });
    let event = Event::new(&gpus[0]).unwrap();
    assert_eq!(event.record(&other).unwrap_err(), CudaError::WrongStream { device: 0 });
    // Waiting across devices is what events are for.
    let own = Stream::new(&gpus[0]).unwrap();
    event.record(&own).unwrap();
    other.wait_for(&event).unwrap();
    other.synchronize().unwrap();
}
