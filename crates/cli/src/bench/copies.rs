//! The ceiling of GPUs, beside a transport that may or may not reach it: one copy by a copy engine from memory that
//! another process has published.

#[cfg(not(feature = "cuda"))]
mod absent;
#[cfg(feature = "cuda")]
mod peer;

#[cfg(not(feature = "cuda"))]
pub(super) use self::absent::{Copies, Published};
#[cfg(feature = "cuda")]
pub(super) use self::peer::{Copies, Published};
