//! `refit serve` and `refit pull` as processes, over NIXL and a directory.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

#[cfg(feature = "etcd")]
mod etcd;
mod golden;
mod lease;
mod leaving;
mod logs;
mod mistakes;
mod process;
mod sessions;
mod silent;
mod versions;
mod waits;
