//! What there is to read: complete, consistent sets of ranks, or nothing.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use proptest::prelude::*;
use refit_service::groups::{Census, Withheld, census};
use refit_service::keys::Model;
use refit_service::message::{Announcement, Member, Message, Offering};
use refit_service::reader::{Load, Wanted, choose};
use refit_service::rendezvous::{Key, Revision, Snapshot};

fn model() -> Model {
    Model::new(Key::new(["job", "qwen3"]).unwrap())
}

/// The entries of groups, as honest ranks write them.
#[derive(Clone, Debug, Default)]
struct Store(BTreeMap<Key, Vec<u8>>);

fn incarnation(group: &str, rank: u32) -> u128 {
    u128::from(rank) << 64 | u128::from(group.len() as u64)
}

impl Store {
    fn member(&mut self, group: &str, rank: u32, member: Member) -> &mut Self {
        self.0.insert(model().member(group, rank).unwrap(), member.encode());
        self
    }

    fn version(&mut self, group: &str, rank: u32, announcement: Announcement) -> &mut Self {
        self.0.insert(model().version(group, rank).unwrap(), announcement.encode());
        self
    }

    fn group(&mut self, group: &str, ranks: u32, version: u64) -> &mut Self {
        for rank in 0..ranks {
            let incarnation = incarnation(group, rank);
            self.member(
                group,
                rank,
                Member { rank, ranks, incarnation, relay: false, publication: [0; 32] },
            );
            let epoch = version * 2;
            let offering = Offering::Open;
            self.version(group, rank, Announcement { incarnation, version, epoch, offering });
        }
        self
    }

    fn census(&self) -> Census {
        let snapshot =
            Snapshot { revision: Revision(1), entries: self.0.clone(), ..Snapshot::default() };
        census(&model(), &snapshot).unwrap()
    }

    fn withheld(&self, group: &str) -> Withheld {
        let census = self.census();
        assert!(!census.offers.contains_key(group));
        census.withheld[group].clone()
    }
}

#[test]
fn a_whole_group_is_offered_and_its_neighbours_do_not_matter() {
    let mut store = Store::default();
    store.group("dp0", 3, 5).group("dp1", 1, 6);
    store.0.insert(Key::new(["job", "other", "group", "dp0", "member", "7"]).unwrap(), vec![1]);
    store.0.insert(model().reader("dp0", "r.1").unwrap(), vec![2]);
    let census = store.census();
    assert_eq!(census.withheld, BTreeMap::new());
    assert_eq!(census.offers.len(), 2);
    let offer = &census.offers["dp0"];
    assert_eq!((offer.version, offer.ranks.len()), (5, 3));
    assert_eq!(offer.ranks[2].member.incarnation, incarnation("dp0", 2));
    assert_eq!(census.leases["dp0"].len(), 1);
}

