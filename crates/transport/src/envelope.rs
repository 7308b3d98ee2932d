//! What an agent publishes: its name, what it registered, and the backend's own blob, all under one digest.
//!
//! Backends parse their blobs without checks (NIXL's loader crashes on some damaged ones), so nothing of a blob
//! reaches them before the digest agrees. The digest finds damage and mix-ups; it does not authenticate: whoever
//! carries metadata between machines must.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use refit_pool::MemoryKind;

use crate::Cause;
use crate::registry::Ranges;

const MAGIC: &[u8; 8] = b"refit-md";
const VERSION: u8 = 1;
const DIGEST: usize = 32;
const DIGEST_CONTEXT: &str = "refit-transport metadata v1";

/// A decoded envelope.
#[derive(Debug)]
pub(crate) struct Envelope<'a> {
    pub(crate) ranges: Ranges,
    pub(crate) blob: &'a [u8],
}

/// Packs what an agent publishes.
pub(crate) fn encode(backend: &str, agent: &str, ranges: &Ranges, blob: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(MAGIC);
    out.push(VERSION);
    put_bytes(&mut out, backend.as_bytes());
    put_bytes(&mut out, agent.as_bytes());
    out.extend_from_slice(&(ranges.iter().len() as u64).to_le_bytes());
    for (kind, address, len) in ranges.iter() {
        let (tag, device) = match kind {
            MemoryKind::Cuda(device) => (1u8, device),
            _ => (0, 0),
        };
        out.push(tag);
        out.extend_from_slice(&device.to_le_bytes());
        out.extend_from_slice(&address.to_le_bytes());
        out.extend_from_slice(&len.to_le_bytes());
    }
    put_bytes(&mut out, blob);
    let digest = digest(&out);
    out.extend_from_slice(&digest);
    out
}

/// Unpacks what `agent` published for `backend`, and refuses everything else.
pub(crate) fn decode<'a>(
    backend: &str,
    agent: &str,
    bytes: &'a [u8],
    max: usize,
) -> Result<Envelope<'a>, Cause> {
    if bytes.len() > max {
        return Err(Cause::TooLarge { len: bytes.len(), max });
    }
    let (covered, end) =
        bytes.split_last_chunk::<DIGEST>().ok_or(Cause::Metadata { part: "length" })?;
    let mut body = Reader(covered);
    if body.take(MAGIC.len(), "magic")? != MAGIC || body.array("version")? != [VERSION] {
        return Err(Cause::Metadata { part: "version" });
    }
    if digest(covered) != *end {
        return Err(Cause::Metadata { part: "digest" });
    }
    let from = body.bytes("backend")?;
    let name = body.bytes("agent")?;
    if from != backend.as_bytes() || name != agent.as_bytes() {
        let found = format!("{}/{}", from.escape_ascii(), name.escape_ascii());
        return Err(Cause::Published { found });
    }
    let mut ranges = Ranges::default();
    // The count sizes nothing: a range that is not there ends the loop.
    for _ in 0..u64::from_le_bytes(body.array("ranges")?) {
        let [tag] = body.array("ranges")?;
        let device = u32::from_le_bytes(body.array("ranges")?);
        let kind = match tag {
            0 => MemoryKind::Host,
            1 => MemoryKind::Cuda(device),
            _ => return Err(Cause::Metadata { part: "memory kind" }),
        };
        let address = u64::from_le_bytes(body.array("ranges")?);
        let len = u64::from_le_bytes(body.array("ranges")?);
        ranges.push(kind, address, len).ok_or(Cause::Metadata { part: "ranges" })?;
    }
    let blob = body.bytes("blob")?;
    if !body.is_empty() {
        return Err(Cause::Metadata { part: "length" });
    }
    Ok(Envelope { ranges, blob })
}

fn digest(bytes: &[u8]) -> [u8; DIGEST] {
    let mut hasher = blake3::Hasher::new_derive_key(DIGEST_CONTEXT);
    hasher.update(bytes);
    *hasher.finalize().as_bytes()
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    out.extend_from_slice(bytes);
}

/// Takes what it reads off the front, and never more than there is.
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    #[cfg(feature = "cuda")]
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn take(&mut self, len: usize, part: &'static str) -> Result<&'a [u8], Cause> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(Cause::Metadata { part })?;
        self.0 = tail;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self, part: &'static str) -> Result<[u8; N], Cause> {
        let (head, tail) = self.0.split_first_chunk().ok_or(Cause::Metadata { part })?;
        self.0 = tail;
        Ok(*head)
    }

    pub(crate) fn bytes(&mut self, part: &'static str) -> Result<&'a [u8], Cause> {
        let len = u64::from_le_bytes(self.array(part)?);
        self.take(usize::try_from(len).map_err(|_| Cause::Metadata { part })?, part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut ranges = Ranges::default();
        ranges.push(MemoryKind::Host, 0x1000, 0x2000).unwrap();
        ranges.push(MemoryKind::Cuda(3), 0x10, 0x20).unwrap();
        encode("test", "a", &ranges, b"blob")
    }

    #[test]
    fn what_goes_in_comes_out() {
        let bytes = sample();
        let envelope = decode("test", "a", &bytes, 1 << 20).unwrap();
        assert_eq!(envelope.blob, b"blob");
        assert!(envelope.ranges.cover(MemoryKind::Cuda(3), 0x10, 0x20, |_| {}));
        assert_eq!(envelope.ranges.iter().len(), 2);
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_refused() {
        let bytes = sample();
        for len in 0..bytes.len() {
            assert!(decode("test", "a", &bytes[..len], 1 << 20).is_err(), "{len} bytes");
        }
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode("test", "a", &damaged, 1 << 20).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn counts_that_lie_cost_nothing() {
        let mut bytes = sample();
        // The count of ranges, after magic, version and two short strings.
        let at = 8 + 1 + 8 + 4 + 8 + 1;
        bytes[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        let body = bytes.len() - DIGEST;
        let digest = digest(&bytes[..body]);
        bytes[body..].copy_from_slice(&digest);
        assert_eq!(
            decode("test", "a", &bytes, 1 << 20).unwrap_err(),
            Cause::Metadata { part: "memory kind" }
        );
    }

    #[test]
    fn others_metadata_is_refused_by_name() {
        let bytes = sample();
        assert!(matches!(decode("test", "b", &bytes, 1 << 20), Err(Cause::Published { .. })));
        assert!(matches!(decode("nixl", "a", &bytes, 1 << 20), Err(Cause::Published { .. })));
        assert!(matches!(decode("test", "a", &bytes, 16), Err(Cause::TooLarge { .. })));
    }
}
