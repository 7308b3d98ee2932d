//! Memory of CUDA devices, over the driver API.
//!
//! [`Driver::load`] is the only way in: nothing here calls CUDA without the value it returns, because the bindings
//! panic when `libcuda` or one of its functions is missing. Everything builds, and [`Driver::load`] answers, on
//! machines without CUDA.
//!
//! # What is ours and what is not
//!
//! - Contexts are the devices' primary ones, which the CUDA runtime and torch use too. None is created.
//! - Every call leaves the thread's current context as it found it, [`Device::make_current`] apart.
//! - No call uses a default stream. Streams of the caller are [adopted](Stream::adopt); [`upload`], [`download`],
//!   [`set`], [`copy_within`] and [`copy_all`] use streams of their own, are done when they return, and wait for nobody else's work:
//!   synchronise what produces or uses the bytes first.
//! - Whatever a value needs it keeps alive: a stream, an event and an allocation hold their [`Device`], which holds the
//!   context.

mod adopt;
mod allocator;
mod copy;
mod device;
mod driver;
mod error;
mod stream;

pub use adopt::adopt;
pub use allocator::CudaAllocator;
pub use copy::{copy_all, copy_within, download, set, upload};
pub use device::{Device, Entered};
pub use driver::Driver;
pub use error::CudaError;
pub use stream::{Event, Stream};
