//! What there is to read: complete, consistent sets of ranks, found in one snapshot of the rendezvous.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::collections::BTreeMap;

use crate::keys::{Model, number};
use crate::message::{Announcement, Member, Message, MessageError, Offering};
use crate::rendezvous::{Key, RendezvousError, Snapshot};

/// A version that may be read from a group: every rank of it, or it is not offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The group.
    pub group: String,
    /// The version, of every rank.
    pub version: u64,
    /// Every rank, in ascending order and counted from 0.
    pub ranks: Vec<OfferedRank>,
}

/// One rank of an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OfferedRank {
    /// Who it is, and where its bytes are.
    pub member: Member,
    /// What its header has to say.
    pub epoch: u64,
}

/// What a snapshot shows of the groups of a model.
#[derive(Clone, Debug, Default)]
pub struct Census {
    /// What may be read, by group.
    pub offers: BTreeMap<String, Offer>,
    /// Why the other groups offer nothing.
    pub withheld: BTreeMap<String, Withheld>,
    /// Leases of each group, live or not.
    pub leases: BTreeMap<String, Vec<Key>>,
}

/// Why a group offers nothing. Some of it passes by itself; what does not says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Withheld {
    /// Nobody but readers is there.
    #[error("it has no members; start its ranks")]
    Empty,
    /// Ranks are missing.
    #[error(
        "of its {ranks} ranks {missing:?} are not there; start them, or wait until they have joined"
    )]
    Incomplete {
        /// How many ranks it has.
        ranks: u32,
        /// The first eight that are missing.
        missing: Vec<u32>,
    },
    /// A rank has not said which version it holds.
    #[error("rank {rank} has announced no version; wait for its first commit")]
    Unannounced {
        /// The rank.
        rank: u32,
    },
    /// A rank is being written.
    #[error("rank {rank} is about to leave version {version}; wait for its commit")]
    Closed {
        /// The rank.
        rank: u32,
        /// Its version.
        version: u64,
    },
    /// Ranks hold different versions.
    #[error(
        "rank {rank} holds version {version} and rank 0 version {first}; wait until all hold one"
    )]
    Mixed {
        /// A rank.
        rank: u32,
        /// Its version.
        version: u64,
        /// The version of rank 0.
        first: u64,
    },
    /// What a rank announced was announced by another life of it.
    #[error(
        "rank {rank} is incarnation {member:032x}, and what is announced for it is of {announced:032x}: it has restarted; \
         wait for its next commit"
    )]
    StaleIncarnation {
        /// The rank.
        rank: u32,
        /// Of the member.
        member: u128,
        /// Of the announcement.
        announced: u128,
    },
    /// Two members are the same life of a rank.
    #[error(
        "ranks {first} and {second} are one incarnation: one of them is a copy of the other's entry; remove it"
    )]
    SameIncarnation {
        /// A rank.
        first: u32,
        /// Another one.
        second: u32,
    },
    /// Members do not agree how many they are.
    #[error(
        "rank {rank} says that the group has {says} ranks, and rank {other} says {other_says}; start all of them with one number"
    )]
    Ranks {
        /// A rank.
        rank: u32,
        /// What it says.
        says: u32,
        /// Another one.
        other: u32,
        /// What that says.
        other_says: u32,
    },
    /// An entry that says to be of another rank than its key.
    #[error("`{key}` says to be of rank {rank}; remove it, and have its rank join again")]
    Misplaced {
        /// The entry.
        key: Key,
        /// What it says.
        rank: u32,
    },
    /// An entry that belongs to no rank of the group.
    #[error("`{key}` belongs to no rank of this group; remove it")]
    Stray {
        /// The entry.
        key: Key,
    },
    /// An entry that cannot be read.
    #[error("`{key}`: {source}")]
    Unreadable {
        /// The entry.
        key: Key,
        /// Why.
        source: MessageError,
    },
}

/// The entries of one group.
#[derive(Debug, Default)]
struct Entries<'a> {
    members: BTreeMap<u32, (&'a Key, &'a [u8])>,
    versions: BTreeMap<u32, (&'a Key, &'a [u8])>,
    stray: Option<&'a Key>,
}

