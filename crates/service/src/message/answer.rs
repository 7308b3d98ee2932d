use refit::Digests;

use super::{Kind, Message, MessageError, codec};

/// A source rank's answer to a target that asked what its bytes hash to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer(pub Digests);

impl Message for Answer {
    const KIND: Kind = Kind::Answer;

    fn encode(&self) -> Vec<u8> {
        codec::encode(Self::KIND, &self.0)
    }

    fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let digests: Digests = codec::decode(Self::KIND, bytes)?;
        if !digests.stamp.is_stable() {
            let (kind, field, must) = (Self::KIND, "epoch", "even");
            return Err(MessageError::Field { kind, field, value: digests.stamp.epoch, must });
        }
        Ok(Self(digests))
    }
}
