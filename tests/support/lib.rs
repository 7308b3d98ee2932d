//! Shared by the cross-crate tests: the oracle, an interpreter of plans and programs, random layouts,
//! golden data.

#![allow(clippy::missing_panics_doc, clippy::unwrap_used, reason = "a panic here is a failed test")]

pub mod allocations;
pub mod corners;
pub mod execute;
pub mod faults;
pub mod floats;
pub mod fuzz;
pub mod golden;
pub mod landing;
pub mod link;
pub mod models;
pub mod moves;
pub mod oracle;
pub mod packing;
pub mod ranks;
pub mod reference;
pub mod silence;
pub mod skip;
pub mod starved;
pub mod strategies;
