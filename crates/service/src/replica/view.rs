use std::collections::BTreeMap;

use crate::keys::number;
use crate::message::{Decision, Health, Message, MessageError, RankState, Standing};
use crate::rendezvous::{Key, Revision, Snapshot};

/// What a rank sees of its replica in one snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Of which moment.
    pub revision: Revision,
    /// Where each rank stands that is there.
    pub ranks: BTreeMap<u32, RankState>,
    /// The decision of the latest round. It alone counts: what comes before is in it.
    pub latest: Option<Decision>,
    /// Rounds of which decisions are there.
    pub rounds: Vec<u64>,
}

/// Why the entries of a replica cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ViewError {
    /// An entry that cannot be read.
    #[error("`{key}`: {source}")]
    Unreadable {
        /// The entry.
        key: Key,
        /// Why.
        source: MessageError,
    },
    /// An entry that says to be another than its key.
    #[error("`{key}` says to be of number {says}")]
    Misplaced {
        /// The entry.
        key: Key,
        /// What it says.
        says: u64,
    },
    /// An entry of no kind.
    #[error("`{key}` belongs to no replica; remove it")]
    Stray {
        /// The entry.
        key: Key,
    },
    /// Ranks do not agree how many they are.
    #[error(
        "rank {rank} says that the replica has {says} ranks, and it has {ranks}; start all of them with one number"
    )]
    Ranks {
        /// The rank.
        rank: u32,
        /// What it says.
        says: u32,
        /// How many there are.
        ranks: u32,
    },
}

impl View {
    /// What this snapshot shows of the replica under `prefix`, which has this many ranks.
    ///
    /// # Errors
    /// [`ViewError`] for any entry that cannot be used: whoever does not understand what the others say decides nothing.
    pub fn read(prefix: &Key, ranks: u32, snapshot: &Snapshot) -> Result<Self, ViewError> {
        let depth = prefix.parts().count();
        let mut view = Self { revision: snapshot.revision, ..Self::default() };
        for (key, value) in &snapshot.entries {
            if !key.is_under(prefix) {
                continue;
            }
            let unreadable = |source| ViewError::Unreadable { key: key.clone(), source };
            let parts: Vec<&str> = key.parts().skip(depth).collect();
            match parts[..] {
                ["rank", part] => {
                    let state = RankState::decode(value).map_err(unreadable)?;
                    if number(part) != Some(state.rank) {
                        let (key, says) = (key.clone(), state.rank.into());
                        return Err(ViewError::Misplaced { key, says });
                    }
                    if state.ranks != ranks {
                        let (rank, says) = (state.rank, state.ranks);
                        return Err(ViewError::Ranks { rank, says, ranks });
                    }
                    view.ranks.insert(state.rank, state);
                }
                ["decision", part] => {
                    let decision = Decision::decode(value).map_err(unreadable)?;
                    if number(part) != Some(decision.round) {
                        let (key, says) = (key.clone(), decision.round);
                        return Err(ViewError::Misplaced { key, says });
                    }
                    view.rounds.push(decision.round);
                    if view.latest.is_none_or(|latest| latest.round < decision.round) {
                        view.latest = Some(decision);
                    }
                }
                _ => return Err(ViewError::Stray { key: key.clone() }),
            }
        }
        Ok(view)
    }

    /// The last commit.
    #[must_use]
    pub fn standing(&self) -> Option<Standing> {
        self.latest.and_then(|latest| latest.standing())
    }

    /// The round that is not decided yet.
    #[must_use]
    pub fn round(&self) -> u64 {
        self.latest.map_or(1, |latest| latest.round.saturating_add(1))
    }

    /// The newest version that any of the other ranks is bound to.
    #[must_use]
    pub fn newest_prepared(&self, but: u32) -> Option<u64> {
        let others = self.ranks.values().filter(|state| state.rank != but);
        others.filter_map(|state| state.prepared).map(|prepared| prepared.version).max()
    }

    /// The version that all of this many ranks have installed, if that is one and all are whole.
    #[must_use]
    pub fn installed_by_all(&self, ranks: u32) -> Option<u64> {
        if self.ranks.len() != ranks as usize {
            return None;
        }
        let mut versions = self
            .ranks
            .values()
            .map(|state| state.installed.filter(|_| state.health == Health::Whole));
        let first = versions.next()??;
        versions.all(|version| version == Some(first)).then_some(first)
    }

    /// Whether all of this many ranks are bound to this version in this round.
    #[must_use]
    pub fn prepared_by_all(&self, ranks: u32, round: u64, version: u64) -> bool {
        self.ranks.len() == ranks as usize
            && self.ranks.values().all(|state| {
                state.health == Health::Whole
                    && state.prepared.is_some_and(|it| it.round == round && it.version == version)
            })
    }
}
