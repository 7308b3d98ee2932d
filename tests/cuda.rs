//! Memory of real CUDA devices. Without any, every test says that it was skipped.
//!
//! `REFIT_REQUIRE_CUDA=2` makes tests fail, instead of skipping them, that need no more than two devices.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

#[path = "cuda/adopt.rs"]
mod adopt;
#[path = "cuda/device.rs"]
mod device;
#[path = "cuda/gpu.rs"]
mod gpu;
#[path = "cuda/kernels.rs"]
mod kernels;
#[path = "cuda/memory.rs"]
mod memory;
#[path = "cuda/pool.rs"]
mod pool;
#[path = "cuda/stream.rs"]
mod stream;
