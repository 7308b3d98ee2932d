//! Memory of real CUDA devices. Without any, every test says that it was skipped.
//!
//! With feature `nixl` also NIXL on that memory, which needs the library at run time.
//!
//! `REFIT_REQUIRE_CUDA=2` makes tests fail, instead of skipping them, that need no more than two devices.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "the lint spares test functions, not what they call"
)]

#[path = "cuda/adopt.rs"]
mod adopt;
#[path = "cuda/device.rs"]
mod device;
#[path = "cuda/gpu.rs"]
mod gpu;
#[cfg(feature = "nixl")]
#[path = "nixl/isolated.rs"]
mod isolated;
#[path = "cuda/kernels.rs"]
mod kernels;
#[path = "cuda/memory.rs"]
mod memory;
#[path = "cuda/mixed.rs"]
mod mixed;
#[cfg(feature = "nixl")]
#[path = "cuda/nixl.rs"]
mod nixl;
#[path = "cuda/peer.rs"]
mod peer;
#[path = "cuda/pool.rs"]
mod pool;
#[path = "cuda/remote.rs"]
mod remote;
#[cfg(feature = "nixl")]
#[path = "cuda/source.rs"]
mod source;
#[path = "cuda/stream.rs"]
mod stream;
