//! What every store must do.

use std::collections::BTreeMap;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use refit_service::rendezvous::{
    Created, Key, Life, MAX_TTL, MAX_VALUE_BYTES, MIN_TTL, Rendezvous, RendezvousError, Revision,
    Snapshot,
};
use rustix::process::Signal;

use super::place::Place;

/// No wait of these tests is longer: what takes so long on a busy machine has hung.
const LONG: Duration = Duration::from_secs(30);

/// How soon a change wakes whoever waits for it, on a machine that does other things as well.
const WAKE: Duration = Duration::from_secs(2);

fn key(path: &str) -> Key {
    Key::try_from(path.to_owned()).unwrap()
}

fn soon() -> Instant {
    Instant::now() + LONG
}

fn values(snapshot: &Snapshot) -> BTreeMap<&str, &[u8]> {
    snapshot.entries.iter().map(|(key, value)| (key.as_str(), value.as_slice())).collect()
}

/// Waits until what lies under a key is as wanted.
fn wait<R: Rendezvous>(store: &R, prefix: &str, wanted: impl Fn(&Snapshot) -> bool) -> Snapshot {
    let (prefix, deadline) = (key(prefix), soon());
    let mut snapshot = store.list(&prefix).unwrap();
    while !wanted(&snapshot) {
        let next = store.changed(&prefix, snapshot.revision, deadline).unwrap();
        snapshot = next.expect("nothing has changed in time");
    }
    snapshot
}

pub(crate) fn a_map<P: Place>(place: &P) {
    let (store, other) = (place.open(), place.open());
    assert_eq!(values(&store.list(&key("m")).unwrap()), BTreeMap::new());
    for (path, value) in [("m", "0"), ("m/a", "1"), ("m/a-b", "2"), ("m/a/b", "3"), ("mm", "4")] {
        store.put(&key(path), value.as_bytes(), Life::Kept).unwrap();
    }
    store.put(&key("m/empty"), b"", Life::Kept).unwrap();
    let all = other.list(&key("m")).unwrap();
    let expected: [(&str, &[u8]); 5] =
        [("m", b"0"), ("m/a", b"1"), ("m/a-b", b"2"), ("m/a/b", b"3"), ("m/empty", b"")];
    assert_eq!(values(&all), BTreeMap::from(expected));
    let some = other.list(&key("m/a")).unwrap();
    assert_eq!(values(&some), BTreeMap::from([("m/a", &b"1"[..]), ("m/a/b", b"3")]));

    other.put(&key("m/a"), b"new", Life::Kept).unwrap();
    let after = store.list(&key("m/a")).unwrap();
    assert!(after.revision > some.revision);
    assert_eq!(values(&after)["m/a"], b"new");
    store.remove(&key("m/a")).unwrap();
    store.remove(&key("m/a")).unwrap();
    assert_eq!(values(&other.list(&key("m/a")).unwrap()), BTreeMap::from([("m/a/b", &b"3"[..])]));

    assert_eq!(other.create(&key("m/a"), b"first", Life::Kept).unwrap(), Created::New);
    let again = store.create(&key("m/a"), b"second", Life::Kept).unwrap();
    assert_eq!(again, Created::Already(b"first".to_vec()));
    assert_eq!(values(&store.list(&key("m/a")).unwrap())["m/a"], b"first");
    assert!(after.refused.is_empty() && !store.store().is_empty());
}

/// Around every size at which some store does something else.
pub(crate) fn values_of_every_size<P: Place>(place: &P) {
    let (store, other) = (place.open(), place.open());
    let at = key("sizes/x");
    let around = |size: usize| [size - 1, size, size + 1];
    let sizes = [256, 16 << 10, 512 << 10, 2 << 20].into_iter().flat_map(around);
    // Small ones between, so that each replaces one of another kind.
    for size in sizes.flat_map(|size| [size, 0, 1]).chain([9 << 20]) {
        let value: Vec<u8> = (0..size).map(|n| u8::try_from(n % 251).unwrap()).collect();
        store.put(&at, &value, Life::Kept).unwrap();
        let found = other.list(&key("sizes")).unwrap();
        assert!(found.entries[&at] == value, "{size} bytes came back as others");
        let already = other.create(&at, &value, Life::Kept).unwrap();
        assert!(already == Created::Already(value), "{size} bytes");
    }
    store.remove(&at).unwrap();
    assert!(other.list(&at).unwrap().entries.is_empty());
    let large = vec![1; 3 << 20];
    assert_eq!(other.create(&at, &large, Life::Kept).unwrap(), Created::New);
    assert!(store.list(&at).unwrap().entries[&at] == large);

    let too_large = vec![0; MAX_VALUE_BYTES + 1];
    for error in [
        store.put(&at, &too_large, Life::Kept).unwrap_err(),
        store.create(&at, &too_large, Life::Kept).unwrap_err(),
    ] {
        let named = matches!(&error, RendezvousError::TooLarge { key, .. } if *key == at);
        assert!(named, "{error}");
    }
    assert!(store.list(&at).unwrap().entries[&at] == large, "it is as it was");
}

