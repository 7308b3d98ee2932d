//! Memory that stays allocated and registered between refits.
//!
//! A [`Pool`] entry keeps what a refit needs besides the live parameters: a staging arena, the registrations, and
//! whatever the caller prepared on top of them. A warm lease is one map lookup: no allocation, no registration.
//!
//! # Architecture invariants
//!
//! - This crate does not know what a plan is: keys are opaque bytes.
//! - Registrations are dropped before the memory they cover, always.
//! - A leased entry is never evicted, and memory that a transfer may still write is never freed: it is quarantined.

mod memory;

pub use memory::{KeepAlive, Memory, MemoryKind, Region};
