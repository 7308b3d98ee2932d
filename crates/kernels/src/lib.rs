//! Batched strided moves on CUDA devices: copies, casts, element maps and zeros, any number in one launch.
//!
//! A [`Move`] says which runs of bytes go where and what becomes of them on the way; a [`Table`] is many of them, as the
//! kernel reads them; a [`Mover`] is the kernel on one device, and carries out tables that it has been
//! [given](Mover::upload). Sources may be memory of other devices that this one can map: then a launch is a gather over
//! their link. A [`Landing`] is the safe form, within one device.
//!
//! The kernel is CUDA C, `move.cu`, and comes compiled to PTX: neither a toolkit nor NVRTC is needed, only a driver for
//! CUDA 12.0 or later and a device of compute capability 8.0 or higher.
//!
//! # Architecture invariants
//!
//! - Tables are pure: what a launch does is decided and checked on the host, and testable there.
//! - The kernel only reads entries and moves bytes. It checks nothing, and its threads do not talk to each other.
//! - `move.cu` and `move.ptx` belong together: `cargo xtask tidy` compares their digests.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod divide;
mod error;
mod landing;
mod launch;
mod mover;
mod moves;
mod raw;
mod shelf;
mod table;

pub use error::{KernelError, Side};
pub use landing::Landing;
#[doc(hidden)]
pub use mover::Shape;
pub use mover::{Mover, Pace, Resident};
pub use moves::{Effect, Move};
pub use table::Table;

/// For tests and measurements of this workspace. Not a stable part of the API.
#[doc(hidden)]
pub mod internal {
    pub use crate::launch::launches;
    pub use crate::raw::{Entry, Launch, MOST_TABLES, Placed};

    /// The kernel as it is loaded.
    pub const PTX: &str = crate::mover::PTX;
}
