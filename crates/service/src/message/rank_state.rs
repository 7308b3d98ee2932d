use serde::{Deserialize, Serialize};

use super::codec::{self, check_rank};
use super::{Kind, Message, MessageError};

/// Where one rank of a replica stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RankState {
    /// The rank.
    pub rank: u32,
    /// How many ranks the replica has, as this one says.
    pub ranks: u32,
    /// Which life of this rank it is.
    pub incarnation: u128,
    /// The version that its live parameters are whole of.
    pub installed: Option<u64>,
    /// What it is ready to install, and bound to keep until the round is decided.
    pub prepared: Option<Prepared>,
    /// Whether its live parameters can be trusted.
    pub health: Health,
}

/// A rank's vote: this version is staged, and stays so until this round is decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Prepared {
    /// The round.
    pub round: u64,
    /// The version.
    pub version: u64,
}

/// Whether live parameters can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Health {
    /// They are whole, or nothing has been installed yet.
    Whole,
    /// They are being written.
    Installing,
    /// Writing them failed: they are a mix.
    Invalid,
}

impl Message for RankState {
    const KIND: Kind = Kind::RankState;

    fn encode(&self) -> Vec<u8> {
        codec::encode(Self::KIND, self)
    }

    fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let kind = Self::KIND;
        let state: Self = codec::decode(kind, bytes)?;
        check_rank(kind, state.rank, state.ranks)?;
        if state.prepared.is_some_and(|prepared| prepared.round == 0) {
            let (field, must) = ("round", "1 or more");
            return Err(MessageError::Field { kind, field, value: 0, must });
        }
        if let (Health::Installing | Health::Invalid, Some(value)) = (state.health, state.installed)
        {
            let (field, must) = ("installed version", "absent while parameters are not whole");
            return Err(MessageError::Field { kind, field, value, must });
        }
        Ok(state)
    }
}
