//! Refits between many processes that come, go and fail.
//!
//! [`refit`] moves one version's weights once everybody is there and nothing goes wrong. This crate adds what it takes to do
//! that for weeks: where processes meet ([`rendezvous`]), and who may read or write which version when.
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod groups;
pub mod keys;
mod leases;
pub mod message;
pub mod puller;
pub mod rank;
pub mod reader;
pub mod relay;
pub mod rendezvous;
pub mod replica;
mod seat;
pub mod source;
mod stats;

pub use self::seat::{Observer, Point, Seat};
pub use self::stats::{Retries, ServiceStats};
