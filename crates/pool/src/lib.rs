//! Memory that stays allocated and registered between refits.
//!
//! A [`Pool`] entry keeps what a refit needs besides the live parameters: a staging arena, the registrations, and
//! whatever the caller prepared on top of them. A warm lease is one map lookup: no allocation, no registration.
//!
//! # Architecture invariants
//!
//! - This crate does not know what a plan is: keys are opaque bytes.
//! - Registrations are dropped before the memory they cover, always.
//! - A leased entry is never evicted, and memory that a transfer may still write is never freed: it is quarantined,
//!   counted, and released when the transfer has ended.
//! - No lock is held across a call of the allocator, the registrar, or the caller's code.

mod allocator;
mod arena;
mod budget;
mod build;
mod copy;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
mod key;
mod lease;
mod memory;
mod pool;
mod quarantined;
mod registrar;
mod stats;
mod sync;

pub use allocator::{Allocator, HostAllocator};
pub use arena::ArenaPlan;
pub use build::{Build, BuildCost};
pub use copy::copy_runs;
pub use error::{AllocateError, CarveError, LeaseError, PoolError};
pub use key::Key;
pub use lease::Lease;
pub use memory::{KeepAlive, Memory, MemoryKind, Region};
pub use pool::{Pool, PoolOptions};
pub use quarantined::Quarantined;
pub use registrar::Registrar;
pub use stats::PoolStats;
