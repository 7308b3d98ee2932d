//! Versions: what a target installs is one version of every source, or it installs nothing and says why.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::Config;
use refit::planner::{Band, Dtype, LayoutBuilder, LowerOptions, Mode, Param, RankLayout};
use refit::pool::{Allocator, HostAllocator, Memory};
use refit::transport::local::{LocalOptions, LocalTransport, Network};
use refit::transport::{Progress, Transport};
use refit::{
    Cancelled, Expected, Failed, HEADER_BYTES, Header, Place, Publication, PublishedHeader,
    PublishedRegion, Pulled, RefitError, Source, Stamp, Target, TargetOptions, Unfinished,
};
use refit_tests::oracle::{self, Buffers};
use refit_tests::{models, ranks};

type Local = LocalTransport;

fn in_mode(mode: Mode) -> TargetOptions {
    TargetOptions::default().with_lower(LowerOptions::default().with_mode(mode))
}

/// Rows of one tensor, one share for each rank.
fn rows(rank: u32, ranks: u64) -> RankLayout {
    const ROWS: u64 = 60;
    let mut layout = LayoutBuilder::new(rank);
    let tensor = layout.tensor("w", ROWS, 32).unwrap();
    let share = ROWS / ranks;
    let own = u64::from(rank) * share..(u64::from(rank) + 1) * share;
    let band = Band::new(tensor, own, 0..32);
    layout.param(Param::new("w", Dtype::Bf16, share, 32).band(band)).unwrap();
    layout.build()
}

/// A trainer of so many ranks, and an engine whose every poll moves so many bytes.
struct World {
    sources: Vec<Source<Local>>,
    published: Vec<Publication>,
    engine: Arc<Local>,
}

impl World {
    fn new(ranks: u32, bytes_per_poll: u64) -> Self {
        let network = Network::new();
        let trainer = ranks::agent(&network, "trainer");
        let sources: Vec<_> =
            (0..ranks).map(|rank| ranks::source(&trainer, &rows(rank, u64::from(ranks)))).collect();
        let published = sources.iter().map(|source| source.publication().unwrap()).collect();
        let options = LocalOptions::default().with_bytes_per_poll(bytes_per_poll);
        let engine = LocalTransport::with_options(&network, "engine", options).unwrap();
        Self { sources, published, engine: Arc::new(engine) }
    }

    fn target(&self, mode: Mode) -> Target<Local> {
        ranks::target(&self.engine, &rows(0, 1), in_mode(mode)).0
    }

    fn offered(&self) -> Vec<Expected> {
        self.sources.iter().map(|source| source.offered().unwrap()).collect()
    }

    /// Writes what the version of this number is, and commits it.
    fn commit(&mut self, version: u64) {
        self.sources.iter_mut().for_each(|source| commit(source, version));
    }
}

/// Every byte of a version.
fn byte(version: u64) -> u8 {
    u8::try_from(version * 37 % 251).unwrap()
}

fn commit(source: &mut Source<Local>, version: u64) {
    let mut updating = source.begin_update().unwrap();
    for (_, memory) in updating.params_mut() {
        memory.host_bytes_mut().unwrap().fill(byte(version));
    }
    updating.commit(version).unwrap();
}

fn bytes_of(target: &Target<Local>) -> Vec<u8> {
    ranks::held(target).into_values().flatten().collect()
}

fn install<T: Transport>(pulled: Pulled<T>) -> (Target<T>, refit::Report) {
    pulled.land().unwrap().install().refreshed()
}

#[test]
fn a_version_is_what_was_committed_and_no_epoch_comes_twice() {
    let mut world = World::new(1, 1 << 20);
    let source = &mut world.sources[0];
    let mut seen = vec![source.header().stamp];
    for version in [7, 8, 8, 3] {
        let odd = {
            let updating = source.begin_update().unwrap();
            drop(updating);
            assert_eq!(source.offered(), None, "an update that was dropped is under way");
            source.header().stamp
        };
        assert!(!odd.is_stable() && odd.version == seen.last().unwrap().version);
        // The same update goes on.
        let offered = source.begin_update().unwrap().commit(version).unwrap();
        assert_eq!(Some(offered), source.offered());
        assert_eq!((offered.version, offered.incarnation), (version, source.header().incarnation));
        seen.extend([odd, offered.stamp()]);
    }
    assert!(seen.windows(2).all(|pair| pair[0].epoch < pair[1].epoch), "{seen:?}");
    assert_eq!(world.published[0].header().incarnation, source.header().incarnation);
    // A version is not in the publication.
    assert_eq!(source.publication().unwrap().digest(), world.published[0].digest());
    let other = World::new(1, 1);
    assert_ne!(other.sources[0].header().incarnation, source.header().incarnation);
}

