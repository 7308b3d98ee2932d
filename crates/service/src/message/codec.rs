//! How bodies are written: postcard, in the one spelling that it writes itself.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Kind, MAX_RANKS, MessageError};

/// Postcard into a vector cannot fail: it has no limit to hit and our types no way to refuse.
pub(super) fn encode<B: Serialize>(kind: Kind, body: &B) -> Vec<u8> {
    let mut bytes = kind.magic().to_vec();
    bytes.extend(postcard::to_allocvec(body).unwrap_or_default());
    bytes
}

/// The body behind the magic, within the kind's bound.
pub(super) fn body(kind: Kind, bytes: &[u8]) -> Result<&[u8], MessageError> {
    let most = kind.max_bytes();
    if bytes.len() > most {
        return Err(MessageError::TooLarge { kind, bytes: bytes.len(), most });
    }
    bytes.strip_prefix(kind.magic().as_slice()).ok_or(MessageError::Magic { kind })
}

/// The fields at the start of a body, and what follows them.
pub(super) fn fields<B: DeserializeOwned + Serialize>(
    kind: Kind,
    body: &[u8],
) -> Result<(B, &[u8]), MessageError> {
    let (fields, rest) = postcard::take_from_bytes::<B>(body)
        .map_err(|error| MessageError::Malformed { kind, reason: error.to_string() })?;
    // Variable-length integers have several spellings.
    let spelt = postcard::to_allocvec(&fields).unwrap_or_default();
    if body.strip_prefix(spelt.as_slice()) != Some(rest) {
        return Err(MessageError::Spelling { kind });
    }
    Ok((fields, rest))
}

/// A body that is fields and nothing else.
pub(super) fn decode<B: DeserializeOwned + Serialize>(
    kind: Kind,
    bytes: &[u8],
) -> Result<B, MessageError> {
    let (fields, rest) = fields(kind, body(kind, bytes)?)?;
    if rest.is_empty() {
        Ok(fields)
    } else {
        let reason = format!("{} bytes follow its end", rest.len());
        Err(MessageError::Malformed { kind, reason })
    }
}

pub(super) fn check_rank(kind: Kind, rank: u32, ranks: u32) -> Result<(), MessageError> {
    if rank < ranks && ranks <= MAX_RANKS {
        Ok(())
    } else {
        Err(MessageError::Rank { kind, rank, ranks })
    }
}
