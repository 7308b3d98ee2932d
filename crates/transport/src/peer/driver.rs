//! The calls of the driver that map one process's memory into another, and copy between devices.

use std::ffi::c_int;
use std::sync::Arc;

use cudarc::driver::{result, sys};
use refit_pool::Region;
use refit_pool::cuda::{CudaError, Device, Stream};

use super::blob::Allocation;
use super::reach::{Access, Path};
use crate::Cause;

/// The whole allocation around a region of the device's memory, as other processes can map it.
pub(super) fn export(device: &Device, region: &Region) -> Result<Allocation, Cause> {
    let _entered = device.enter()?;
    let (base, len) = around(region.address())?;
    // What is not inside one allocation is not what `Region` says it is, or spans several mappings.
    let inside = region.address().checked_add(region.len()).zip(base.checked_add(len));
    if inside.is_none_or(|(end, allocation)| end > allocation) {
        let status = "a shorter allocation than the region".into();
        return Err(Cause::NotExportable { call: "cuMemGetAddressRange", status });
    }
    let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
    // SAFETY: the context is current, and the driver writes one handle.
    let code = unsafe { sys::cuIpcGetMemHandle(&raw mut handle, base) };
    if code != sys::CUresult::CUDA_SUCCESS {
        return Err(Cause::NotExportable {
            call: "cuIpcGetMemHandle",
            status: format!("{code:?}"),
        });
    }
    Ok(Allocation { handle: handle.reserved.map(|byte| byte.to_ne_bytes()[0]), base, len })
}

/// The allocation that an address of the current context lies in: its first address and its bytes.
fn around(address: u64) -> Result<(u64, u64), CudaError> {
    let (mut base, mut len) = (0, 0);
    // SAFETY: a context is current, and the driver writes an address and a length.
    let code = unsafe { sys::cuMemGetAddressRange_v2(&raw mut base, &raw mut len, address) };
    match code {
        sys::CUresult::CUDA_SUCCESS => Ok((base, len as u64)),
        code => Err(CudaError::call("cuMemGetAddressRange", code)),
    }
}

/// An allocation of another process, mapped into the device's context until this is dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    at: u64,
    device: Device,
}

impl Mapping {
    /// Maps an allocation, and checks that it is as large as its owner says.
    pub(super) fn open(device: &Device, allocation: &Allocation) -> Result<Arc<Self>, Cause> {
        let _entered = device.enter()?;
        let reserved = allocation.handle.map(|byte| std::ffi::c_char::from_ne_bytes([byte]));
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut at = 0;
        // SAFETY: the context is current; the driver checks handles, and writes one address.
        let code = unsafe {
            sys::cuIpcOpenMemHandle_v2(&raw mut at, sys::CUipcMemHandle { reserved }, flags)
        };
        match code {
            sys::CUresult::CUDA_SUCCESS => {}
            sys::CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED
            | sys::CUresult::CUDA_ERROR_TOO_MANY_PEERS => return Err(Cause::NoAccess),
            code => {
                let status = format!("{code:?}");
                return Err(Cause::NotMappable { call: "cuIpcOpenMemHandle", status });
            }
        }
        let mapping = Self { at, device: device.clone() };
        let (base, found) = around(at)?;
        let found = base.saturating_add(found).saturating_sub(at);
        if found < allocation.len {
            return Err(Cause::Shrunk { len: allocation.len, found });
        }
        Ok(Arc::new(mapping))
    }

    /// Its first address in this process.
    pub(super) fn at(&self) -> u64 {
        self.at
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let Ok(_entered) = self.device.enter() else {
            tracing::warn!("a peer's memory stays mapped: the device could not be made current");
            return;
        };
        // SAFETY: opened once, closed once. What reads through it holds it, and lets go when its work is done.
        let code = unsafe { sys::cuIpcCloseMemHandle(self.at) };
        if !matches!(code, sys::CUresult::CUDA_SUCCESS | sys::CUresult::CUDA_ERROR_DEINITIALIZED) {
            tracing::warn!(?code, "a peer's memory could not be unmapped");
        }
    }
}

/// A device of this machine as this process numbers it, and how ours reads its memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// `None` where this process does not see it.
    pub(super) ordinal: Option<u32>,
    pub(super) access: Access,
}

/// Looks for a device by its name everywhere. Starts no context.
pub(super) fn look(ours: &Device, uuid: &[u8; 16]) -> Result<Seen, Cause> {
    if ours.uuid() == *uuid {
        return Ok(Seen { ordinal: Some(ours.ordinal()), access: Access::Same });
    }
    let count = result::device::get_count().map_err(of("cuDeviceGetCount"))?;
    for ordinal in 0..count {
        let theirs = result::device::get(ordinal).map_err(of("cuDeviceGet"))?;
        let mut found = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: the device exists, and the driver writes 16 bytes.
        unsafe { sys::cuDeviceGetUuid_v2(&raw mut found, theirs) }
            .result()
            .map_err(of("cuDeviceGetUuid"))?;
        if found.bytes.map(|byte| byte.to_ne_bytes()[0]) == *uuid {
            let ordinal = u32::try_from(ordinal).ok();
            return Ok(Seen { ordinal, access: access(ours, theirs)? });
        }
    }
    Ok(Seen { ordinal: None, access: Access::Unseen })
}

fn access(ours: &Device, theirs: sys::CUdevice) -> Result<Access, Cause> {
    let ordinal = c_int::try_from(ours.ordinal()).unwrap_or(c_int::MAX);
    let ours = result::device::get(ordinal).map_err(of("cuDeviceGet"))?;
    let mut can = 0;
    // SAFETY: both devices exist, and the driver writes one integer.
    unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, ours, theirs) }
        .result()
        .map_err(of("cuDeviceCanAccessPeer"))?;
    if can == 0 {
        return Ok(Access::Denied);
    }
    // Only links between devices carry atomic operations.
    let attribute = sys::CUdevice_P2PAttribute::CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED;
    let mut atomics = 0;
    // SAFETY: as above.
    unsafe { sys::cuDeviceGetP2PAttribute(&raw mut atomics, attribute, ours, theirs) }
        .result()
        .map_err(of("cuDeviceGetP2PAttribute"))?;
    Ok(Access::Granted(if atomics == 0 { Path::Bus } else { Path::NvLink }))
}

/// Queues a copy between memory of devices.
///
/// # Safety
/// Both ranges are mapped in the stream's context, and stay so and are accessed by nobody else until it is done.
pub(super) unsafe fn copy(
    from: u64,
    into: u64,
    len: usize,
    stream: &Stream,
) -> Result<(), CudaError> {
    // SAFETY: the caller's promise. The caller has made the stream's device current.
    unsafe { result::memcpy_dtod_async(into, from, len, stream.raw().cast()) }
        .map_err(of("cuMemcpyDtoDAsync"))
}

fn of(call: &'static str) -> impl Fn(result::DriverError) -> CudaError {
    move |error| CudaError::call(call, error.0)
}