#[test]
fn a_new_version_is_read_by_the_reads_of_the_last() {
    let mut world = World::new(2, 1 << 20);
    let mut target = world.target(Mode::Direct);
    for version in 1..6 {
        world.commit(version);
        let prepared = target.prepare(&world.published).unwrap();
        let announced = version % 2 == 0;
        let prepared =
            if announced { prepared.expecting(&world.offered()).unwrap() } else { prepared };
        let (next, report) = install(prepared.pull().unwrap().wait(ranks::soon()).unwrap());
        target = next;
        assert!(bytes_of(&target).iter().all(|held| *held == byte(version)));
        assert_eq!(report.version, Some(version));
        assert_eq!(report.headers, if announced { 2 } else { 4 });
        assert_eq!(report.reads, 2, "headers are counted apart");
        let built = (report.plans, report.allocations, report.registrations, report.prepared_reads);
        assert_eq!(built == (0, 0, 0, 0), version > 1, "{built:?}");
    }
}

/// A failed refit of a target that was whole, in this mode.
fn refused(failed: Failed<Unfinished<Local>>, mode: Mode, before: &[u8]) -> RefitError {
    match (failed.state, mode) {
        (Unfinished::Invalid(_), Mode::Direct) => {}
        (Unfinished::Whole(target), Mode::Staged) => assert_eq!(bytes_of(&target), before),
        (state, _) => panic!("{mode:?} left {state:?}"),
    }
    failed.error
}

#[test]
fn a_change_during_a_pull_is_torn_wherever_it_falls() {
    for mode in [Mode::Direct, Mode::Staged] {
        for announced in [false, true] {
            for polls in 0..12 {
                let mut world = World::new(2, 700);
                world.commit(1);
                let target = world.target(mode);
                let before = bytes_of(&target);
                let mut prepared = target.prepare(&world.published).unwrap();
                if announced {
                    prepared = prepared.expecting(&world.offered()).unwrap();
                }
                let mut pulling = prepared.pull().unwrap();
                let mut done = false;
                for _ in 0..polls {
                    done |= pulling.poll() != Progress::Pending;
                }
                let old = world.sources[1].header().stamp;
                // Half of the time only begun.
                drop(world.sources[1].begin_update().unwrap());
                if polls % 2 == 0 {
                    commit(&mut world.sources[1], 2);
                }
                let found = world.sources[1].header().stamp;
                let unseen = !announced && polls == 0;
                match pulling.wait(ranks::soon()) {
                    Ok(pulled) => {
                        // Nobody had looked, or everything had been read.
                        assert!(done, "{mode:?}, announced {announced}, {polls} polls");
                        let (target, report) = install(pulled);
                        assert!(bytes_of(&target).iter().all(|held| *held == byte(1)));
                        assert_eq!(report.version, Some(1));
                    }
                    Err(failed)
                        if unseen || matches!(failed.error, RefitError::MixedVersions { .. }) =>
                    {
                        // One rank is at another version from the first look on: nothing was touched.
                        let Unfinished::Whole(target) = failed.state else { panic!("whole") };
                        assert_eq!(bytes_of(&target), before);
                        assert!(!announced);
                    }
                    Err(failed) => {
                        let early =
                            matches!(failed.state, Unfinished::Whole(_)) && mode == Mode::Direct;
                        let (wanted, error) = if early {
                            (None, failed.error)
                        } else {
                            let error = refused(failed, mode, &before);
                            (Some(old), error)
                        };
                        let RefitError::Torn { rank: 1, expected, found: seen } = error else {
                            panic!("{error}")
                        };
                        assert!(seen == found && (expected == wanted || expected.is_none()));
                        assert!(!announced || expected == Some(old));
                    }
                }
            }
        }
    }
}

