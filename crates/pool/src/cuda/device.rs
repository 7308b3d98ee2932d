use std::ffi::{c_int, c_void};
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::copy::Lanes;
use super::{CudaError, Driver};
use crate::MemoryKind;

/// A CUDA device and a share in its primary context, which is the one that the CUDA runtime and torch use.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    ordinal: u32,
    device: sys::CUdevice,
    context: sys::CUcontext,
    name: String,
    uuid: [u8; 16],
    multiprocessors: u32,
    lanes: Lanes,
}

// SAFETY: a context is a handle that any thread may make current.
unsafe impl Send for Inner {}
// SAFETY: the driver locks what its handles name.
unsafe impl Sync for Inner {}

impl Device {
    /// Retains the primary context of a device, and starts it if nobody has.
    ///
    /// # Errors
    /// [`CudaError::NoDevice`] when there is no such device, [`CudaError::Call`] when the driver fails.
    pub fn primary(driver: Driver, ordinal: u32) -> Result<Self, CudaError> {
        let count = driver.device_count()?;
        let index = c_int::try_from(ordinal).ok().filter(|_| ordinal < count);
        let index = index.ok_or(CudaError::NoDevice { ordinal, count })?;
        let device = result::device::get(index).map_err(CudaError::of("cuDeviceGet"))?;
        let name = result::device::get_name(device).map_err(CudaError::of("cuDeviceGetName"))?;
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: the device exists, and the driver writes 16 bytes.
        unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, device) }
            .result()
            .map_err(CudaError::of("cuDeviceGetUuid"))?;
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        // SAFETY: the device exists.
        let multiprocessors = unsafe { result::device::get_attribute(device, attribute) }
            .map_err(CudaError::of("cuDeviceGetAttribute"))?;
        // SAFETY: the device exists; `Inner` gives the share back.
        let context = unsafe { result::primary_ctx::retain(device) }
            .map_err(CudaError::of("cuDevicePrimaryCtxRetain"))?;
        Ok(Self(Arc::new(Inner {
            ordinal,
            device,
            context,
            name,
            uuid: uuid.bytes.map(|byte| byte.to_ne_bytes()[0]),
            multiprocessors: u32::try_from(multiprocessors).unwrap_or_default(),
            lanes: Lanes::default(),
        })))
    }

    /// The number this process knows the device by; other processes may count otherwise.
    #[must_use]
    pub fn ordinal(&self) -> u32 {
        self.0.ordinal
    }

    /// The kind of its memory.
    #[must_use]
    pub fn kind(&self) -> MemoryKind {
        MemoryKind::Cuda(self.0.ordinal)
    }

    /// What the vendor calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What identifies it in every process: the device's own, or that of its MIG instance.
    #[must_use]
    pub fn uuid(&self) -> [u8; 16] {
        self.0.uuid
    }

    /// How many blocks of threads run at once, at least.
    #[must_use]
    pub fn multiprocessors(&self) -> u32 {
        self.0.multiprocessors
    }

    /// The `CUcontext`, for calls of the driver that want one. Valid as long as a clone of this value is.
    #[must_use]
    pub fn context(&self) -> *mut c_void {
        self.0.context.cast()
    }

    /// The device's memory in bytes: what is free, and all of it.
    ///
    /// # Errors
    /// [`CudaError::Call`] when the driver fails.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        let _entered = self.enter()?;
        let (free, total) = result::mem_get_info().map_err(CudaError::of("cuMemGetInfo"))?;
        Ok((free as u64, total as u64))
    }

    /// Whether code that runs on this device can read and write the memory of `other`.
    ///
    /// # Errors
    /// [`CudaError::Call`] when the driver fails.
    pub fn can_access(&self, other: &Self) -> Result<bool, CudaError> {
        if self.0.device == other.0.device {
            return Ok(true);
        }
        let mut can = 0;
        // SAFETY: both devices exist, and the driver writes one integer.
        unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, self.0.device, other.0.device) }
            .result()
            .map_err(CudaError::of("cuDeviceCanAccessPeer"))?;
        Ok(can != 0)
    }

    /// Lets code that runs on this device read and write the memory of `other`, from now on. Again changes nothing.
    ///
    /// # Errors
    /// [`CudaError::Call`] when the two have no path, or too many have one.
    pub fn enable_access(&self, other: &Self) -> Result<(), CudaError> {
        if self.0.device == other.0.device {
            return Ok(());
        }
        let _entered = self.enter()?;
        // SAFETY: both contexts are retained.
        match unsafe { sys::cuCtxEnablePeerAccess(other.0.context, 0) } {
            sys::CUresult::CUDA_SUCCESS | sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => {
                Ok(())
            }
            code => Err(CudaError::call("cuCtxEnablePeerAccess", code)),
        }
    }

    /// Waits for everything that was ever started on the device by this process, torch's work included.
    ///
    /// # Errors
    /// [`CudaError::Call`] when the driver fails, or work before this call did.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        let _entered = self.enter()?;
        result::ctx::synchronize().map_err(CudaError::of("cuCtxSynchronize"))
    }

    /// Makes the device current on this thread until the guard goes, then what was current before.
    ///
    /// Guards go in the opposite order of their making.
    ///
    /// # Errors
    /// [`CudaError::Call`] when the driver fails; the thread is as it was then.
    pub fn enter(&self) -> Result<Entered<'_>, CudaError> {
        self.push().map_err(CudaError::of("cuCtxPushCurrent"))
    }

    /// As [`enter`](Self::enter), for destructors: they tell of an error and free nothing then.
    pub(super) fn enter_to_free(&self) -> Option<Entered<'_>> {
        self.push().map_err(|error| lost("cuCtxPushCurrent", error)).ok()
    }

    fn push(&self) -> Result<Entered<'_>, result::DriverError> {
        // SAFETY: the context is retained.
        unsafe { sys::cuCtxPushCurrent_v2(self.0.context) }.result()?;
        Ok(Entered { device: self, _of_this_thread: PhantomData })
    }

    /// Makes the device current on this thread for good, in place of what was.
    ///
    /// For threads whose owner wants that: libraries below, such as UCX, look at what is current.
    ///
    /// # Errors
    /// [`CudaError::Call`] when the driver fails.
    pub fn make_current(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained. Should it be released while current, the driver answers with errors.
        unsafe { result::ctx::set_current(self.0.context) }
            .map_err(CudaError::of("cuCtxSetCurrent"))
    }

    pub(super) fn lanes(&self) -> &Lanes {
        &self.0.lanes
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        self.0.context == other.0.context
    }
}

