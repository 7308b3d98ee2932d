use std::sync::Barrier;
use std::time::Duration;

use refit::TargetOptions;
use refit_service::puller::Puller;
use refit_service::rank::{Direct, Unattended};
use refit_service::reader::Wanted;
use refit_service::relay::Relay;
use refit_service::rendezvous::InProcess;
use refit_service::source::{GroupRank, SourceOptions};
use refit_tests::ranks;

use super::fleet::{Fleet, Local, commit, fanout, is_whole, rows, soon, unique};

type InPlace = Direct<Local, Unattended>;

/// A target rank that offers what it has read.
fn relay(fleet: &Fleet, group: &str, rank: u32, size: u32) -> Relay<InProcess, InPlace> {
    let agent = fleet.agent(&format!("{group}-{rank}-{}", unique()));
    let (target, _, _) = ranks::target(&agent, &rows(rank, size), TargetOptions::default());
    let target = Direct::new(target, Unattended);
    let place = GroupRank { group: group.to_owned(), rank, ranks: size };
    Relay::join(fleet.seat(), place, target, SourceOptions::default(), soon()).unwrap()
}

fn whole(relay: &Relay<InProcess, InPlace>, version: u64) -> bool {
    is_whole(relay.target().unwrap(), version)
}

/// One trainer, seven engines, one reader of a group at a time: the trainer is read by a few of them, not by all.
#[test]
fn a_fleet_fills_as_a_tree() {
    const ENGINES: usize = 7;
    // Slow enough for the reads to take most of the time.
    let fleet = Fleet::new().slow(1);
    let mut trainer = fleet.group("trainer", 1, SourceOptions::default());
    let start = Barrier::new(ENGINES + 1);
    let from: Vec<Vec<String>> = std::thread::scope(|scope| {
        let engines: Vec<_> = (0..ENGINES)
            .map(|number| {
                let (fleet, start) = (&fleet, &start);
                scope.spawn(move || {
                    let group = format!("engine-{number}");
                    let mut relay = relay(fleet, &group, 0, 1);
                    let mut reader = fleet.reader(&group, fanout(1));
                    let mut from = Vec::new();
                    for version in [1, 2, 3] {
                        start.wait();
                        let wanted = Wanted::at_least(version).but_not_from(&group);
                        let refreshed = reader.refresh(&mut relay, &wanted, soon()).unwrap();
                        assert_eq!(refreshed.version, version);
                        assert!(whole(&relay, version));
                        assert_eq!(relay.offered(), Some(version));
                        from.push(refreshed.group);
                        start.wait();
                    }
                    from
                })
            })
            .collect();
        for version in [1, 2, 3] {
            commit(&mut trainer, version);
            start.wait();
            start.wait();
        }
        engines.into_iter().map(|engine| engine.join().unwrap()).collect()
    });
    for version in 0..3 {
        let reads = from.iter().filter(|from| from[version] == "trainer").count();
        // Where all reads take as long, 1, 2 and 4 engines are filled in turns, and the trainer is read three times.
        assert!((1..=4).contains(&reads), "{reads} of {ENGINES} read the trainer: {from:?}");
    }
}

/// Nor is its own group named among those that offer nothing.
#[test]
fn what_a_relay_does_not_offer_itself_is_no_reason() {
    let fleet = Fleet::new();
    let mut relay = relay(&fleet, "engine", 0, 1);
    let others = Wanted::default().but_not_from("engine");
    let mut reader = fleet.reader("e", fanout(1));
    let failed = reader.refresh(&mut relay, &others, super::fleet::millis(50)).unwrap_err();
    assert!(
        failed.withheld.is_empty() && failed.to_string().contains("no group offers one"),
        "{failed}"
    );
}

/// A relay of two ranks offers a version when both have it, and withdraws it before it overwrites a byte.
#[test]
fn a_relay_is_a_group_like_any_other() {
    let fleet = Fleet::new();
    let mut trainer = fleet.group("trainer", 2, SourceOptions::default());
    commit(&mut trainer, 1);
    let mut relays = [relay(&fleet, "engine", 0, 2), relay(&fleet, "engine", 1, 2)];
    let mut readers = [fleet.reader("e0", fanout(8)), fleet.reader("e1", fanout(8))];
    let others = Wanted::default().but_not_from("engine");
    let only = Wanted::default().but_not_from("trainer");
    readers[0].refresh(&mut relays[0], &others, soon()).unwrap();
    assert!(readers[0].wait_for(&only, super::fleet::millis(20)).unwrap().is_none());
    readers[1].refresh(&mut relays[1], &others, soon()).unwrap();
    assert_eq!(readers[0].wait_for(&only, soon()).unwrap().unwrap().version, 1);
    // The trainer goes; the version stays.
    for source in trainer {
        source.leave(soon()).unwrap();
    }
    let mut late = fleet.direct(0, 1);
    let mut reader = fleet.reader("late", fanout(8));
    assert_eq!(reader.refresh(&mut late, &Wanted::at_least(1), soon()).unwrap().group, "engine");
    assert!(is_whole(&late, 1));
    // Making ready to pull closes it.
    relays[0].make_ready("trainer", soon()).unwrap();
    assert_eq!(relays[0].offered(), None);
    assert!(reader.wait_for(&Wanted::default(), super::fleet::millis(20)).unwrap().is_none());
}

/// Readers of a relay are as safe as those of a trainer: everybody reads, overwrites and is read.
#[test]
fn relays_that_read_each_other_never_hold_a_mix() {
    let fleet = Fleet::new().slow(256);
    let mut trainer = fleet.group("trainer", 1, SourceOptions::default());
    commit(&mut trainer, 1);
    std::thread::scope(|scope| {
        let engines: Vec<_> = (0..4)
            .map(|number| {
                let fleet = &fleet;
                scope.spawn(move || {
                    let group = format!("engine-{number}");
                    let mut relay = relay(fleet, &group, 0, 1);
                    let mut reader = fleet.reader(&group, fanout(1));
                    let mut last = 0;
                    while last < 60 {
                        let wanted = Wanted::at_least(last + 1).but_not_from(&group);
                        last = reader.refresh(&mut relay, &wanted, soon()).unwrap().version;
                        assert!(whole(&relay, last), "version {last}");
                    }
                })
            })
            .collect();
        for version in 2..=60 {
            commit(&mut trainer, version);
            std::thread::sleep(Duration::from_millis(1));
        }
        engines.into_iter().for_each(|engine| engine.join().unwrap());
    });
}
