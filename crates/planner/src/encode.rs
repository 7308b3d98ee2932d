//! The canonical encoding behind plan and program hashes: fixed field order, little-endian integers, every string
//! and list length-prefixed, the format version in the derivation context. Never serde output, never `usize`.

use crate::Hash;
use crate::dims::Dims;

pub(crate) struct Encoder(blake3::Hasher);

impl Encoder {
    /// `context` names what is hashed and its format version; a change of the encoding must change it.
    pub(crate) fn new(context: &'static str) -> Self {
        Self(blake3::Hasher::new_derive_key(context))
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.0.update(&value.to_le_bytes());
    }

    pub(crate) fn len(&mut self, len: usize) {
        self.u64(len as u64);
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.len(bytes.len());
        self.0.update(bytes);
    }

    pub(crate) fn dims(&mut self, dims: &Dims) {
        self.len(dims.as_slice().len());
        for dim in dims.as_slice() {
            self.u64(dim.count);
            self.u64(dim.source_stride);
            self.u64(dim.target_stride);
        }
    }

    pub(crate) fn finish(self) -> Hash {
        Hash::new(*self.0.finalize().as_bytes())
    }
}
