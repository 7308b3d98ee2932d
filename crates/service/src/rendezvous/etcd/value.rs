//! Values as they lie in etcd: small ones in their entry, larger ones in chunks beside it.

use crate::rendezvous::MAX_VALUE_BYTES;

/// Larger values are cut. Small, so that a page of entries is far from what a message may have.
pub(super) const INLINE: usize = 16 << 10;

/// Bytes of a chunk. A server takes requests of 1.5 MiB, unless it was told otherwise.
pub(super) const CHUNK: usize = 512 << 10;

const IS_INLINE: u8 = 0;
const IS_CUT: u8 = 1;

/// What an entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Inline(Vec<u8>),
    Cut(Cut),
}

/// A value in chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Which no other value ever had.
    pub(super) id: u128,
    pub(super) bytes: u64,
    pub(super) digest: [u8; 32],
}

impl Cut {
    pub(super) fn new(id: u128, value: &[u8]) -> Self {
        Self { id, bytes: value.len() as u64, digest: *blake3::hash(value).as_bytes() }
    }

    pub(super) fn chunks(&self) -> u64 {
        self.bytes.div_ceil(CHUNK as u64)
    }
}

impl Value {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Inline(value) => [&[IS_INLINE], value.as_slice()].concat(),
            Self::Cut(Cut { id, bytes, digest }) => {
                [&[IS_CUT], &id.to_le_bytes()[..], &bytes.to_le_bytes()[..], &digest[..]].concat()
            }
        }
    }

    /// Nothing else than [`encode`](Self::encode) makes.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (tag, rest) = bytes.split_first()?;
        match *tag {
            IS_INLINE if rest.len() <= INLINE => Some(Self::Inline(rest.to_vec())),
            IS_CUT => {
                let (id, rest) = rest.split_first_chunk::<16>()?;
                let (bytes, digest) = rest.split_first_chunk::<8>()?;
                let cut = Cut {
                    id: u128::from_le_bytes(*id),
                    bytes: u64::from_le_bytes(*bytes),
                    digest: digest.try_into().ok()?,
                };
                let larger = cut.bytes > INLINE as u64 && cut.bytes <= MAX_VALUE_BYTES as u64;
                larger.then_some(Self::Cut(cut))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_travel_and_nothing_else_is_one() {
        let cut = Value::Cut(Cut::new(7, &vec![1; INLINE + 1]));
        for value in [Value::Inline(vec![]), Value::Inline(vec![1; INLINE]), cut.clone()] {
            assert_eq!(Value::decode(&value.encode()), Some(value));
        }
        let whole = cut.encode();
        assert!((0..whole.len()).all(|end| Value::decode(&whole[..end]).is_none()));
        assert_eq!(Value::decode(&[whole.as_slice(), &[0]].concat()), None);
        assert_eq!(Value::decode(&vec![IS_INLINE; INLINE + 2]), None);
        assert_eq!(Value::decode(&[2, 0]), None);
        let Value::Cut(mut cut) = cut else { panic!() };
        for bytes in [0, INLINE as u64, MAX_VALUE_BYTES as u64 + 1, u64::MAX] {
            cut.bytes = bytes;
            assert_eq!(Value::decode(&Value::Cut(cut).encode()), None);
        }
    }
}
