use std::sync::OnceLock;

use cudarc::driver::{result, sys};
use libloading::Library;

use super::CudaError;

/// Proof that the CUDA driver is loaded and initialised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Driver {
    version: u32,
}

/// Where the bindings look first and last; nobody installs the names between.
const LIBRARIES: [&str; 2] = ["libcuda.so", "libcuda.so.1"];

/// The functions that this module calls, and the crates above it: kernels and peer reads. The bindings panic at the
/// first call of one that is missing.
const REQUIRED: [&str; 44] = [
    "cuCtxEnablePeerAccess",
    "cuCtxPopCurrent_v2",
    "cuCtxPushCurrent_v2",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceCanAccessPeer",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetP2PAttribute",
    "cuDeviceGetUuid_v2",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuInit",
    "cuIpcCloseMemHandle",
    "cuIpcGetMemHandle",
    "cuIpcOpenMemHandle_v2",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetAddressRange_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadDataEx",
    "cuModuleUnload",
    "cuPointerGetAttributes",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamGetCtx",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// The first release with everything this crate and those above it call; all of it is older than that, by far.
const OLDEST: u32 = 12_000;

impl Driver {
    /// Loads and initialises the driver, once per process: later calls return the first answer.
    ///
    /// # Errors
    /// [`CudaError::NotPresent`] where there is no driver, [`CudaError::TooOld`] and [`CudaError::MissingSymbol`]
    /// where there is another one, [`CudaError::Call`] where it does not start. The process goes on.
    pub fn load() -> Result<Self, CudaError> {
        static ONCE: OnceLock<Result<Driver, CudaError>> = OnceLock::new();
        ONCE.get_or_init(Self::load_uncached).clone()
    }

    fn load_uncached() -> Result<Self, CudaError> {
        let (name, library) = open()?;
        for symbol in REQUIRED {
            // SAFETY: the symbol is looked up, and neither called nor read.
            let found = unsafe { library.get::<*const ()>(symbol) };
            if found.is_err() {
                return Err(CudaError::MissingSymbol { library: name, symbol });
            }
        }
        // What was checked stays what the bindings find.
        std::mem::forget(library);
        result::init().map_err(CudaError::of("cuInit"))?;
        let mut version = 0;
        // SAFETY: the driver writes one integer.
        unsafe { sys::cuDriverGetVersion(&raw mut version) }
            .result()
            .map_err(CudaError::of("cuDriverGetVersion"))?;
        let version = u32::try_from(version).unwrap_or_default();
        if version < OLDEST {
            return Err(CudaError::TooOld { found: version });
        }
        Ok(Self { version })
    }

    /// The newest CUDA that this driver serves: 1000 times the major version plus 10 times the minor one.
    #[must_use]
    pub fn version(self) -> u32 {
        self.version
    }

    /// How many devices this process sees.
    ///
    /// # Errors
    /// [`CudaError::Call`] when the driver fails.
    pub fn device_count(self) -> Result<u32, CudaError> {
        let count = result::device::get_count().map_err(CudaError::of("cuDeviceGetCount"))?;
        Ok(u32::try_from(count).unwrap_or_default())
    }
}

fn open() -> Result<(&'static str, Library), CudaError> {
    let mut tried = Vec::new();
    for name in LIBRARIES {
        // SAFETY: what runs when the driver is loaded is what any CUDA program runs.
        match unsafe { Library::new(name) } {
            Ok(library) => return Ok((name, library)),
            Err(error) => {
                // What the loader said is the cause; the error itself says that it was asked.
                let cause = std::error::Error::source(&error);
                tried.push(cause.map_or_else(|| format!("{name}: {error}"), ToString::to_string));
            }
        }
    }
    Err(CudaError::NotPresent { tried: tried.join(", ") })
}

#[cfg(test)]
mod tests;
