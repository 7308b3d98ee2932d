//! Refits between many processes that come, go and fail.
//!
//! [`refit`] moves one version's weights once everybody is there and nothing goes wrong. This crate adds what it takes to do
//! that for weeks: where processes meet ([`rendezvous`]), who may read or write which version when ([`source`], [`reader`],
//! [`replica`]), and what becomes of callers and memory when a peer falls silent ([`worker`]).
//!
//! # Example
//!
//! A source rank and a target rank that find each other in a directory; with [`InProcess`](rendezvous::InProcess) they may be
//! threads, and with `Etcd` (feature `etcd`) on any hosts.
//!
//! ```
//! use std::time::{Duration, Instant};
//!
//! use refit::Publication;
//! # use refit::planner::{Band, Dtype, LayoutBuilder, Param};
//! # use refit::{Place, PublishedHeader, PublishedRegion};
//! use refit_service::rendezvous::{Directory, Key};
//! use refit_service::{Meeting, MeetingError};
//!
//! # fn publication() -> Result<Publication, Box<dyn std::error::Error>> {
//! #     let mut layout = LayoutBuilder::new(0);
//! #     let w = layout.tensor("w", 8, 4)?;
//! #     layout.param(Param::new("w", Dtype::Bf16, 8, 4).band(Band::new(w, 0..8, 0..4)))?;
//! #     let (place, region) = (Place { address: 64, cuda: None }, PublishedRegion { address: 64, len: 128, cuda: None });
//! #     let header = PublishedHeader { incarnation: 1, place: Place { address: 128, cuda: None } };
//! #     Ok(Publication::new("trainer-0".to_owned(), vec![], layout.build(), header, vec![place], vec![region])?)
//! # }
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path();
//! let meet = || -> Result<_, MeetingError> {
//!     // Where a process dies, what it said is gone after 5 seconds.
//!     let (store, name) = (Directory::new(path)?, Key::new(["job-17", "actor"])?);
//!     Ok(Meeting::new(store, name, Duration::from_secs(5))?)
//! };
//! let trainer = meet()?;
//! trainer.publish(&publication()?)?; // of a `refit::Source`
//!
//! let engine = meet()?;
//! let published = engine.wait([0], Instant::now() + Duration::from_secs(60))?;
//! assert_eq!(published[0].agent(), "trainer-0"); // for `refit::Target::prepare`
//!
//! drop(trainer);
//! let error = engine.wait([0], Instant::now()).unwrap_err();
//! assert!(matches!(error, MeetingError::NotPublished { missing, .. } if missing == [0]));
//! # Ok(()) }
//! ```
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod groups;
pub mod keys;
mod leases;
mod meeting;
pub mod message;
pub mod puller;
mod random;
pub mod rank;
pub mod reader;
pub mod relay;
pub mod rendezvous;
pub mod replica;
mod seat;
mod seats;
pub mod source;
mod stats;
mod stop;
pub mod worker;

pub use self::meeting::{Meeting, MeetingError};
pub use self::seat::{Observer, Point, Reseat, Seat};
pub use self::seats::Seats;
pub use self::stats::{PullTotals, Retries, ServiceStats};
pub use self::stop::Stop;
