//! Refits between many processes that come, go and fail.
//!
//! [`refit`] moves one version's weights once everybody is there and nothing goes wrong. This crate adds what it takes to do
//! that for weeks: where processes meet ([`rendezvous`]), who may read or write which version
//! when, and what becomes of callers and memory when a peer falls silent ([`worker`]).
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod rendezvous;
pub mod worker;