#[test]
fn what_was_announced_has_to_be_what_is_there() {
    type Is = fn(&RefitError) -> bool;
    for mode in [Mode::Direct, Mode::Staged] {
        let mut world = World::new(2, 1 << 20);
        world.commit(5);
        let offered = world.offered();
        let mut target = world.target(mode);
        let before = bytes_of(&target);
        // What can be seen without reading.
        let other = Expected { incarnation: offered[1].incarnation ^ 1, ..offered[1] };
        let newer = Expected { version: 6, ..offered[1] };
        let cases: [(&[Expected], Is); 4] = [
            (&offered[..1], |error| matches!(error, RefitError::NotExpected { rank: 1, times: 0 })),
            (&[offered[0], offered[1], offered[1]], |error| {
                matches!(error, RefitError::NotExpected { rank: 1, times: 2 })
            }),
            (
                &[offered[0], other],
                |error| matches!(error, RefitError::StaleIncarnation { rank: 1, expected, found } if expected != found),
            ),
            (&[offered[0], newer], |error| {
                matches!(
                    error,
                    RefitError::MixedVersions { rank: 1, version: 6, other: 0, other_version: 5 }
                )
            }),
        ];
        for (expected, is) in cases {
            let failed = target.prepare(&world.published).unwrap().expecting(expected).unwrap_err();
            assert!(is(&failed.error), "{}", failed.error);
            let Cancelled::Whole(whole) = failed.state.cancel() else { panic!("nothing moved") };
            target = whole;
        }
        // What only the header says.
        let late: Vec<Expected> = offered
            .iter()
            .map(|offered| Expected { epoch: offered.epoch + 2, ..*offered })
            .collect();
        let pulling = target.prepare(&world.published).unwrap().expecting(&late).unwrap().pull();
        let failed = pulling.unwrap().wait(ranks::soon()).unwrap_err();
        let error = refused(failed, mode, &before);
        let RefitError::Torn { rank: 0, expected: Some(expected), found } = error else {
            panic!("{error}")
        };
        assert_eq!((expected, found), (late[0].stamp(), offered[0].stamp()));
    }
}

#[test]
fn ranks_of_several_versions_are_not_read_together() {
    let mut world = World::new(3, 1 << 20);
    world.commit(1);
    commit(&mut world.sources[2], 2);
    let target = world.target(Mode::Direct);
    let before = bytes_of(&target);
    let pulling = target.prepare(&world.published).unwrap().pull().unwrap();
    let failed = pulling.wait(ranks::soon()).unwrap_err();
    let mixed = RefitError::MixedVersions { rank: 2, version: 2, other: 0, other_version: 1 };
    assert_eq!(failed.error.to_string(), mixed.to_string());
    let Unfinished::Whole(target) = failed.state else { panic!("no data was read") };
    assert_eq!(bytes_of(&target), before);
}

/// Another source, or nobody's, memory where an old publication says that a source is.
#[test]
fn a_restarted_source_is_not_read_as_the_old_one() {
    let network = Network::new();
    let engine = ranks::agent(&network, "engine");
    let layout = rows(0, 1);
    let old = 7_u128 << 100;
    let forged = Header { incarnation: old ^ 1, stamp: Stamp::default() };
    for (bytes, name) in [(forged.encode(), "restarted"), ([0x5a; 64], "gone")] {
        let (params, _) = ranks::memory(&layout);
        let mut memory = HostAllocator.allocate(HEADER_BYTES).unwrap();
        memory.host_bytes_mut().unwrap().copy_from_slice(&bytes);
        let params: Vec<_> = params.into_iter().map(|(_, memory)| memory).collect();
        let agent = ranks::agent(&network, name);
        let held: Vec<_> = params
            .iter()
            .chain([&memory])
            .map(|memory| agent.register(memory.allocation()).unwrap())
            .collect();
        let of = |memory: &Memory| Place::new(memory.address(), memory.kind());
        let region = |memory: &Memory| PublishedRegion {
            address: memory.allocation().address(),
            len: memory.allocation().len(),
            cuda: None,
        };
        let header = PublishedHeader { incarnation: old, place: of(&memory) };
        let published = Publication::new(
            name.to_owned(),
            agent.metadata().unwrap(),
            layout.clone(),
            header,
            params.iter().map(of).collect(),
            params.iter().chain([&memory]).map(region).collect(),
        )
        .unwrap();
        let (target, _, _) = ranks::target(&engine, &layout, TargetOptions::default());
        let pulling = target.prepare(&[published]).unwrap().pull().unwrap();
        let failed = pulling.wait(ranks::soon()).unwrap_err();
        match (name, &failed.error) {
            ("restarted", RefitError::StaleIncarnation { rank: 0, expected, found }) => {
                assert_eq!((u128::from(*expected), u128::from(*found)), (old, old ^ 1));
            }
            ("gone", RefitError::NoHeader { rank: 0 }) => {}
            (name, error) => panic!("{name}: {error}"),
        }
        assert!(matches!(failed.state, Unfinished::Whole(_)));
        drop(held);
    }
}

