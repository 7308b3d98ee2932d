//! One-sided reads between agents: a trait and the in-process default; behind features NIXL, GPUs that map one another's
//! memory, and the choice between these two; one conformance suite.
//!
//! # Architecture invariants
//!
//! - Nothing here runs by itself: no runtime, no thread of ours. Whoever holds a [`Pull`] drives it.
//! - Memory that a posted read may still write is never freed, reused or handed back: a [`Pull`] owns it until
//!   every read has settled, and a [`Parked`] one keeps it quarantined.
//! - A transport refuses what a NIC would refuse: unregistered memory, ranges that leave a registration.
//! - No address enters a message or a log: agents, lengths and positions do.
//!
//! # Example
//!
//! Two agents of one process; the second reads what the first registered, into memory that a pool keeps for the next
//! time. Over NIXL only the first two lines of code differ.
//!
//! ```
//! use std::sync::Arc;
//! use std::time::{Duration, Instant};
//!
//! use refit_planner::{Dims, Transform};
//! use refit_pool::{Allocator, HostAllocator, Key, Pool, PoolOptions};
//! use refit_transport::local::{LocalTransport, Network};
//! use refit_transport::{LocalRange, Pull, ReadOp, RemoteRange, Transport, TransportRegistrar};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let network = Network::new();
//! let (trainer, engine) = (LocalTransport::new(&network, "trainer")?, LocalTransport::new(&network, "engine")?);
//!
//! let mut weights = HostAllocator.allocate(4096)?;
//! weights.host_bytes_mut().unwrap().fill(7);
//! let _registration = trainer.register(weights.allocation())?;
//!
//! let engine = Arc::new(engine);
//! let peer = engine.connect(trainer.agent(), &trainer.metadata()?)?;
//! let pool = Pool::new(HostAllocator, TransportRegistrar::new(Arc::clone(&engine)), PoolOptions::default());
//! let lease = pool.lease(Key::from([0; 32]), |build| {
//!     let arena = build.arena(4096)?;
//!     let read = ReadOp {
//!         from: RemoteRange { address: weights.address(), len: 4096, kind: weights.kind() },
//!         into: LocalRange { address: arena.address(), len: 4096, kind: arena.kind() },
//!         run: 4096,
//!         dims: Dims::none(),
//!         transform: Transform::Copy,
//!         bulk: false,
//!     };
//!     Ok::<_, Box<dyn std::error::Error>>(vec![engine.prepare(&peer, &[read])?])
//! });
//!
//! let pull = Pull::start(Arc::clone(&engine), lease.map_err(|error| error.to_string())?, Vec::new(), ..)?;
//! let settled = pull.wait(Instant::now() + Duration::from_secs(10))?;
//! assert!(settled.lease.arenas()[0].host_bytes().unwrap().iter().all(|&byte| byte == 7));
//! # Ok(()) }
//! ```

#![cfg_attr(docsrs, feature(doc_cfg))]

mod cause;
mod envelope;
mod error;
mod patterns;
mod peers;
mod pool;
mod pull;
mod random;
mod reads;
mod registry;
mod suspicion;
mod transport;

#[cfg(feature = "cuda")]
#[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
pub mod auto;
#[cfg(feature = "conformance")]
#[cfg_attr(docsrs, doc(cfg(feature = "conformance")))]
pub mod conformance;
pub mod local;
#[cfg(feature = "nixl")]
#[cfg_attr(docsrs, doc(cfg(feature = "nixl")))]
pub mod nixl;
#[cfg(feature = "cuda")]
#[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
pub mod peer;

pub use cause::Cause;
pub use error::{Side, TransportError};
pub use patterns::Written;
pub use pool::{TransportLease, TransportPool, TransportRegistrar};
pub use pull::{
    Parked, Patience, Progress, Pull, PullError, PullStats, Refusal, Returned, Settled, Unsettled,
};
pub use random::draw_incarnation;
pub use transport::{LocalRange, Peer, ReadOp, RemoteRange, Status, Transport};
