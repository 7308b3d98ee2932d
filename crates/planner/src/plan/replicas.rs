//! Choosing among copies of a shard.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec;
use alloc::vec::Vec;

use super::Replicas;
use super::pieces::{Cut, transform};
use crate::source::Replica;
use crate::{SourceLayout, Transform};

/// The copy to read for each cut, in their order. `turn` rotates ties.
///
/// A copy that needs no transform comes first, then one that needs one that exists. Under [`Replicas::Spread`], shards that few ranks hold choose
/// before those that many hold, and the latter keep to ranks that hold some of the former: a norm that every rank has
/// is no reason to meet another peer. Among those, the rank that was asked least is read.
pub(super) fn choose(
    cuts: &[Cut<'_>],
    source: &SourceLayout,
    rule: Replicas,
    turn: u32,
) -> Vec<Replica> {
    let casts =
        |cut: &Cut<'_>, replica: &Replica| match transform(source.param_of(*replica), cut.target())
        {
            Some(Transform::Copy) => 0,
            Some(_) => 1,
            None => 2,
        };
    if rule == Replicas::Lowest {
        let lowest = |cut: &Cut<'_>| best(cut, |replica, _| casts(cut, replica));
        return cuts.iter().map(lowest).collect();
    }
    let mut order: Vec<usize> = (0..cuts.len()).collect();
    order.sort_by_key(|&index| cuts[index].replicas.len());

    let mut load = BTreeMap::<u32, u64>::new();
    let mut met = BTreeSet::<u32>::new();
    let mut chosen = vec![None; cuts.len()];
    for alike in order.chunk_by(|&a, &b| cuts[a].replicas.len() == cuts[b].replicas.len()) {
        for &index in alike {
            let cut = &cuts[index];
            let copies = cut.replicas.len();
            let replica = best(cut, |replica, place| {
                let rotated = (place + copies - turn as usize % copies) % copies;
                let asked = load.get(&replica.rank).copied().unwrap_or(0);
                (casts(cut, replica), !met.contains(&replica.rank), asked, rotated)
            });
            let bytes = cut.elements() * source.param_of(replica).dtype.size();
            let asked = load.entry(replica.rank).or_default();
            *asked = asked.saturating_add(bytes);
            chosen[index] = Some(replica);
        }
        for &index in alike {
            met.extend(cuts[index].replicas.iter().map(|replica| replica.rank));
        }
    }
    chosen.into_iter().flatten().collect()
}

/// The copy with the least key, the first of equals. A shard has at least one copy.
fn best<K: Ord>(cut: &Cut<'_>, key: impl Fn(&Replica, usize) -> K) -> Replica {
    let places = 1..cut.replicas.len();
    let first = (key(&cut.replicas[0], 0), 0);
    let (_, place) =
        places.map(|place| (key(&cut.replicas[place], place), place)).fold(first, Ord::min);
    cut.replicas[place]
}
