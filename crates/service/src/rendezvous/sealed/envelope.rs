//! What surrounds a value in the store, and when it is opened. Pure: no keys of a map, no memory of what came before.
//!
//! ```text
//! magic 8 │ format 1 │ way 1 │ job │ writer │ key │ incarnation 16 │ sequence 8 │ body │ tag 32
//! ```
//!
//! Numbers are little-endian. Texts follow their length in two bytes, the body follows its own in eight. The tag covers
//! everything before it: it is HMAC-SHA256 with the job's key, or SHA-256 where there is none.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use hmac::Mac;
use sha2::{Digest, Sha256};

use super::{JobKey, SealError};
use crate::rendezvous::MAX_KEY_BYTES;

const MAGIC: &[u8; 8] = b"refit\0se";

/// The format that is written and read. A change of it must change this.
const FORMAT: u8 = 1;

/// Tagged with a digest: damage and mix-ups are found, forgery is not.
const DIGEST: u8 = 0;
/// Tagged with the job's key.
const MAC: u8 = 1;

/// Where the parts begin, behind magic, format and way of sealing.
const PARTS: usize = MAGIC.len() + 2;

/// Bytes of a tag.
const TAG: usize = 32;

/// Most bytes of the name of a job or of a writer.
pub(super) const MAX_NAME_BYTES: usize = 96;

/// Most bytes that surround a body.
pub(super) const MAX_SEAL_BYTES: usize =
    8 + 1 + 1 + 2 * (2 + MAX_NAME_BYTES) + 2 + MAX_KEY_BYTES + 16 + 8 + 8 + TAG;

/// Everything that is sealed beside the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header<'a> {
    /// The job, and which of its processes wrote the value.
    pub(super) job: &'a str,
    pub(super) writer: &'a str,
    /// The key that the value was written to.
    pub(super) key: &'a str,
    /// Which life of the process, and which of the values that it wrote in it.
    pub(super) incarnation: u128,
    pub(super) sequence: u64,
}

/// A sealed value, opened: what it says of itself, and where its body is.
#[derive(Debug)]
pub(super) struct Opened<'a> {
    pub(super) header: Header<'a>,
    pub(super) body: std::ops::Range<usize>,
    /// Enough of the tag to tell two values apart.
    pub(super) mark: u64,
}

/// Seals a body. Names and key are within their limits.
pub(super) fn seal(key: Option<&JobKey>, header: &Header<'_>, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(body.len().saturating_add(MAX_SEAL_BYTES));
    out.extend_from_slice(MAGIC);
    out.push(FORMAT);
    out.push(if key.is_some() { MAC } else { DIGEST });
    for text in [header.job, header.writer, header.key] {
        // Longer ones are refused before this; here they would be cut, and refused by every reader.
        let len = u16::try_from(text.len()).unwrap_or(u16::MAX);
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(text.as_bytes());
    }
    out.extend_from_slice(&header.incarnation.to_le_bytes());
    out.extend_from_slice(&header.sequence.to_le_bytes());
    out.extend_from_slice(&(body.len() as u64).to_le_bytes());
    out.extend_from_slice(body);
    let tag: [u8; TAG] = match key {
        Some(key) => key.mac().chain_update(&out).finalize().into_bytes().into(),
        None => Sha256::digest(&out).into(),
    };
    out.extend_from_slice(&tag);
    out
}

/// Opens what [`seal`] made with the same key. Allocates nothing.
///
/// Nothing but the first ten bytes is looked at before the tag has been found right.
pub(super) fn open<'a>(key: Option<&JobKey>, bytes: &'a [u8]) -> Result<Opened<'a>, SealError> {
    let not_sealed = || SealError::NotSealed { bytes: bytes.len() };
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(not_sealed)?;
    let (&[format, way], _) = rest.split_first_chunk::<2>().ok_or_else(not_sealed)?;
    if format != FORMAT {
        return Err(SealError::Format { found: format, expected: FORMAT });
    }
    let (sealed, tag) = bytes.split_last_chunk::<TAG>().ok_or_else(not_sealed)?;
    let parts = sealed.get(PARTS..).ok_or_else(not_sealed)?;
    match (way, key) {
        (MAC, Some(key)) => {
            // In constant time: how long it takes says nothing of the right tag.
            let right = key.mac().chain_update(sealed).verify_slice(tag).is_ok();
            if !right {
                return Err(SealError::Forged);
            }
        }
        (DIGEST, None) => {
            if <[u8; TAG]>::from(Sha256::digest(sealed)) != *tag {
                return Err(SealError::Damaged);
            }
        }
        (MAC, None) => return Err(SealError::Keyed),
        (DIGEST, Some(_)) => return Err(SealError::Keyless),
        _ => return Err(SealError::Malformed { part: "way of sealing" }),
    }
    let (header, body) = parse(parts).map_err(|part| SealError::Malformed { part })?;
    // The body ends where the tag begins.
    let end = sealed.len();
    let mark = tag.first_chunk().copied().map_or(0, u64::from_le_bytes);
    Ok(Opened { header, body: end.saturating_sub(body.len())..end, mark })
}

/// The job that a value names which could not be opened: for the text of an error, and for nothing else.
pub(super) fn claimed_job(bytes: &[u8]) -> Option<&str> {
    let parts = bytes.get(PARTS..bytes.len().checked_sub(TAG)?)?;
    parse(parts).ok().map(|(header, _)| header.job)
}