#[test]
fn whatever_is_wrong_has_a_name() {
    let whole = || {
        let mut store = Store::default();
        store.group("g", 3, 5);
        store
    };
    let member = |rank| Member {
        rank,
        ranks: 3,
        incarnation: incarnation("g", rank),
        relay: false,
        publication: [0; 32],
    };
    let open = |rank| Announcement {
        incarnation: incarnation("g", rank),
        version: 5,
        epoch: 10,
        offering: Offering::Open,
    };

    let mut store = whole();
    store.0.remove(&model().member("g", 1).unwrap());
    assert_eq!(store.withheld("g"), Withheld::Incomplete { ranks: 3, missing: vec![1] });

    let mut store = whole();
    store.0.remove(&model().version("g", 2).unwrap());
    assert_eq!(store.withheld("g"), Withheld::Unannounced { rank: 2 });

    let mut store = whole();
    store.version("g", 1, Announcement { offering: Offering::Closed, ..open(1) });
    assert_eq!(store.withheld("g"), Withheld::Closed { rank: 1, version: 5 });

    let mut store = whole();
    store.version("g", 1, Announcement { version: 6, ..open(1) });
    assert_eq!(store.withheld("g"), Withheld::Mixed { rank: 1, version: 6, first: 5 });

    // P7: what an earlier life announced is not taken for this one's.
    let mut store = whole();
    store.version("g", 1, Announcement { incarnation: 99, ..open(1) });
    let stale = Withheld::StaleIncarnation { rank: 1, member: incarnation("g", 1), announced: 99 };
    assert_eq!(store.withheld("g"), stale);

    let mut store = whole();
    store.member("g", 2, Member { incarnation: incarnation("g", 0), ..member(2) });
    assert_eq!(store.withheld("g"), Withheld::SameIncarnation { first: 0, second: 2 });

    let mut store = whole();
    store.member("g", 1, Member { ranks: 2, ..member(1) });
    assert_eq!(store.withheld("g"), Withheld::Ranks { rank: 1, says: 2, other: 0, other_says: 3 });

    let mut store = whole();
    store.member("g", 1, member(0));
    let key = model().member("g", 1).unwrap();
    assert_eq!(store.withheld("g"), Withheld::Misplaced { key, rank: 0 });

    let mut store = whole();
    store.member("g", 3, Member { ranks: 4, ..member(3) });
    assert_eq!(store.withheld("g"), Withheld::Ranks { rank: 3, says: 4, other: 0, other_says: 3 });

    let mut store = whole();
    store.version("g", 3, open(3));
    let key = model().version("g", 3).unwrap();
    assert_eq!(store.withheld("g"), Withheld::Stray { key });

    for stray in [["member", "01"].as_slice(), &["member", "x"], &["note"], &["version", "0", "x"]]
    {
        let mut store = whole();
        let key =
            Key::new(model().group("g").unwrap().parts().chain(stray.iter().copied())).unwrap();
        store.0.insert(key.clone(), open(0).encode());
        assert_eq!(store.withheld("g"), Withheld::Stray { key });
    }

    for key in [model().member("g", 0).unwrap(), model().version("g", 0).unwrap()] {
        let mut store = whole();
        store.0.insert(key.clone(), b"garbage".to_vec());
        assert!(
            matches!(store.withheld("g"), Withheld::Unreadable { key: found, .. } if found == key)
        );
    }

    let mut store = Store::default();
    store.0.insert(model().reader("g", "r").unwrap(), Vec::new());
    assert_eq!(store.withheld("g"), Withheld::Empty);
    store.version("g", 0, open(0));
    let key = model().version("g", 0).unwrap();
    assert_eq!(store.withheld("g"), Withheld::Stray { key });
}

/// The plain reading of what an offer is, entry by entry.
fn oracle(store: &Store, group: &str) -> Option<u64> {
    let prefix = model().group(group).unwrap();
    let entries: Vec<_> = store.0.iter().filter(|(key, _)| key.is_under(&prefix)).collect();
    let read = |kind: &str| -> Option<BTreeMap<u32, &Vec<u8>>> {
        let of_kind = |key: &Key| key.parts().nth(4) == Some(kind);
        entries
            .iter()
            .filter(|(key, _)| of_kind(key))
            .map(|(key, value)| Some((key.parts().nth(5)?.parse().ok()?, *value)))
            .collect()
    };
    let (members, versions) = (read("member")?, read("version")?);
    if members.len() + versions.len() != entries.len() || members.is_empty() {
        return None;
    }
    let mut seen = Vec::new();
    for (rank, value) in &members {
        let member = Member::decode(value).ok()?;
        let announced = Announcement::decode(versions.get(rank)?).ok()?;
        let honest = member.rank == *rank && member.ranks as usize == members.len();
        let same = announced.incarnation == member.incarnation;
        if !honest || !same || announced.offering != Offering::Open {
            return None;
        }
        seen.push((member.incarnation, announced.version));
    }
    let version = seen[0].1;
    let alike = seen.iter().all(|(_, other)| *other == version);
    let mut lives: Vec<u128> = seen.iter().map(|(life, _)| *life).collect();
    lives.sort_unstable();
    lives.dedup();
    (alike && lives.len() == members.len() && versions.len() == members.len()).then_some(version)
}

