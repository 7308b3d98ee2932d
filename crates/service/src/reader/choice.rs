//! Which of several offers is taken.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::num::NonZeroU32;

use super::{Tried, Wanted};
use crate::groups::{Census, Offer};

/// Who reads now, and how many may.
#[derive(Clone, Copy, Debug)]
pub struct Load<'a> {
    /// Live readers, by group. Groups without any need not be there.
    pub readers: &'a BTreeMap<String, usize>,
    /// Most readers of a group.
    pub most: NonZeroU32,
}

/// The offer to take: of those that will do and have room the one that failed least, then the version that is preferred,
/// then the newest, then the one with the fewest readers, then relays. Among equals, readers of different names spread, and the same
/// reader always takes the same.
#[must_use]
pub fn choose<'a>(
    census: &'a Census,
    wanted: &Wanted,
    tried: &BTreeMap<String, Tried>,
    load: Option<Load<'_>>,
    reader: &str,
) -> Option<&'a Offer> {
    let readers = |offer: &Offer| {
        load.and_then(|load| load.readers.get(&offer.group)).copied().unwrap_or_default()
    };
    let will_do = |offer: &&Offer| {
        let refused =
            tried.get(&offer.group).is_some_and(|tried| tried.refused && tried.offer == **offer);
        let room = load.is_none_or(|load| readers(offer) < load.most.get() as usize);
        offer.version >= wanted.at_least
            && wanted.at_most.is_none_or(|most| offer.version <= most)
            && wanted.not_from.as_ref() != Some(&offer.group)
            && !refused
            && room
    };
    census.offers.values().filter(will_do).min_by_key(|offer| {
        (
            tried.get(&offer.group).map_or(0, |tried| tried.failures),
            wanted.prefer != Some(offer.version),
            Reverse(offer.version),
            readers(offer),
            offer.ranks.iter().any(|rank| !rank.member.relay),
            spread(reader, &offer.group),
        )
    })
}

/// A number that is anybody's guess, and always the same.
fn spread(reader: &str, group: &str) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("refit service choice of a group v1");
    hasher.update(&(reader.len() as u64).to_le_bytes());
    hasher.update(reader.as_bytes());
    hasher.update(group.as_bytes());
    *hasher.finalize().as_bytes()
}
