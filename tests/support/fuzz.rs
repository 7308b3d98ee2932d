//! What is done with bytes that anybody may have written: the fuzz targets, for libFuzzer in `fuzz/` and for the plain
//! test in `tests/fuzz.rs`.
//!
//! A target panics where the code under test is wrong; a refusal is what most input deserves. Two parts of an input
//! are separated by a zero byte, which neither JSON nor a name has.

mod bands;
mod case;
mod config;
mod digests;
mod messages;
mod metadata;
pub mod mutate;
mod publication;
mod request;
mod seal;

pub use bands::bands;
pub use case::case;
pub use config::config;
pub use digests::digests;
pub use messages::messages;
pub use metadata::metadata;
pub use publication::publication;
pub use request::request;
pub use seal::seal;

/// A fuzz target and what it may take.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// The name of its corpus, and of the libFuzzer target.
    pub name: &'static str,
    /// What is done with an input.
    pub run: fn(&[u8]),
    /// Bytes that may be allocated at once for each byte of input.
    pub bytes_per_byte: usize,
    /// Bytes that may be allocated at once beside those.
    pub bytes: usize,
}

impl Target {
    /// Bytes that may be allocated at once for an input of this length.
    #[must_use]
    pub fn bound(&self, len: usize) -> usize {
        self.bytes + len * self.bytes_per_byte
    }
}

/// Every target.
pub const TARGETS: [Target; 9] = [
    // Two layers of 2^16 key-value heads, three bands each, on both sides.
    Target { name: "config", run: config, bytes_per_byte: 64, bytes: 128 << 20 },
    Target { name: "case", run: case, bytes_per_byte: 64, bytes: 1 << 20 },
    // 2^20 bands that copies become; or a plan of 2^12 pieces and its programs, whose waves may have 2^18.
    Target { name: "bands", run: bands, bytes_per_byte: 64, bytes: 256 << 20 },
    Target { name: "publication", run: publication, bytes_per_byte: 96, bytes: 64 << 10 },
    Target { name: "request", run: request, bytes_per_byte: 96, bytes: 64 << 10 },
    Target { name: "digests", run: digests, bytes_per_byte: 160, bytes: 64 << 10 },
    Target { name: "messages", run: messages, bytes_per_byte: 160, bytes: 64 << 10 },
    Target { name: "seal", run: seal, bytes_per_byte: 32, bytes: 64 << 10 },
    Target { name: "metadata", run: metadata, bytes_per_byte: 64, bytes: 64 << 10 },
];

/// The parts of an input.
fn parts(data: &[u8]) -> (&[u8], Option<&[u8]>) {
    match data.iter().position(|&byte| byte == 0) {
        Some(end) => (&data[..end], Some(&data[end + 1..])),
        None => (data, None),
    }
}
