//! GPUs that can map one another's memory: reads as one launch of a kernel over NVLink, straight into place.
//!
//! Within a process the memory of another device is accessed as it is; between processes of one host the driver maps it
//! (CUDA IPC), once a connection. A batch is a table of strided moves on the reader's device, and a list of copies for its
//! copy engine. Posting any number of batches is one launch and the copies, queued on the stream of the caller; what the
//! caller queues behind them sees the bytes. Strides, casts and maps are done on the way.
//!
//! # What the driver does that shapes this module
//!
//! - It maps whole allocations of `cudaMalloc`, and nothing else: not expandable segments, not memory of pools.
//! - What is mapped stays readable when its owner is gone: a dead trainer's last weights still arrive. Owners of this
//!   process are asked before each post, and those of other processes watched, where both number processes alike; reads
//!   then fail with [`PeerGone`](crate::Cause::PeerGone). In containers with process namespaces of their own nobody
//!   notices, and the layer above has to.
//! - What happens to memory that is freed while another process has it mapped it leaves open, and what a handle names
//!   that is made for the same addresses afterwards. Owners keep what they published until its readers are done, and
//!   have connected again or left.
//! - A reader's stream knows nothing of an owner's: what the owner wrote is seen when its stream was synchronised before
//!   the read was posted.
//! - That an owner deregistered is seen in the same process only. There, what is being read stays allocated.
//! - Work that is queued ends by itself, and is never cancelled. A batch that is dropped in flight waits for it.
//! - An error of the device is the context's: whose work failed, and whether the rest has stopped, cannot be told. It is
//!   [`TransportError::Lost`](crate::TransportError::Lost), the process is to be restarted, and torch's context with it.
//! - Handles say nothing about who may use them: all agents of a host that hold a publication can map what it names.
//!
//! # Example
//!
//! What two processes of one host do; `publish` and `fetch` stand for whatever carries a publication from one to the
//! other. On one GPU or in one process it is the same code.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use refit_pool::Allocator;
//! use refit_pool::cuda::{CudaAllocator, Device, Driver, Stream};
//! use refit_transport::Transport;
//! use refit_transport::peer::{PeerOptions, PeerTransport};
//!
//! # fn publish(_: &str, _: Vec<u8>) {}
//! # fn fetch() -> (String, Vec<u8>) { Default::default() }
//! fn source() -> Result<(), Box<dyn std::error::Error>> {
//!     let device = Device::primary(Driver::load()?, 0)?;
//!     let weights = CudaAllocator::new(device.clone()).allocate(1 << 30)?;
//!     let stream = Arc::new(Stream::new(&device)?);
//!     let trainer = PeerTransport::new(stream, PeerOptions::new("trainer-0"))?;
//!     let registration = trainer.register(weights.allocation())?;
//!     publish(trainer.agent(), trainer.metadata()?);
//!     // … until every reader is done.
//!     Ok(trainer.deregister(registration)?)
//! }
//!
//! fn target() -> Result<(), Box<dyn std::error::Error>> {
//!     let device = Device::primary(Driver::load()?, 1)?;
//!     let stream = Arc::new(Stream::new(&device)?);
//!     let engine = PeerTransport::new(stream, PeerOptions::new("engine-0"))?;
//!     let (name, metadata) = fetch();
//!     let trainer = engine.connect(&name, &metadata)?;
//!     // peer: same host, CUDA IPC, device 1 <- device 0 (NVLink)
//!     println!("{}", engine.route(&trainer));
//!     Ok(())
//! }
//! ```

mod agent;
mod batch;
mod blob;
mod driver;
mod engine;
mod link;
mod options;
mod pieces;
mod process;
mod reach;
mod transport;
mod view;

pub use batch::PeerReads;
pub use options::{Engines, PeerOptions};
pub use transport::{PeerRegistration, PeerTransport};
