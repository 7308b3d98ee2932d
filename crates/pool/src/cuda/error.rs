use std::fmt;

use cudarc::driver::result::DriverError;

use crate::MemoryKind;

/// Why something on a CUDA device did not work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no CUDA driver on this machine.
    #[error(
        "the CUDA driver is not there: {tried}; install the NVIDIA driver, or let the loader find it (LD_LIBRARY_PATH; \
         in a container, its GPU runtime)"
    )]
    NotPresent {
        /// What was looked for, and how that ended.
        tried: String,
    },
    /// Something calls itself `libcuda` and lacks a function that CUDA 12.0 has.
    #[error("`{library}` lacks `{symbol}`; is it NVIDIA's driver, of CUDA 12.0 or later?")]
    MissingSymbol {
        /// The library.
        library: &'static str,
        /// The function.
        symbol: &'static str,
    },
    /// The driver is older than what this crate was written for.
    #[error("the driver is for CUDA {}.{}, at least 12.0 is needed; update it", found / 1000, found % 1000 / 10)]
    TooOld {
        /// As CUDA counts: 1000 times the major version plus 10 times the minor one.
        found: u32,
    },
    /// No device has this ordinal.
    #[error(
        "there is no CUDA device {ordinal}, this process sees {count}; ordinals count from 0 and follow \
         CUDA_VISIBLE_DEVICES"
    )]
    NoDevice {
        /// The ordinal asked for.
        ordinal: u32,
        /// How many devices there are.
        count: u32,
    },
    /// A call of the driver failed.
    #[error("{call} answered {code}{}", advice(code))]
    Call {
        /// The driver's function.
        call: &'static str,
        /// Its answer, such as `CUDA_ERROR_OUT_OF_MEMORY`.
        code: String,
    },
    /// Memory that was mapped piece by piece, as by torch's expandable segments.
    #[error(
        "the memory on CUDA device {device} is mapped piece by piece (expandable segments): other processes cannot map \
         it, and NIXL reads it a thousand times slower or not at all; start the process without \
         `expandable_segments:True` in PYTORCH_CUDA_ALLOC_CONF (or PYTORCH_ALLOC_CONF)"
    )]
    ExpandableSegments {
        /// The device.
        device: u32,
    },
    /// Memory of a stream-ordered pool.
    #[error(
        "the memory on CUDA device {device} comes from a stream-ordered pool (cuMemAllocAsync): neither a NIC nor \
         another process can map it; allocate it with cudaMalloc, for torch without `backend:cudaMallocAsync` in \
         PYTORCH_CUDA_ALLOC_CONF"
    )]
    PoolMemory {
        /// The device.
        device: u32,
    },
    /// Managed memory, which moves between devices and host.
    #[error(
        "the memory is managed (cudaMallocManaged): it has no fixed place to read or write; use cudaMalloc"
    )]
    Managed,
    /// Memory that does not live on the device named.
    #[error("it is {found}, and CUDA device {device} was named; name the device that it lives on")]
    WrongDevice {
        /// Where it lives.
        found: MemoryKind,
        /// The device named.
        device: u32,
    },
    /// An address that is no device memory.
    #[error(
        "the address is not in device memory, it is the host's or nobody's; adopt memory by the address it has on CUDA \
         device {device}"
    )]
    HostPointer {
        /// The device named.
        device: u32,
    },
    /// A stream of another device or context.
    #[error(
        "the stream does not belong to the primary context of CUDA device {device}; use one of that device"
    )]
    WrongStream {
        /// The device named.
        device: u32,
    },
    /// A range that leaves its memory.
    #[error(
        "{len} bytes from {offset} reach outside the {available} bytes that there are; check offset and length"
    )]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Bytes there are.
        available: u64,
    },
    /// A copy within one memory whose places share bytes.
    #[error(
        "{len} bytes from {from} to {into} of the same memory: the places overlap; copy in parts"
    )]
    Overlap {
        /// First byte that is read.
        from: u64,
        /// First byte that is written.
        into: u64,
        /// Bytes.
        len: u64,
    },
}

