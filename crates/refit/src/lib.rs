//! Moves one training step's weights from the ranks of a Megatron-Core trainer into the ranks of a vLLM engine.
//!
//! This crate is the glue; each layer below is a crate of its own and is re-exported here:
//!
//! - [`planner`]: layouts in; segments, coverage proof and hash out; then the lowering to reads;
//! - [`translate`]: Megatron's and vLLM's parameters as layouts;
//! - [`pool`]: memory that stays allocated and registered between refits;
//! - [`transport`]: one-sided reads: in-process, over NIXL, or between GPUs that map each other's memory.
//!
//! A source rank makes a [`Source`] of its parameters and publishes it, by whatever carries bytes; `refit-service` has a
//! `Meeting` for that. A target rank makes a [`Target`] of its live parameters and, for every version, goes through
//! prepare → pull → land → install → refreshed. The first refit plans, allocates and registers; every later one only moves bytes.
//!
//! # Example
//!
//! Two ranks in one process; between processes only the transport and the way the publication travels differ.
//!
//! ```
//! use std::sync::Arc;
//! use std::time::{Duration, Instant};
//!
//! use refit::planner::{Band, Dtype, LayoutBuilder, Param, RankLayout};
//! use refit::pool::{HostAllocator, PoolOptions};
//! use refit::transport::{TransportPool, TransportRegistrar, local};
//! use refit::{Source, Target, TargetOptions, allocate};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! fn layout() -> Result<RankLayout, refit::planner::LayoutError> {
//!     let mut layout = LayoutBuilder::new(0);
//!     let w = layout.tensor("w", 8, 4)?;
//!     layout.param(Param::new("w", Dtype::Bf16, 8, 4).band(Band::new(w, 0..8, 0..4)))?;
//!     Ok(layout.build())
//! }
//! let network = local::Network::new();
//! let agent = |name: &str| local::LocalTransport::new(&network, name).map(Arc::new);
//!
//! let trainer = agent("trainer")?;
//! let pool = TransportPool::new(HostAllocator, TransportRegistrar::new(trainer.clone()), PoolOptions::default());
//! let mut source = Source::new(trainer, &pool, layout()?, allocate(&layout()?, &HostAllocator)?)?;
//! let mut updating = source.begin_update()?;
//! for (_, memory) in updating.params_mut() {
//!     memory.host_bytes_mut().ok_or("host memory")?.fill(7);
//! }
//! let version_1 = [updating.commit(1)?];
//! let published = [source.publication()?];
//!
//! let engine = agent("engine")?;
//! let pool = TransportPool::new(HostAllocator, TransportRegistrar::new(engine.clone()), PoolOptions::default());
//! let params = allocate(&layout()?, &HostAllocator)?;
//! let mut target = Target::new(engine, pool, layout()?, params, TargetOptions::default())?;
//! for cycle in 0..2 {
//!     let prepared = target.prepare(&published)?.expecting(&version_1)?;
//!     let pulling = prepared.pull()?;
//!     let pulled = pulling.wait(Instant::now() + Duration::from_secs(10))?;
//!     let installed = pulled.land()?.install();
//!     for action in installed.post_actions() {
//!         // The engine derives state anew; this layout, made by hand, calls for none.
//!         println!("{action}");
//!     }
//!     let (installed, report) = installed.refreshed();
//!     assert_eq!(report.plans, if cycle == 0 { 1 } else { 0 });
//!     target = installed;
//! }
//! # Ok(()) }
//! ```
#![cfg_attr(feature = "cuda", doc = include_str!("gpu.md"))]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod bind;
mod digest;
mod error;
mod header;
mod land;
mod memory;
mod publication;
mod report;
mod request;
mod source;
mod target;

#[cfg(feature = "cuda")]
#[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
pub use refit_kernels as kernels;
pub use refit_planner as planner;
pub use refit_pool as pool;
pub use refit_translate as translate;
pub use refit_transport as transport;

pub use digest::{DigestRequest, DigestRequestError, Digests, MAX_DIGEST_REQUEST_BYTES};
pub use error::RefitError;
pub use header::{Expected, HEADER_BYTES, Header, Incarnation, Read as HeaderRead, Stamp};
#[cfg(feature = "cuda")]
#[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
pub use land::DeviceLander;
pub use memory::allocate;
pub use publication::{
    MAX_ENCODED_BYTES, Place, Publication, PublicationError, PublishedHeader, PublishedRegion,
};
pub use report::Report;
pub use request::{MAX_REQUEST_BYTES, PackRequest, RequestError};
pub use source::{PackedSource, ParamsMut, Repacked, Source, Updating};
pub use target::{
    Cancelled, Failed, Installed, InvalidTarget, Landed, Lent, ParkedTarget, Prepared, Pulled,
    Pulling, Settling, Target, TargetOptions, Unfinished,
};
