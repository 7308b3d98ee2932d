//! Choosing among copies of a shard.

use alloc::collections::BinaryHeap;
use alloc::vec;
use alloc::vec::Vec;
use core::cmp::Reverse;
use core::ops::Range;

use super::Replicas;
use super::pieces::{Cut, transform};
use crate::source::{Class, Owner};
use crate::{SourceLayout, Transform};

/// The copy that is read for a cut: who owns it, and on which rank.
#[derive(Clone, Copy)]
pub(super) struct Chosen<'a> {
    pub(super) owner: &'a Owner,
    pub(super) rank: u32,
}

/// The copy to read for each cut, in their order; `params` are the cuts of each target parameter.
///
/// A copy that needs no transform comes first, then one that needs one that exists. Under [`Replicas::Spread`],
/// shards that few ranks hold choose before those that many hold, and the latter keep to classes that hold some of
/// the former: a norm that every rank has is no reason to meet another peer. Among those, the rank that was asked
/// least is read; `target` decides ties, differently for each target rank.
///
/// Cuts of one target parameter that lie in the same source parameters are read from one rank, so that they can be
/// read as one.
pub(super) fn choose<'a>(
    cuts: &[Cut<'a>],
    params: &[Range<usize>],
    source: &'a SourceLayout,
    rule: Replicas,
    target: u32,
) -> Vec<Chosen<'a>> {
    // Cuts that choose together become neighbours.
    let mut order: Vec<usize> = (0..cuts.len()).collect();
    let same_owners = |a: usize, b: usize| {
        let params = |cut: usize| cuts[cut].owners.iter().map(Owner::param);
        params(a).cmp(params(b))
    };
    let mut units = Vec::with_capacity(params.len());
    for of_param in params {
        let members = &mut order[of_param.clone()];
        members.sort_by(|&a, &b| same_owners(a, b));
        let mut first = of_param.start;
        for unit in members.chunk_by(|&a, &b| same_owners(a, b).is_eq()) {
            units.push(first..first + unit.len());
            first += unit.len();
        }
    }

    let mut loads = Loads::new(source.classes(), target);
    let mut chosen = vec![None; cuts.len()];
    if rule == Replicas::Spread {
        units.sort_by_key(|unit| cuts[order[unit.start]].copies());
    }
    for alike in
        units.chunk_by(|a, b| cuts[order[a.start]].copies() == cuts[order[b.start]].copies())
    {
        for unit in alike {
            let members = &order[unit.clone()];
            let cut = &cuts[members[0]];
            let place = match rule {
                Replicas::Lowest => best(cut.owners, |_, owner| needs(cut, owner)),
                Replicas::Spread => loads.least(cut.owners, |owner| needs(cut, owner)),
            };
            let elements: u64 = members.iter().map(|&member| cuts[member].elements()).sum();
            let owner = &cut.owners[place];
            let rank = match rule {
                Replicas::Lowest => source.classes()[owner.class as usize].ranks[0],
                Replicas::Spread => {
                    loads.ask(owner.class, elements.saturating_mul(owner.dtype.size()))
                }
            };
            for &member in members {
                chosen[member] = Some(Chosen { owner: &cuts[member].owners[place], rank });
            }
        }
        for unit in alike {
            for owner in cuts[order[unit.start]].owners {
                loads.meet(owner.class);
            }
        }
    }
    chosen.into_iter().flatten().collect()
}

/// How far a copy is from what the target stores: the same, to be transformed, of no use.
fn needs(cut: &Cut<'_>, owner: &Owner) -> u8 {
    match transform(owner, cut.target()) {
        Some(Transform::Copy) => 0,
        Some(_) => 1,
        None => 2,
    }
}

/// The place of the least key, the first of equals. There is at least one owner.
fn best<K: Ord>(owners: &[Owner], mut key: impl FnMut(usize, &Owner) -> K) -> usize {
    let mut best = (key(0, &owners[0]), 0);
    for (place, owner) in owners.iter().enumerate().skip(1) {
        best = best.min((key(place, owner), place));
    }
    best.1
}

/// What each rank was asked for so far.
struct Loads<'a> {
    classes: Vec<ClassLoad>,
    source: &'a [Class],
    turn: Turn,
}

#[derive(Default)]
struct ClassLoad {
    met: bool,
    /// Bytes and turn of every rank of the class, least first. Empty until the class is asked.
    ranks: BinaryHeap<Reverse<(u64, usize)>>,
}

impl<'a> Loads<'a> {
    fn new(source: &'a [Class], target: u32) -> Self {
        let classes = source.iter().map(|_| ClassLoad::default()).collect();
        Self { classes, source, turn: Turn::of(target) }
    }

    /// The owner with the rank that was asked least.
    fn least(&self, owners: &[Owner], needs: impl Fn(&Owner) -> u8) -> usize {
        best(owners, |place, owner| {
            let class = &self.classes[owner.class as usize];
            let asked = class.ranks.peek().map_or(0, |Reverse((bytes, _))| *bytes);
            (needs(owner), !class.met, asked, self.turn.when(place, owners.len()))
        })
    }

    /// Asks the rank of the class that was asked least for `bytes` more.
    fn ask(&mut self, class: u32, bytes: u64) -> u32 {
        let (load, ranks) = (&mut self.classes[class as usize], &self.source[class as usize].ranks);
        if load.ranks.is_empty() {
            load.ranks = (0..ranks.len()).map(|turn| Reverse((0, turn))).collect();
        }
        let Some(mut least) = load.ranks.peek_mut() else { return ranks[0] };
        least.0.0 = least.0.0.saturating_add(bytes);
        ranks[self.turn.place(least.0.1, ranks.len())]
    }

    fn meet(&mut self, class: u32) {
        self.classes[class as usize].met = true;
    }
}

/// Where a target rank begins to ask among equals, in 32-bit fixed point.
///
/// Its number is scrambled first (the finaliser of MurmurHash3): targets that want the same experts have numbers that
/// differ by the size of a parallel group, and would begin at the same copy wherever that divides into the copies.
struct Turn(u32);

impl Turn {
    fn of(target: u32) -> Self {
        let mut bits = target;
        bits = (bits ^ bits >> 16).wrapping_mul(0x85eb_ca6b);
        bits = (bits ^ bits >> 13).wrapping_mul(0xc2b2_ae35);
        Self(bits ^ bits >> 16)
    }

    fn begin(&self, places: usize) -> usize {
        // A fraction of the places: below them.
        let begin = (u128::from(self.0) * places as u128) >> 32;
        usize::try_from(begin).unwrap_or_default()
    }

    /// The place that has this turn.
    fn place(&self, turn: usize, places: usize) -> usize {
        (self.begin(places) + turn) % places
    }

    /// The turn that this place has.
    fn when(&self, place: usize, places: usize) -> usize {
        (place + places - self.begin(places)) % places
    }
}
