//! Shared by the cross-crate tests: the oracle, an interpreter of plans and programs, random layouts.

#![allow(clippy::missing_panics_doc, reason = "a panic here is a failed test")]

pub mod execute;
pub mod models;
pub mod oracle;
pub mod ranks;
pub mod strategies;
