//! What one refit did and how long each stage took, as plain data.

use std::time::Duration;

/// Durations and counts of one refit of one target rank.
///
/// Counts are of this refit alone: a warm one has no plans, no allocations, no registrations, no prepared reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Planning and lowering.
    pub plan: Duration,
    /// Allocating staging memory.
    pub allocate: Duration,
    /// Registering memory with the transport.
    pub register: Duration,
    /// Connecting to peers not met before.
    pub connect: Duration,
    /// Binding offsets to addresses and building the reads.
    pub prepare: Duration,
    /// From the start of `prepare` until the reads of the first wave were handed to the transport: what a refit does before
    /// bytes move.
    pub ready: Duration,
    /// How long it took to post the reads of the first wave. They may move meanwhile.
    pub posting: Duration,
    /// From the first post until the last read settled, those of the headers included, without `land` up to then.
    pub pull: Duration,
    /// Landing copies and fills, as far as they were waited for.
    pub land: Duration,
    /// From the start of `prepare` to the end of `install`.
    pub total: Duration,
    /// Plans made.
    pub plans: u64,
    /// Allocations made.
    pub allocations: u64,
    /// Registrations made.
    pub registrations: u64,
    /// Reads built, without those of the headers.
    pub prepared_reads: u64,
    /// Reads posted, without those of the headers.
    pub reads: u64,
    /// Headers read: one a source rank, or two where it was not known what they had to say.
    pub headers: u64,
    /// Bytes that crossed the wire.
    pub wire_bytes: u64,
    /// Bytes of them that were needed.
    pub needed_bytes: u64,
    /// Bytes of staging memory, without the headers.
    pub staging_bytes: u64,
    /// The version that was read, of all source ranks; nothing where nothing is read.
    pub version: Option<u64>,
}
