//! One-sided reads between agents: a trait, the in-process default, NIXL behind a feature, one conformance suite.
//!
//! # Architecture invariants
//!
//! - Nothing here runs by itself: no runtime, no thread. Whoever holds a [`Pull`] drives it.
//! - Memory that a posted read may still write is never freed, reused or handed back: a [`Pull`] owns it until
//!   every read has settled.
//! - A transport refuses what a NIC would refuse: unregistered memory, ranges that leave a registration.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod cause;
mod envelope;
mod error;
mod peers;
mod pool;
mod pull;
mod reads;
mod registry;
mod transport;

#[cfg(feature = "conformance")]
#[cfg_attr(docsrs, doc(cfg(feature = "conformance")))]
pub mod conformance;
pub mod local;
#[cfg(feature = "nixl")]
#[cfg_attr(docsrs, doc(cfg(feature = "nixl")))]
pub mod nixl;

pub use cause::Cause;
pub use error::{Side, TransportError};

pub use pool::{TransportLease, TransportPool, TransportRegistrar};
pub use pull::{Progress, Pull, PullError, PullStats, Settled};
pub use transport::{LocalRange, Peer, ReadOp, RemoteRange, Status, Transport};