/// The steps of a trainer and of engines, in any order.
#[derive(Clone, Copy, Debug)]
enum Step {
    Begin(usize),
    Write(usize),
    Commit(usize),
    Poll,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..2_usize).prop_map(Step::Begin),
        (0..2_usize).prop_map(Step::Write),
        (0..2_usize).prop_map(Step::Commit),
        Just(Step::Poll),
        Just(Step::Poll),
        Just(Step::Poll),
    ];
    proptest::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(Config { failure_persistence: None, ..Config::with_cases(300) })]

    /// Whatever a trainer does while it is read: what is installed is one version, whole, or there is an error with a name.
    #[test]
    fn nothing_torn_is_installed(steps in steps(), staged: bool, announced: bool, bytes in 100_u64..3_000) {
        let mode = if staged { Mode::Staged } else { Mode::Direct };
        let mut world = World::new(2, bytes);
        world.commit(1);
        let target = world.target(mode);
        let before = bytes_of(&target);
        let prepared = target.prepare(&world.published).unwrap();
        let prepared =
            if announced { prepared.expecting(&world.offered()).unwrap() } else { prepared };
        let mut pulling = prepared.pull().unwrap();
        let mut next = [2_u64, 2];
        let mut writing = [false, false];
        for step in steps {
            match step {
                Step::Begin(rank) => {
                    drop(world.sources[rank].begin_update().unwrap());
                    writing[rank] = true;
                }
                Step::Write(rank) if writing[rank] => {
                    let mut updating = world.sources[rank].begin_update().unwrap();
                    let half = usize::try_from(rows(0, 2).bytes() / 2).unwrap();
                    for (_, memory) in updating.params_mut() {
                        memory.host_bytes_mut().unwrap()[..half].fill(byte(next[rank]));
                    }
                }
                Step::Commit(rank) if writing[rank] => {
                    commit(&mut world.sources[rank], next[rank]);
                    next[rank] += 1;
                    writing[rank] = false;
                }
                Step::Poll => drop(pulling.poll()),
                Step::Write(_) | Step::Commit(_) => {}
            }
        }
        match pulling.wait(ranks::soon()) {
            Ok(pulled) => {
                let (target, report) = install(pulled);
                let version = report.version.unwrap();
                prop_assert!(bytes_of(&target).iter().all(|held| *held == byte(version)));
                prop_assert!(!announced || version == 1);
            }
            Err(Failed { error, state }) => {
                let named = matches!(
                    error,
                    RefitError::Torn { .. } | RefitError::MixedVersions { .. }
                );
                prop_assert!(named, "{error}");
                match state {
                    Unfinished::Whole(target) => prop_assert_eq!(bytes_of(&target), before),
                    Unfinished::Invalid(_) => prop_assert_eq!(mode, Mode::Direct),
                    Unfinished::Pulling(_) | Unfinished::Lost => panic!("the reads have settled"),
                }
            }
        }
    }
}

/// Models of several tensors and both sides' sizes: the last version, whole.
#[test]
fn warm_refits_follow_the_trainer() {
    let network = Network::new();
    let (trainer, engine) = (ranks::agent(&network, "trainer"), ranks::agent(&network, "engine"));
    let layouts = models::source(&models::tiny(), 2, 1, 1);
    let mut sources: Vec<_> =
        layouts.iter().map(|layout| ranks::source(&trainer, layout)).collect();
    let published: Vec<_> = sources.iter().map(|source| source.publication().unwrap()).collect();
    let layout = models::target(&models::tiny(), 1).remove(0);
    let wanted: Buffers = oracle::buffers(&layout);
    let (mut target, _, canaries) = ranks::target(&engine, &layout, in_mode(Mode::Staged));
    for _ in 0..3 {
        let offered: Vec<_> = sources.iter().map(|source| source.offered().unwrap()).collect();
        let prepared = target.prepare(&published).unwrap().expecting(&offered).unwrap();
        let (next, report) = install(prepared.pull().unwrap().wait(ranks::soon()).unwrap());
        assert_eq!(report.version, Some(offered[0].version));
        assert_eq!(ranks::held(&next), wanted);
        target = next;
        for (source, layout) in sources.iter_mut().zip(&layouts) {
            ranks::write(source, &oracle::buffers(layout));
        }
    }
    canaries.check();
}