/// What may be done to a store.
#[derive(Clone, Debug)]
enum Change {
    Remove { entry: usize },
    Copy { from: usize, into: usize },
    Flip { entry: usize, byte: usize, bit: u8 },
    Announce { rank: u32, version: u64, life: u32, open: bool },
    Join { rank: u32, says: u32, ranks: u32, life: u32 },
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        (0..9_usize).prop_map(|entry| Change::Remove { entry }),
        (0..9_usize, 0..9_usize).prop_map(|(from, into)| Change::Copy { from, into }),
        (0..9_usize, 0..60_usize, 0..8_u8).prop_map(|(entry, byte, bit)| Change::Flip {
            entry,
            byte,
            bit
        }),
        (0..4_u32, 5..7_u64, 0..4_u32, prop::bool::weighted(0.8))
            .prop_map(|(rank, version, life, open)| Change::Announce { rank, version, life, open }),
        (0..4_u32, 0..4_u32, 1..5_u32, 0..4_u32)
            .prop_map(|(rank, says, ranks, life)| Change::Join { rank, says, ranks, life }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    /// Every rank of one version, or none, whatever the entries are.
    #[test]
    fn a_group_is_offered_whole_or_not_at_all(
        ranks in 1..4_u32,
        changes in prop::collection::vec(change(), 0..6),
    ) {
        let mut store = Store::default();
        store.group("g", ranks, 5);
        for change in changes {
            let keys: Vec<Key> = store.0.keys().cloned().collect();
            let at = |entry: usize| keys[entry % keys.len()].clone();
            match change {
                _ if keys.is_empty() => break,
                Change::Remove { entry } => drop(store.0.remove(&at(entry))),
                Change::Copy { from, into } => {
                    let value = store.0[&at(from)].clone();
                    store.0.insert(at(into), value);
                }
                Change::Flip { entry, byte, bit } => {
                    let value = store.0.get_mut(&at(entry)).unwrap();
                    let byte = byte % value.len();
                    value[byte] ^= 1 << bit;
                }
                Change::Announce { rank, version, life, open } => {
                    let incarnation = incarnation("g", life);
                    let offering = if open { Offering::Open } else { Offering::Closed };
                    store.version("g", rank, Announcement { incarnation, version, epoch: 10, offering });
                }
                Change::Join { rank, says, ranks, life } => {
                    let incarnation = incarnation("g", life);
                    store.member("g", rank, Member { rank: says, ranks, incarnation, relay: false, publication: [0; 32] });
                }
            }
        }
        let census = store.census();
        let offer = census.offers.get("g");
        prop_assert_eq!(offer.map(|offer| offer.version), oracle(&store, "g"));
        prop_assert!(offer.is_some() != census.withheld.contains_key("g") || store.0.is_empty());
        if let Some(offer) = offer {
            for (rank, offered) in offer.ranks.iter().enumerate() {
                prop_assert_eq!(offered.member.rank as usize, rank);
                prop_assert_eq!(offered.member.ranks as usize, offer.ranks.len());
            }
        }
    }
}

#[test]
fn the_least_read_group_of_the_newest_version_is_taken() {
    let mut store = Store::default();
    store.group("a", 1, 5).group("b", 2, 6).group("c", 1, 6).group("d", 1, 4);
    let census = store.census();
    let none = BTreeMap::new();
    let most = NonZeroU32::new(3).unwrap();
    let take = |wanted: &Wanted, readers: &[(&str, usize)]| {
        let readers = readers.iter().map(|(group, many)| ((*group).to_owned(), *many)).collect();
        let load = Load { readers: &readers, most };
        choose(&census, wanted, &none, Some(load), "me").map(|offer| offer.group.clone())
    };
    let five = Wanted::at_least(5);
    assert_eq!(take(&five, &[("b", 1), ("c", 2)]).unwrap(), "b");
    assert_eq!(take(&five, &[("b", 2), ("c", 1)]).unwrap(), "c");
    // Full groups are left alone, for an older version that will do as well.
    assert_eq!(take(&five, &[("b", 3), ("c", 3)]).unwrap(), "a");
    assert_eq!(take(&Wanted::at_least(6), &[("b", 3), ("c", 3)]), None);
    assert_eq!(take(&Wanted::at_least(7), &[]), None);
    assert_eq!(take(&Wanted { prefer: Some(5), ..five.clone() }, &[("a", 2)]).unwrap(), "a");
    // One version and no other: not a newer one, and none where nobody holds it any more.
    assert_eq!(take(&Wanted::exactly(4), &[]).unwrap(), "d");
    assert_eq!(take(&Wanted::exactly(5), &[]).unwrap(), "a");
    assert_eq!(take(&Wanted::exactly(3), &[]), None);
    let not_b = five.but_not_from("b");
    assert_eq!(take(&not_b, &[("c", 2)]).unwrap(), "c");
}

/// Readers of different names spread over groups that are alike, and every one keeps to its choice.
#[test]
fn readers_spread() {
    let mut store = Store::default();
    store.group("aa", 1, 5).group("b", 1, 5).group("ccc", 1, 5).group("dddd", 1, 5);
    let census = store.census();
    let none = BTreeMap::new();
    let mut taken: BTreeMap<String, u32> = BTreeMap::new();
    for reader in 0..400 {
        let name = format!("engine-{reader}");
        let wanted = Wanted::default();
        let first = choose(&census, &wanted, &none, None, &name).unwrap();
        assert_eq!(choose(&census, &wanted, &none, None, &name).unwrap(), first);
        *taken.entry(first.group.clone()).or_default() += 1;
    }
    assert_eq!(taken.len(), 4);
    assert!(taken.values().all(|many| (60..140).contains(many)), "{taken:?}");
}