impl Eq for Device {}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("ordinal", &self.0.ordinal)
            .field("name", &self.0.name)
            .finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: the context is still retained.
        match unsafe { sys::cuCtxPushCurrent_v2(self.context) }.result() {
            Ok(()) => {
                self.lanes.free();
                pop(self.context);
            }
            Err(error) => lost("cuCtxPushCurrent", error),
        }
        // SAFETY: retained once, released once; nothing that needs the context outlives this value.
        if let Err(error) = unsafe { result::primary_ctx::release(self.device) } {
            lost("cuDevicePrimaryCtxRelease", error);
        }
    }
}

/// A device that is current on this thread as long as this value lives.
#[derive(Debug)]
#[must_use = "the device is current only while the guard lives"]
pub struct Entered<'a> {
    device: &'a Device,
    /// The current context is the thread's: the guard must not go to another one.
    _of_this_thread: PhantomData<*const ()>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        pop(self.device.0.context);
    }
}

/// Undoes a push of `context`.
fn pop(context: sys::CUcontext) {
    let mut popped = std::ptr::null_mut();
    // SAFETY: the driver writes one handle.
    match unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) }.result() {
        Ok(()) if popped == context => {}
        Ok(()) => tracing::warn!("another context was current where a device was left"),
        Err(error) => lost("cuCtxPopCurrent", error),
    }
}

/// Tells of an error that a destructor cannot return.
pub(super) fn lost(call: &'static str, error: result::DriverError) {
    if error.0 == sys::CUresult::CUDA_ERROR_DEINITIALIZED {
        // The process is ending: the driver has gone, and has freed everything.
        tracing::debug!(call, "the CUDA driver has gone before what it was to free");
        return;
    }
    tracing::warn!(error = %CudaError::of(call)(error), "something of a CUDA device could not be freed");
}