fn parse(bytes: &[u8]) -> Result<(Header<'_>, &[u8]), &'static str> {
    let mut rest = bytes;
    let mut texts = [""; 3];
    let limits = [("job", MAX_NAME_BYTES), ("writer", MAX_NAME_BYTES), ("key", MAX_KEY_BYTES)];
    for (text, (part, max)) in texts.iter_mut().zip(limits) {
        let len = usize::from(u16::from_le_bytes(array(&mut rest, part)?));
        let (head, tail) = rest.split_at_checked(len).filter(|_| len <= max).ok_or(part)?;
        *text = std::str::from_utf8(head).map_err(|_| part)?;
        rest = tail;
    }
    let incarnation = u128::from_le_bytes(array(&mut rest, "incarnation")?);
    let sequence = u64::from_le_bytes(array(&mut rest, "sequence")?);
    if u64::from_le_bytes(array(&mut rest, "length")?) != rest.len() as u64 {
        return Err("length");
    }
    let [job, writer, key] = texts;
    Ok((Header { job, writer, key, incarnation, sequence }, rest))
}

fn array<const N: usize>(rest: &mut &[u8], part: &'static str) -> Result<[u8; N], &'static str> {
    let (head, tail) = rest.split_first_chunk().ok_or(part)?;
    *rest = tail;
    Ok(*head)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header<'_> = Header {
        job: "job",
        writer: "trainer-3",
        key: "qwen/group/a/member/3",
        incarnation: 0x0102_0304_0506_0708_090A_0B0C_0D0E_0F10,
        sequence: 7,
    };

    fn key(fill: u8) -> JobKey {
        JobKey::from_secret(&[fill; 32]).unwrap()
    }

    #[test]
    fn what_goes_in_comes_out() {
        for key in [None, Some(key(7))] {
            for body in [&b""[..], b"x", &[0xFF; 3000]] {
                let sealed = seal(key.as_ref(), &HEADER, body);
                assert!(sealed.len() <= body.len() + MAX_SEAL_BYTES);
                let opened = open(key.as_ref(), &sealed).unwrap();
                assert_eq!((opened.header, &sealed[opened.body]), (HEADER, body));
            }
        }
    }

    /// The bytes of both ways, made once with Python's `hmac` and `hashlib`.
    #[test]
    fn others_can_write_the_format() {
        let sealed = seal(Some(&key(7)), &HEADER, b"body");
        let (body, tag) = sealed.split_last_chunk::<TAG>().unwrap();
        let mut expected =
            b"refit\0se\x01\x01\x03\0job\x09\0trainer-3\x15\0qwen/group/a/member/3".to_vec();
        expected.extend((1..=16).rev());
        expected.extend([7, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend(b"body");
        assert_eq!(body, expected);
        let hex: String = tag.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "127bb49d272398a4eaec1ec6f9b8904ac7666f26b4b3a579d5b104759c035071");
        let sealed = seal(None, &HEADER, b"body");
        let hex: String =
            sealed[sealed.len() - TAG..].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "ebaf6dcaf7a48aca3cecbd7c81f448ac5321b19b938811c5668d93f566871bf8");
    }

    #[test]
    fn every_truncation_every_addition_and_every_flipped_bit_is_refused() {
        for key in [None, Some(key(7))] {
            let sealed = seal(key.as_ref(), &HEADER, b"body");
            for len in 0..sealed.len() {
                assert!(open(key.as_ref(), &sealed[..len]).is_err(), "{len} bytes");
            }
            assert!(open(key.as_ref(), &[sealed.as_slice(), &[0]].concat()).is_err());
            for bit in 0..sealed.len() * 8 {
                let mut damaged = sealed.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert!(open(key.as_ref(), &damaged).is_err(), "bit {bit}");
            }
        }
    }

    #[test]
    fn ways_and_keys_are_not_mixed() {
        let (keyed, plain) = (seal(Some(&key(7)), &HEADER, b"b"), seal(None, &HEADER, b"b"));
        assert_eq!(open(Some(&key(8)), &keyed).unwrap_err(), SealError::Forged);
        assert_eq!(open(Some(&key(7)), &plain).unwrap_err(), SealError::Keyless);
        assert_eq!(open(None, &keyed).unwrap_err(), SealError::Keyed);
        // Nobody without the key can pass a digest off as a MAC, or the other way round.
        for (from, to, key) in [(&plain, MAC, Some(key(7))), (&keyed, DIGEST, None)] {
            let mut passed_off = from.clone();
            passed_off[9] = to;
            assert!(open(key.as_ref(), &passed_off).is_err());
        }
    }

    /// With a right tag around wrong contents, as only a faulty process of the job could write them.
    #[test]
    fn lengths_that_lie_are_refused_behind_a_right_tag() {
        let sealed = seal(None, &HEADER, b"body");
        let end = sealed.len() - TAG;
        let length_at = end - 4 - 8;
        for (at, bytes) in [
            (10, &[0xFF, 0xFF][..]),
            (10, &[97, 0]),
            (15, &[200, 0]),
            (length_at, &[3, 0, 0, 0, 0, 0, 0, 0]),
            (length_at, &[0xFF; 8]),
            (12, &[0xFF]),
        ] {
            let mut wrong = sealed[..end].to_vec();
            wrong[at..at + bytes.len()].copy_from_slice(bytes);
            let tag = Sha256::digest(&wrong);
            wrong.extend_from_slice(&tag);
            assert!(matches!(open(None, &wrong), Err(SealError::Malformed { .. })), "{at}");
        }
    }
}
