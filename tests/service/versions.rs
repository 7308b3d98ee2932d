//! Versions between threads, over the in-process store and the in-process transport: fences, retries, relays and cut-overs
//! with real bytes.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

#[path = "versions/fleet.rs"]
mod fleet;

#[path = "versions/coverage.rs"]
mod coverage;

#[path = "versions/digests.rs"]
mod digests;

#[path = "versions/fence.rs"]
mod fence;

#[path = "versions/retries.rs"]
mod retries;

#[path = "versions/relays.rs"]
mod relays;

#[path = "versions/replicas.rs"]
mod replicas;

#[path = "versions/failover.rs"]
mod failover;

#[path = "versions/stop.rs"]
mod stop;