pub(crate) fn readers_see_the_old_or_the_new<P: Place>(place: &P) {
    let writer = place.open();
    let at = key("whole/x");
    let value = |n: u8| vec![n; usize::from(n) * 700 + 1];
    writer.put(&at, &value(0), Life::Kept).unwrap();
    let done = AtomicBool::new(false);
    let write = || {
        for n in 1..=150 {
            writer.put(&at, &value(n), Life::Kept).unwrap();
        }
        done.store(true, Ordering::Release);
    };
    let read = || {
        let store = place.open();
        let mut last = 0;
        while !done.load(Ordering::Acquire) {
            let seen = store.list(&key("whole")).unwrap();
            let seen = &seen.entries[&at];
            assert!(*seen == value(seen[0]), "neither the old nor the new");
            assert!(seen[0] >= last, "{} after {last}", seen[0]);
            last = seen[0];
        }
    };
    std::thread::scope(|scope| {
        let threads = [scope.spawn(write), scope.spawn(read), scope.spawn(read)];
        // One by one: how a scope waits is not seen by a sanitizer.
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
    assert_eq!(writer.list(&at).unwrap().entries[&at], value(150));
}

pub(crate) fn of_all_who_create_one_succeeds<P: Place>(place: &P) {
    const RACERS: usize = 6;
    const ROUNDS: usize = 25;
    let stores: Vec<P::Store> = (0..3).map(|_| place.open()).collect();
    let start = Barrier::new(RACERS);
    let mut won = vec![Vec::new(); ROUNDS];
    std::thread::scope(|scope| {
        let race = |racer: usize| {
            let (store, start) = (&stores[racer % stores.len()], &start);
            scope.spawn(move || {
                (0..ROUNDS)
                    .map(|round| {
                        // Some values are of the large kind.
                        let value = vec![
                            u8::try_from(racer).unwrap();
                            if round % 3 == 0 { 40_000 } else { 3 }
                        ];
                        let at = key(&format!("race/{round}"));
                        start.wait();
                        match store.create(&at, &value, Life::Kept).unwrap() {
                            Created::New => racer,
                            Created::Already(found) => {
                                assert!(found.iter().all(|byte| *byte == found[0]));
                                usize::from(found[0]) + RACERS
                            }
                        }
                    })
                    .collect::<Vec<_>>()
            })
        };
        let racers: Vec<_> = (0..RACERS).map(race).collect();
        for racer in racers {
            for (round, result) in racer.join().unwrap().into_iter().enumerate() {
                won[round].push(result);
            }
        }
    });
    for results in won {
        let winners: Vec<usize> = results.iter().copied().filter(|n| *n < RACERS).collect();
        assert_eq!(winners.len(), 1, "{results:?}");
        let others = results.iter().filter(|n| **n >= RACERS);
        assert!(others.into_iter().all(|n| n - RACERS == winners[0]), "{results:?}");
    }
}

pub(crate) fn entries_end_with_their_session<P: Place>(place: &P) {
    let (store, other) = (place.open(), place.open());
    for ttl in [Duration::ZERO, MIN_TTL / 2, MAX_TTL * 2] {
        let error = store.session(ttl).unwrap_err();
        assert!(matches!(error, RendezvousError::Ttl { .. }), "{error}");
    }
    let session = store.session(P::TTL).unwrap();
    let second = store.session(P::TTL).unwrap();
    for path in ["s/a", "s/b", "s/kept", "s/taken"] {
        store.put(&key(path), b"x", Life::Session(&session)).unwrap();
    }
    let large = vec![7; 1 << 20];
    store.put(&key("s/large"), &large, Life::Session(&session)).unwrap();
    // Who writes last says how long it stays.
    other.put(&key("s/kept"), b"k", Life::Kept).unwrap();
    store.put(&key("s/taken"), b"t", Life::Session(&second)).unwrap();
    let created = store.create(&key("s/c"), b"c", Life::Session(&session)).unwrap();
    assert_eq!(created, Created::New);

    // Longer than a silent one would last.
    let before = other.list(&key("s")).unwrap();
    assert_eq!(before.entries.len(), 6);
    std::thread::sleep(P::TTL * 2);
    assert_eq!(other.list(&key("s")).unwrap().entries, before.entries, "it is alive");

    let started = Instant::now();
    drop(session);
    let after = wait(&other, "s", |snapshot| snapshot.entries.len() == 2);
    assert!(started.elapsed() < WAKE, "{:?}", started.elapsed());
    assert_eq!(values(&after), BTreeMap::from([("s/kept", &b"k"[..]), ("s/taken", b"t")]));
    drop(second);
    assert_eq!(values(&wait(&other, "s", |now| now.entries.len() == 1)).len(), 1);
}

/// A session of a store that is none of ours keeps nothing.
pub(crate) fn sessions_belong_to_a_store<P: Place>(place: &P, elsewhere: &P) {
    let session = elsewhere.open().session(P::TTL).unwrap();
    let store = place.open();
    for error in [
        store.put(&key("f/a"), b"x", Life::Session(&session)).unwrap_err(),
        store.create(&key("f/a"), b"x", Life::Session(&session)).unwrap_err(),
    ] {
        assert!(matches!(error, RendezvousError::ForeignSession { .. }), "{error}");
    }
    assert!(store.list(&key("f")).unwrap().entries.is_empty());
}

pub(crate) fn the_killed_vanish<P: Place>(place: &P) {
    assert!(P::PROCESSES);
    let store = place.open();
    let mut peer = place.peer();
    peer.ask(&format!("begin {}", P::TTL.as_millis()));
    assert_eq!(peer.ask("hold k/a 1"), "done");
    peer.ask("put k/kept 2");
    let mine = store.session(P::TTL).unwrap();
    store.put(&key("k/mine"), b"3", Life::Session(&mine)).unwrap();
    assert_eq!(store.list(&key("k")).unwrap().entries.len(), 3);
    peer.signal(Signal::KILL);
    let started = Instant::now();
    let left = wait(&store, "k", |snapshot| snapshot.entries.len() == 2);
    assert!(started.elapsed() < P::TTL + WAKE, "{:?}", started.elapsed());
    assert_eq!(values(&left), BTreeMap::from([("k/kept", &b"2"[..]), ("k/mine", b"3")]));
}

/// One that is stopped is as good as dead, and hears of it when it goes on.
pub(crate) fn the_silent_vanish<P: Place>(place: &P) {
    assert!(P::PROCESSES);
    let store = place.open();
    let mut peer = place.peer();
    peer.ask(&format!("begin {}", P::TTL.as_millis()));
    assert_eq!(peer.ask("hold q/a 1"), "done");
    peer.signal(Signal::STOP);
    let started = Instant::now();
    wait(&store, "q", |snapshot| snapshot.entries.is_empty());
    assert!(started.elapsed() < P::TTL + WAKE, "{:?}", started.elapsed());
    peer.signal(Signal::CONT);
    assert_eq!(peer.ask("hold q/a 2"), "SessionEnded");
    assert!(store.list(&key("q")).unwrap().entries.is_empty());
    // It may begin again.
    peer.ask(&format!("begin {}", P::TTL.as_millis()));
    assert_eq!(peer.ask("hold q/a 3"), "done");
    assert_eq!(values(&store.list(&key("q")).unwrap())["q/a"], b"3");
    assert_eq!(peer.ask("end"), "done");
    wait(&store, "q", |snapshot| snapshot.entries.is_empty());
}

pub(crate) fn changes_wake<P: Place>(place: &P) {
    let store = place.open();
    let mut peer = place.peer();
    peer.ask("put w/x 0");
    let seen = store.list(&key("w")).unwrap();
    let started = Instant::now();
    let past = store.changed(&key("w"), seen.revision, started - Duration::from_millis(1));
    assert!(past.unwrap().is_none());
    let nothing = store.changed(&key("w"), seen.revision, started + Duration::from_millis(300));
    assert!(nothing.unwrap().is_none());
    let waited = started.elapsed();
    assert!(waited >= Duration::from_millis(300) && waited < WAKE, "{waited:?}");

    // What has changed already is not waited for.
    peer.ask("put w/x 1");
    let started = Instant::now();
    let seen = store.changed(&key("w"), seen.revision, soon()).unwrap().unwrap();
    assert_eq!(values(&seen)["w/x"], b"1");
    assert!(started.elapsed() < WAKE);
    let from_the_start = store.changed(&key("w"), Revision(0), soon()).unwrap().unwrap();
    assert_eq!(from_the_start.entries, seen.entries);

    // Each kind of change wakes, and one elsewhere does not.
    peer.ask("begin 5000");
    for line in ["put w/x 2", "create w/y 1", "hold w/z 1", "end"] {
        let before = store.list(&key("w")).unwrap();
        let after = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let after = store.changed(&key("w"), before.revision, soon()).unwrap();
                (after.expect("no change in time"), Instant::now())
            });
            std::thread::sleep(Duration::from_millis(60));
            peer.ask("put elsewhere/x 1");
            std::thread::sleep(Duration::from_millis(60));
            assert!(!waiting.is_finished(), "woken by what is elsewhere");
            let told = Instant::now();
            peer.ask(line);
            let (after, woken) = waiting.join().unwrap();
            let took = woken.saturating_duration_since(told);
            assert!(took < WAKE, "{line}: {took:?}");
            after
        });
        assert_ne!(after.entries, before.entries, "{line}");
        assert!(after.revision > before.revision, "{line}");
    }
    let before = store.list(&key("w")).unwrap();
    store.remove(&key("w/y")).unwrap();
    let after = store.changed(&key("w"), before.revision, soon()).unwrap().unwrap();
    assert!(!after.entries.contains_key(&key("w/y")));
}

