use serde::{Deserialize, Serialize};

use super::codec::{self, check_rank};
use super::{Kind, Message, MessageError};

/// One rank of a group, whatever version it holds.
///
/// It is written once and stays as it is while versions come and go, unless the rank publishes other memory. Where its
/// bytes are stands in an entry beside it, which may be large and which only those read who have chosen the group.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Its rank.
    pub rank: u32,
    /// How many ranks its group has, as it says.
    pub ranks: u32,
    /// Which life of this rank it is: drawn anew when it restarts.
    pub incarnation: u128,
    /// Whether it holds what it has read from another group. Where there is a choice relays are read, because a trainer has
    /// to wait for its readers.
    pub relay: bool,
    /// Digest of its publication ([`refit::Publication::digest`]).
    pub publication: [u8; 32],
}

impl Message for Member {
    const KIND: Kind = Kind::Member;

    fn encode(&self) -> Vec<u8> {
        codec::encode(Self::KIND, self)
    }

    fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let member: Self = codec::decode(Self::KIND, bytes)?;
        check_rank(Self::KIND, member.rank, member.ranks)?;
        Ok(member)
    }
}

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Member")
            .field("rank", &self.rank)
            .field("ranks", &self.ranks)
            .field("relay", &self.relay)
            .field("incarnation", &format_args!("{:032x}", self.incarnation))
            .finish_non_exhaustive()
    }
}
