use refit::{DigestRequest, PackRequest};
use serde::{Deserialize, Serialize};

use super::codec::{self, body};
use super::{Kind, Message, MessageError};

/// What a target asks sources to do for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Of the target.
    pub incarnation: u128,
    /// What it would like to be packed.
    pub pack: Option<PackRequest>,
    /// What it would like to be hashed.
    pub digests: Option<DigestRequest>,
}

#[derive(Serialize, Deserialize)]
struct Fields {
    incarnation: u128,
    pack_bytes: u32,
}

impl Message for Wish {
    const KIND: Kind = Kind::Wish;

    fn encode(&self) -> Vec<u8> {
        let pack = self.pack.as_ref().map(PackRequest::encode).unwrap_or_default();
        // A request is at most 64 MiB: `PackRequest` cannot hold more boxes than that many bytes spell.
        let pack_bytes = u32::try_from(pack.len()).unwrap_or(u32::MAX);
        let fields = Fields { incarnation: self.incarnation, pack_bytes };
        let mut bytes = codec::encode(Self::KIND, &fields);
        bytes.extend_from_slice(&pack);
        if let Some(digests) = &self.digests {
            bytes.extend_from_slice(&digests.encode());
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let kind = Self::KIND;
        let (Fields { incarnation, pack_bytes }, rest) = codec::fields(kind, body(kind, bytes)?)?;
        let cut = usize::try_from(pack_bytes).ok().and_then(|at| rest.split_at_checked(at));
        let Some((pack, digests)) = cut else {
            let reason = format!(
                "{pack_bytes} bytes of a pack request were announced, {} follow",
                rest.len()
            );
            return Err(MessageError::Malformed { kind, reason });
        };
        let pack = if pack.is_empty() { None } else { Some(PackRequest::decode(pack)?) };
        let digests = if digests.is_empty() { None } else { Some(DigestRequest::decode(digests)?) };
        Ok(Self { incarnation, pack, digests })
    }
}