/// Whoever waits from where it was ends at the last change, however they fall.
pub(crate) fn no_change_is_missed<P: Place>(place: &P) {
    const LAST: u64 = 400;
    let store = place.open();
    let mut peer = place.peer();
    peer.ask("put n/x 0");
    peer.tell(&format!("count n/x {LAST}"));
    let (mut last, mut revision) = (0, Revision(0));
    while last < LAST {
        let seen = store.changed(&key("n"), revision, soon()).unwrap().expect("a change is missed");
        assert!(seen.revision > revision);
        revision = seen.revision;
        let n: u64 = std::str::from_utf8(&seen.entries[&key("n/x")]).unwrap().parse().unwrap();
        assert!(n >= last, "{n} after {last}");
        last = n;
    }
    assert_eq!(peer.reply(), "done");
}

/// Of two who each write and then look, at least one sees the other: the fence stands on it.
pub(crate) fn who_writes_and_looks_is_seen_or_sees<P: Place>(place: &P) {
    let store = place.open();
    let mut peer = place.peer();
    for round in 0..1000_u32 {
        let (mine, theirs) = (key(&format!("d/{round}/a")), key(&format!("d/{round}/b")));
        peer.tell(&format!("meet {theirs} {mine}"));
        // The other has a way to go; now and then it is first.
        if round % 4 > 0 {
            std::thread::sleep(Duration::from_micros(u64::from(round % 16) * 20));
        }
        store.put(&mine, b"here", Life::Kept).unwrap();
        let met = !store.list(&theirs).unwrap().entries.is_empty();
        let other_met = peer.reply() == "met";
        assert!(met || other_met, "round {round}: neither saw the other");
        store.remove(&mine).unwrap();
        store.remove(&theirs).unwrap();
    }
}

/// Many processes at once, none of which loses a write.
pub(crate) fn no_write_is_lost<P: Place>(place: &P) {
    let store = place.open();
    let mut peers: Vec<_> = (0..4).map(|_| place.peer()).collect();
    for (n, peer) in peers.iter_mut().enumerate() {
        peer.tell(&format!("count l/{n} 60"));
    }
    for peer in &mut peers {
        assert_eq!(peer.reply(), "done");
    }
    let seen = store.list(&key("l")).unwrap();
    assert_eq!(seen.entries.len(), 4);
    assert!(seen.entries.values().all(|value| value == b"60"));
}
