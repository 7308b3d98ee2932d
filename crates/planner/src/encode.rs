//! The canonical encoding behind hashes: fixed field order, little-endian integers, every string and list
//! length-prefixed, the format version in the derivation context. Never serde output, never `usize`.

use alloc::vec::Vec;

use crate::Hash;
use crate::dims::Dims;

/// Enough for a hasher to work on many blocks at once, few enough to stay in a near cache.
const BUFFERED: usize = 64 << 10;

pub(crate) struct Encoder {
    hasher: blake3::Hasher,
    buffer: Vec<u8>,
}

impl Encoder {
    /// `context` names what is hashed and its format version; a change of the encoding must change it.
    pub(crate) fn new(context: &'static str) -> Self {
        let hasher = blake3::Hasher::new_derive_key(context);
        Self { hasher, buffer: Vec::with_capacity(BUFFERED) }
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.append(&value.to_le_bytes());
    }

    pub(crate) fn len(&mut self, len: usize) {
        self.u64(len as u64);
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.len(bytes.len());
        self.append(bytes);
    }

    pub(crate) fn dims(&mut self, dims: &Dims) {
        self.len(dims.as_slice().len());
        for dim in dims.as_slice() {
            self.u64(dim.count);
            self.u64(dim.source_stride);
            self.u64(dim.target_stride);
        }
    }

    pub(crate) fn finish(mut self) -> Hash {
        self.hasher.update(&self.buffer);
        Hash::new(*self.hasher.finalize().as_bytes())
    }

    fn append(&mut self, bytes: &[u8]) {
        if self.buffer.len() + bytes.len() > BUFFERED {
            self.hasher.update(&self.buffer);
            self.buffer.clear();
        }
        self.buffer.extend_from_slice(bytes);
    }
}
