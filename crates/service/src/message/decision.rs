use serde::{Deserialize, Serialize};

use super::{Kind, Message, MessageError, codec};

/// How a round of a replica ended. Written once: of all that try, the first decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Decision {
    /// The round, counted from 1.
    pub round: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// The last commit before this round. With it the latest decision tells all there is to know, and older ones may go.
    pub before: Option<Standing>,
}

/// How a round ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Outcome {
    /// Every rank had staged this version; every rank installs it.
    Commit(u64),
    /// Every rank keeps what it has.
    Abort,
}

/// A commit, and the round in which it was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Standing {
    /// The round.
    pub round: u64,
    /// The version.
    pub version: u64,
}

impl Decision {
    /// The last commit, this round's included.
    #[must_use]
    pub fn standing(&self) -> Option<Standing> {
        match self.outcome {
            Outcome::Commit(version) => Some(Standing { round: self.round, version }),
            Outcome::Abort => self.before,
        }
    }
}

impl Message for Decision {
    const KIND: Kind = Kind::Decision;

    fn encode(&self) -> Vec<u8> {
        codec::encode(Self::KIND, self)
    }

    fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let kind = Self::KIND;
        let decision: Self = codec::decode(kind, bytes)?;
        let field = |field, value, must| Err(MessageError::Field { kind, field, value, must });
        if decision.round == 0 {
            return field("round", 0, "1 or more");
        }
        if let Some(before) = decision.before {
            if before.round == 0 || before.round >= decision.round {
                return field("round of the commit before", before.round, "before its own");
            }
            if let Outcome::Commit(version) = decision.outcome
                && version <= before.version
            {
                return field("version", version, "newer than the commit before");
            }
        }
        Ok(decision)
    }
}