/// What `snapshot` shows of the groups of a model. Looks at nothing else: equal snapshots have equal answers.
///
/// # Errors
/// [`RendezvousError::Key`] for a model whose key is too long.
pub fn census(model: &Model, snapshot: &Snapshot) -> Result<Census, RendezvousError> {
    let prefix = model.groups()?;
    let depth = prefix.parts().count();
    let mut groups: BTreeMap<&str, Entries<'_>> = BTreeMap::new();
    let mut census = Census::default();
    for (key, value) in &snapshot.entries {
        if !key.is_under(&prefix) {
            continue;
        }
        let parts: Vec<&str> = key.parts().skip(depth).collect();
        let Some(group) = parts.first().copied() else { continue };
        let entries = groups.entry(group).or_default();
        match parts[1..] {
            ["member", rank] if number::<u32>(rank).is_some() => {
                let rank = number(rank).unwrap_or_default();
                entries.members.insert(rank, (key, value));
            }
            ["version", rank] if number::<u32>(rank).is_some() => {
                let rank = number(rank).unwrap_or_default();
                entries.versions.insert(rank, (key, value));
            }
            ["reader", _] => {
                census.leases.entry(group.to_owned()).or_default().push(key.clone());
            }
            _ => entries.stray = entries.stray.or(Some(key)),
        }
    }
    for (group, entries) in groups {
        match offer(group, &entries) {
            Ok(offer) => drop(census.offers.insert(group.to_owned(), offer)),
            Err(why) => drop(census.withheld.insert(group.to_owned(), why)),
        }
    }
    Ok(census)
}

fn offer(group: &str, entries: &Entries<'_>) -> Result<Offer, Withheld> {
    if let Some(key) = entries.stray {
        return Err(Withheld::Stray { key: key.clone() });
    }
    let members = members(entries)?;
    let Some((&other, first)) = members.first_key_value() else {
        return Err(match entries.versions.values().next() {
            Some((key, _)) => Withheld::Stray { key: (*key).clone() },
            None => Withheld::Empty,
        });
    };
    let ranks = first.ranks;
    for (&rank, member) in &members {
        if member.ranks != ranks {
            let (says, other_says) = (member.ranks, ranks);
            return Err(Withheld::Ranks { rank, says, other, other_says });
        }
    }
    let mut incarnations = BTreeMap::new();
    for (&second, member) in &members {
        if let Some(first) = incarnations.insert(member.incarnation, second) {
            return Err(Withheld::SameIncarnation { first, second });
        }
    }
    // A member decodes only if its rank is below `ranks`, so the last one bounds all of them.
    if let Some((_, (key, _))) = entries.versions.iter().find(|(rank, _)| **rank >= ranks) {
        return Err(Withheld::Stray { key: (*key).clone() });
    }
    if members.len() != ranks as usize {
        let missing = (0..ranks).filter(|rank| !members.contains_key(rank)).take(8).collect();
        return Err(Withheld::Incomplete { ranks, missing });
    }
    let mut offered = Vec::with_capacity(members.len());
    let mut version = None;
    for (rank, member) in members {
        let Some(&(key, value)) = entries.versions.get(&rank) else {
            return Err(Withheld::Unannounced { rank });
        };
        let announced = Announcement::decode(value)
            .map_err(|source| Withheld::Unreadable { key: key.clone(), source })?;
        if announced.incarnation != member.incarnation {
            let (member, announced) = (member.incarnation, announced.incarnation);
            return Err(Withheld::StaleIncarnation { rank, member, announced });
        }
        if announced.offering == Offering::Closed {
            return Err(Withheld::Closed { rank, version: announced.version });
        }
        let first = *version.get_or_insert(announced.version);
        if announced.version != first {
            return Err(Withheld::Mixed { rank, version: announced.version, first });
        }
        offered.push(OfferedRank { member, epoch: announced.epoch });
    }
    // There is at least one rank, so there is a version.
    version
        .map(|version| Offer { group: group.to_owned(), version, ranks: offered })
        .ok_or(Withheld::Empty)
}

fn members(entries: &Entries<'_>) -> Result<BTreeMap<u32, Member>, Withheld> {
    let mut members = BTreeMap::new();
    for (&rank, &(key, value)) in &entries.members {
        let member = Member::decode(value)
            .map_err(|source| Withheld::Unreadable { key: key.clone(), source })?;
        if member.rank != rank {
            return Err(Withheld::Misplaced { key: key.clone(), rank: member.rank });
        }
        members.insert(rank, member);
    }
    Ok(members)
}
