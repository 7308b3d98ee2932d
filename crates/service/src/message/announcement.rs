use serde::{Deserialize, Serialize};

use super::{Kind, Message, MessageError, codec};

/// Which version one rank of a group holds, and whether it may be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Announcement {
    /// Of the member that it speaks for.
    pub incarnation: u128,
    /// The version.
    pub version: u64,
    /// What the header beside the parameters says of this version: even, and never the same for two versions of one
    /// incarnation.
    pub epoch: u64,
    /// Whether it may be read.
    pub offering: Offering,
}

/// Whether a version may be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Offering {
    /// Whoever takes a lease may read.
    Open,
    /// It is about to be overwritten. Those who read it end; nobody begins.
    Closed,
}

impl Message for Announcement {
    const KIND: Kind = Kind::Announcement;

    fn encode(&self) -> Vec<u8> {
        codec::encode(Self::KIND, self)
    }

    fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let announcement: Self = codec::decode(Self::KIND, bytes)?;
        let epoch = announcement.epoch;
        if epoch == 0 || !epoch.is_multiple_of(2) {
            let (kind, field, must) = (Self::KIND, "epoch", "even and not 0");
            return Err(MessageError::Field { kind, field, value: epoch, must });
        }
        Ok(announcement)
    }
}
