//! Refits between many processes that come, go and fail.
//!
//! [`refit`] moves one version's weights once everybody is there and nothing goes wrong. This crate adds what it takes to do
//! that for weeks: where processes meet ([`rendezvous`]), and who may read or write which version when.
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod meeting;
mod random;
pub mod rendezvous;

pub use meeting::{Meeting, MeetingError};