impl CudaError {
    /// A call of the driver that failed. `code` is a `CUresult`, or whatever prints as its name.
    pub fn call(call: &'static str, code: impl fmt::Debug) -> Self {
        Self::Call { call, code: format!("{code:?}") }
    }

    /// Names the call that failed. The code's own name is used: asking the driver for it could fail again.
    pub(super) fn of(call: &'static str) -> impl Fn(DriverError) -> Self {
        move |error| Self::call(call, error.0)
    }
}

/// What to do about an answer of the driver, as the end of a sentence.
fn advice(code: &str) -> &'static str {
    match code {
        "CUDA_ERROR_OUT_OF_MEMORY" => {
            ": the device is full; free some, lower the pool's budget, or stage less"
        }
        "CUDA_ERROR_NO_DEVICE" => ": this process sees no GPU; check CUDA_VISIBLE_DEVICES",
        "CUDA_ERROR_STUB_LIBRARY" => {
            ": the toolkit's stub of libcuda was found; take its folder out of LD_LIBRARY_PATH"
        }
        "CUDA_ERROR_SYSTEM_NOT_READY" => {
            ": the system is not ready; is the fabric manager running?"
        }
        "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" | "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE" => {
            ": libcuda and the kernel's driver do not match; use those of one release"
        }
        "CUDA_ERROR_ILLEGAL_ADDRESS"
        | "CUDA_ERROR_LAUNCH_FAILED"
        | "CUDA_ERROR_MISALIGNED_ADDRESS"
        | "CUDA_ERROR_ECC_UNCORRECTABLE"
        | "CUDA_ERROR_NVLINK_UNCORRECTABLE"
        | "CUDA_ERROR_CONTEXT_IS_DESTROYED" => {
            ": the context is lost with everything in it; restart the process"
        }
        "CUDA_ERROR_DEINITIALIZED" => ": the process is ending",
        "CUDA_ERROR_NOT_INITIALIZED" => {
            ": was the process forked after CUDA had started? start it afresh"
        }
        "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED" | "CUDA_ERROR_TOO_MANY_PEERS" => {
            ": these devices cannot read one another; read through NIXL"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use cudarc::driver::sys::CUresult;

    use super::*;

    #[test]
    fn answers_are_named_and_come_with_advice() {
        let error = CudaError::of("cuMemAlloc")(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
        assert_eq!(
            error.to_string(),
            "cuMemAlloc answered CUDA_ERROR_OUT_OF_MEMORY: the device is full; free some, lower the pool's budget, or \
             stage less"
        );
        let plain = CudaError::call("cuInit", CUresult::CUDA_ERROR_UNKNOWN).to_string();
        assert_eq!(plain, "cuInit answered CUDA_ERROR_UNKNOWN");
    }

    /// A name that the bindings do not use would never be matched.
    #[test]
    fn advice_is_for_codes_that_there_are() {
        for code in [
            CUresult::CUDA_ERROR_OUT_OF_MEMORY,
            CUresult::CUDA_ERROR_NO_DEVICE,
            CUresult::CUDA_ERROR_STUB_LIBRARY,
            CUresult::CUDA_ERROR_SYSTEM_NOT_READY,
            CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH,
            CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE,
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
            CUresult::CUDA_ERROR_LAUNCH_FAILED,
            CUresult::CUDA_ERROR_MISALIGNED_ADDRESS,
            CUresult::CUDA_ERROR_ECC_UNCORRECTABLE,
            CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE,
            CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED,
            CUresult::CUDA_ERROR_DEINITIALIZED,
            CUresult::CUDA_ERROR_NOT_INITIALIZED,
            CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED,
            CUresult::CUDA_ERROR_TOO_MANY_PEERS,
        ] {
            assert!(!advice(&format!("{code:?}")).is_empty(), "{code:?}");
        }
    }

    #[test]
    fn versions_read_as_people_write_them() {
        let error = CudaError::TooOld { found: 11_080 }.to_string();
        assert!(error.starts_with("the driver is for CUDA 11.8, at least 12.0"), "{error}");
    }
}
