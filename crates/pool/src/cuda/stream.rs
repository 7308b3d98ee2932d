use std::ffi::c_void;
use std::fmt;

use cudarc::driver::{result, sys};

use super::device::lost;
use super::{CudaError, Device};

/// An ordered queue of work on a device.
pub struct Stream {
    stream: sys::CUstream,
    /// Whether it is ours to destroy.
    owned: bool,
    device: Device,
}

// SAFETY: a stream is a handle that any thread may use.
unsafe impl Send for Stream {}
// SAFETY: the driver locks what its handles name.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream of its own, which does not wait for the default stream nor makes it wait.
    ///
    /// # Errors
    /// [`CudaError::Call`] when the driver fails.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        let _entered = device.enter()?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(CudaError::of("cuStreamCreate"))?;
        Ok(Self { stream, owned: true, device: device.clone() })
    }

    /// A stream of someone else, such as torch's current one. Null is the device's default stream.
    ///
    /// # Errors
    /// [`CudaError::WrongStream`] when it is another device's or another context's, [`CudaError::Call`] when the
    /// driver fails.
    ///
    /// # Safety
    /// `raw` is a `CUstream` (or `cudaStream_t`) that stays valid as long as the returned value lives, and names one stream
    /// on every thread, which `CU_STREAM_PER_THREAD` does not. While it is captured into a graph nothing is queued on it
    /// through this value: that would be recorded, and not done.
    pub unsafe fn adopt(device: &Device, raw: *mut c_void) -> Result<Self, CudaError> {
        let _entered = device.enter()?;
        let stream = raw.cast();
        let mut context = std::ptr::null_mut();
        // SAFETY: the stream is valid, says the caller, and the driver writes one handle.
        unsafe { sys::cuStreamGetCtx(stream, &raw mut context) }
            .result()
            .map_err(CudaError::of("cuStreamGetCtx"))?;
        if context.cast() != device.context() {
            return Err(CudaError::WrongStream { device: device.ordinal() });
        }
        Ok(Self { stream, owned: false, device: device.clone() })
    }

    /// The `CUstream`, valid as long as this value.
    #[must_use]
    pub fn raw(&self) -> *mut c_void {
        self.stream.cast()
    }

    /// The device it queues work for.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Waits until everything queued so far is done.
    ///
    /// # Errors
    /// [`CudaError::Call`] when the driver fails, or the work did.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        let _entered = self.device.enter()?;
        // SAFETY: the stream is valid as long as this value.
        unsafe { result::stream::synchronize(self.stream) }
            .map_err(CudaError::of("cuStreamSynchronize"))
    }

    /// Has what is queued from now on wait for the event, which may be another device's. The caller does not wait.
    ///
    /// # Errors
    /// [`CudaError::Call`] when the driver fails.
    pub fn wait_for(&self, event: &Event) -> Result<(), CudaError> {
        let _entered = self.device.enter()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: stream and event are valid; the driver keeps what a queued wait needs of an event.
        unsafe { result::stream::wait_event(self.stream, event.event, flags) }
            .map_err(CudaError::of("cuStreamWaitEvent"))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        let Some(_entered) = self.device.enter_to_free() else { return };
        // SAFETY: ours, and destroyed once. Work that is still queued is done all the same.
        if let Err(error) = unsafe { result::stream::destroy(self.stream) } {
            lost("cuStreamDestroy", error);
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream")
            .field("device", &self.device.ordinal())
            .field("owned", &self.owned)
            .finish_non_exhaustive()
    }
}

/// A mark in a stream, to ask for or to wait for. It measures no time.
pub struct Event {
    event: sys::CUevent,
    device: Device,
}

// SAFETY: an event is a handle that any thread may use.
unsafe impl Send for Event {}
// SAFETY: the driver locks what its handles name.
unsafe impl Sync for Event {}

impl Event {
    /// An event that has not been recorded, which counts as done.
    ///
    /// # Errors
    /// [`CudaError::Call`] when the driver fails.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        let _entered = device.enter()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map_err(CudaError::of("cuEventCreate"))?;
        Ok(Self { event, device: device.clone() })
    }

    /// The `CUevent`, valid as long as this value.
    #[must_use]
    pub fn raw(&self) -> *mut c_void {
        self.event.cast()
    }

    /// The device it was made for.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Marks what the stream has queued so far, in place of an earlier mark.
    ///
    /// # Errors
    /// [`CudaError::WrongStream`] when the stream is another device's, [`CudaError::Call`] when the driver fails.
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        if self.device != *stream.device() {
            return Err(CudaError::WrongStream { device: self.device.ordinal() });
        }
        let _entered = self.device.enter()?;
        // SAFETY: both are valid.
        unsafe { result::event::record(self.event, stream.stream) }
            .map_err(CudaError::of("cuEventRecord"))
    }

    /// Whether everything before the mark is done.
    ///
    /// # Errors
    /// [`CudaError::Call`] when the driver fails, or the work did.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        let _entered = self.device.enter()?;
        // SAFETY: the event is valid.
        match unsafe { sys::cuEventQuery(self.event) } {
            sys::CUresult::CUDA_SUCCESS => Ok(true),
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => Err(CudaError::call("cuEventQuery", code)),
        }
    }

    /// Waits until everything before the mark is done.
    ///
    /// # Errors
    /// [`CudaError::Call`] when the driver fails, or the work did.
    pub fn wait(&self) -> Result<(), CudaError> {
        let _entered = self.device.enter()?;
        // SAFETY: the event is valid.
        unsafe { result::event::synchronize(self.event) }
            .map_err(CudaError::of("cuEventSynchronize"))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let Some(_entered) = self.device.enter_to_free() else { return };
        // SAFETY: ours, and destroyed once; the driver keeps what queued work needs of it.
        if let Err(error) = unsafe { result::event::destroy(self.event) } {
            lost("cuEventDestroy", error);
        }
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event").field("device", &self.device.ordinal()).finish_non_exhaustive()
    }
}
