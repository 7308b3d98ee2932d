use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Kind, MAX_LEASE_MILLIS, Message, MessageError, codec};

/// A reader's word that it reads a group, and for how long at most.
///
/// It is written once and never renewed: a reader that needs longer begins again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ReaderLease {
    /// Of the reader.
    pub incarnation: u128,
    /// What it reads.
    pub version: u64,
    /// For how long it counts, from when a source first sees it.
    pub millis: u32,
}

impl ReaderLease {
    /// For how long it counts.
    #[must_use]
    pub fn life(&self) -> Duration {
        Duration::from_millis(self.millis.into())
    }
}

impl Message for ReaderLease {
    const KIND: Kind = Kind::ReaderLease;

    fn encode(&self) -> Vec<u8> {
        codec::encode(Self::KIND, self)
    }

    fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let lease: Self = codec::decode(Self::KIND, bytes)?;
        if lease.millis == 0 || lease.millis > MAX_LEASE_MILLIS {
            let (kind, field, must) = (Self::KIND, "life in milliseconds", "1 to 3600000");
            return Err(MessageError::Field { kind, field, value: lease.millis.into(), must });
        }
        Ok(lease)
    }
}
