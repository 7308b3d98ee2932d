//! What a pull makes of everything a transport can do wrong: batches that play a script.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::collections::VecDeque;
use std::ops::RangeBounds;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use refit_planner::Capabilities;
use refit_pool::{Allocator, HostAllocator, Key, Memory, Pool, PoolOptions, Region};
use refit_transport::{
    Cause, Parked, Peer, Progress, Pull, PullError, ReadOp, Refusal, Settled, Status, Transport,
    TransportError, TransportPool, TransportRegistrar, Unsettled, Written,
};

use Step::{Done, Failed, Lost, Pending};

/// What a batch answers when it is posted, and then at each poll. After the last step it stays pending.
#[derive(Clone, Copy, Debug)]
enum Step {
    Pending,
    Done,
    Failed,
    Lost,
}

#[derive(Debug)]
struct Batch {
    script: VecDeque<Step>,
    written: Vec<Written>,
    posted: Arc<AtomicUsize>,
}

#[derive(Debug, Default)]
struct Scripted {
    suspects: Mutex<usize>,
    /// How often it was asked what a batch writes.
    asked: AtomicUsize,
}

impl Batch {
    fn step(&mut self) -> Result<Status, TransportError> {
        let (agent, peer) = ("target".into(), "source".into());
        match self.script.pop_front().unwrap_or(Pending) {
            Pending => Ok(Status::Pending),
            Done => Ok(Status::Done),
            Failed => Err(TransportError::Failed { agent, peer, cause: Cause::PeerGone }),
            Lost => Err(TransportError::Lost { agent, peer, cause: Cause::PeerGone }),
        }
    }
}

impl Transport for Scripted {
    type Registration = ();
    type Prepared = Batch;

    fn backend(&self) -> &'static str {
        "scripted"
    }

    fn agent(&self) -> &str {
        "target"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { max_reads: 1, ..Capabilities::plain(1, 1) }
    }

    fn metadata(&self) -> Result<Vec<u8>, TransportError> {
        Ok(Vec::new())
    }

    fn register(&self, _: &Region) -> Result<(), TransportError> {
        Ok(())
    }

    fn deregister(&self, (): ()) -> Result<(), TransportError> {
        Ok(())
    }

    fn connect(&self, name: &str, _: &[u8]) -> Result<Peer, TransportError> {
        Ok(Peer { name: name.into() })
    }

    fn disconnect(&self, _: &Peer) -> Result<(), TransportError> {
        Ok(())
    }

    fn prepare(&self, _: &Peer, _: &[ReadOp]) -> Result<Batch, TransportError> {
        unreachable!("batches are made by the tests")
    }

    fn written<'a>(&self, prepared: &'a Batch) -> &'a [Written] {
        self.asked.fetch_add(1, Ordering::Relaxed);
        &prepared.written
    }

    fn reads(&self, prepared: &Batch) -> usize {
        prepared.written.len()
    }

    unsafe fn post(&self, prepared: &mut Batch) -> Result<Status, TransportError> {
        prepared.posted.fetch_add(1, Ordering::Relaxed);
        prepared.step()
    }

    fn poll(&self, prepared: &mut Batch) -> Result<Status, TransportError> {
        prepared.step()
    }

    fn suspect(&self, _: &Batch) {
        *self.suspects.lock().unwrap() += 1;
    }
}

/// A pull of batches with these scripts, 4096 bytes of the arena each, and one live memory.
struct World {
    transport: Arc<Scripted>,
    pool: TransportPool<Scripted>,
    posted: Arc<AtomicUsize>,
    /// Batches take turns in so many places of the arena.
    places: usize,
    /// Alive as long as the live memory is not freed.
    live: std::sync::Weak<Memory>,
}

impl World {
    fn new() -> Self {
        let transport = Arc::new(Scripted::default());
        let pool = Pool::new(
            HostAllocator,
            TransportRegistrar::new(Arc::clone(&transport)),
            PoolOptions::default(),
        );
        Self {
            transport,
            pool,
            posted: Arc::default(),
            places: usize::MAX,
            live: std::sync::Weak::new(),
        }
    }

    fn start(&mut self, scripts: &[&[Step]]) -> Result<Pull<Scripted>, PullError<Scripted>> {
        self.start_some(scripts, ..)
    }

    fn start_some(
        &mut self,
        scripts: &[&[Step]],
        batches: impl RangeBounds<usize>,
    ) -> Result<Pull<Scripted>, PullError<Scripted>> {
        let bytes = 4096 * scripts.len() as u64;
        let lease = self.pool.lease(Key::from([0; 32]), |build| {
            let arena = build.arena(bytes).unwrap();
            let batch = |(index, script): (usize, &&[Step])| Batch {
                script: script.iter().copied().collect(),
                written: vec![Written::range(
                    arena.kind(),
                    arena.address() + 4096 * (index % self.places) as u64,
                    4096,
                )],
                posted: Arc::clone(&self.posted),
            };
            Ok::<_, TransportError>(scripts.iter().enumerate().map(batch).collect())
        });
        let owner = Arc::new(HostAllocator.allocate(4096).unwrap());
        self.live = Arc::downgrade(&owner);
        let start = std::ptr::NonNull::new(std::ptr::with_exposed_provenance_mut(
            usize::try_from(owner.address()).unwrap(),
        ));
        // SAFETY: the mapping lives as long as its owner, and nobody else uses it.
        let live = unsafe { Memory::adopt(start.unwrap(), 4096, owner.kind(), owner) };
        Pull::start(Arc::clone(&self.transport), lease.unwrap(), vec![live], batches)
    }

    fn suspects(&self) -> usize {
        *self.transport.suspects.lock().unwrap()
    }

    /// The pool's bytes are free again and the live memory was, or was not, freed.
    fn check(&self, quarantined: u64, live: bool, suspects: usize) {
        assert_eq!(self.pool.stats().quarantined_bytes, quarantined);
        assert_eq!(self.pool.stats().leased_bytes, 0);
        assert_eq!(self.live.upgrade().is_some(), live);
        assert_eq!(self.suspects(), suspects);
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

#[test]
fn every_peer_is_posted_before_any_is_waited_for() {
    let mut world = World::new();
    let mut pull = world.start(&[&[Pending, Pending, Done], &[Done], &[Pending, Done]]).unwrap();
    assert_eq!(world.posted.load(Ordering::Relaxed), 3);
    assert_eq!(pull.poll(), Progress::Pending);
    assert_eq!(pull.poll(), Progress::Done);
    assert_eq!(pull.poll(), Progress::Done);
    let settled = pull.finish().unwrap();
    assert_eq!((settled.stats.batches, settled.stats.bytes, settled.stats.polls), (3, 3 * 4096, 2));
    assert_eq!(settled.live.len(), 1);
    drop(settled);
    world.check(0, false, 0);
}

#[test]
fn a_pull_is_about_its_own_batches_and_the_next_about_others() {
    let mut world = World::new();
    let first = world.start_some(&[&[Done], &[Pending, Done], &[Pending, Done]], 1..2).unwrap();
    assert_eq!(world.posted.load(Ordering::Relaxed), 1);
    let settled = first.wait(soon()).unwrap();
    assert_eq!((settled.stats.batches, settled.stats.bytes), (1, 4096));
    let (lease, live) = (settled.lease, settled.live);
    let rest = Pull::start(Arc::clone(&world.transport), lease, live, 2..).unwrap();
    assert_eq!(world.posted.load(Ordering::Relaxed), 2);
    // The first batch was never posted: dropping what is left of the third is what leaks.
    drop(rest);
    world.check(3 * 4096, true, 1);
}

#[test]
fn a_pull_goes_on_with_batches_whose_memory_is_quiet() {
    let mut world = World::new();
    world.places = 2;
    let scripts: [&[Step]; 4] =
        [&[Pending, Done], &[Pending, Pending, Done], &[Pending, Done], &[Done]];
    let mut pull = world.start_some(&scripts, ..2).unwrap();
    assert!(!pull.has_arrived(0..1));
    // The third writes where the first does, which is under way.
    assert_eq!(pull.extend(3), Err(Refusal::Overlap { first: 0, second: 2 }));
    assert_eq!(pull.poll(), Progress::Pending);
    assert!(pull.has_arrived(0..1) && !pull.has_arrived(0..2));
    assert_eq!(pull.extend(4), Err(Refusal::Overlap { first: 1, second: 3 }));
    for wrong in [1, 5, usize::MAX] {
        assert_eq!(pull.extend(wrong), Err(Refusal::NoBatch));
    }
    assert_eq!(world.posted.load(Ordering::Relaxed), 2);
    pull.extend(3).unwrap();
    assert_eq!(world.posted.load(Ordering::Relaxed), 3);
    assert!(!pull.has_arrived(2..3) && !pull.has_arrived(3..4));
    assert_eq!(pull.poll(), Progress::Done);
    pull.extend(4).unwrap();
    assert_eq!(pull.progress(), Progress::Done);
    let settled = pull.finish().unwrap();
    assert_eq!((settled.stats.batches, settled.stats.bytes), (4, 4 * 4096));
    drop(settled);
    world.check(0, false, 0);
}

#[test]
fn a_pull_that_failed_posts_no_more() {
    let mut world = World::new();
    let scripts: [&[Step]; 3] = [&[Failed], &[Pending, Pending, Done], &[Done]];
    let mut pull = world.start_some(&[&[Pending, Failed], scripts[1], scripts[2]], ..2).unwrap();
    assert_eq!(pull.poll(), Progress::Pending);
    pull.extend(3).unwrap();
    assert_eq!(world.posted.load(Ordering::Relaxed), 2);
    assert!(
        matches!(pull.wait(soon()), Err(PullError::Failed { errors, .. }) if errors.len() == 1)
    );

    // A post that fails while others run shows when they have settled.
    let mut world = World::new();
    let mut pull = world.start_some(&[&[Pending, Pending, Done], &[Failed], &[Done]], ..1).unwrap();
    pull.extend(3).unwrap();
    assert_eq!(world.posted.load(Ordering::Relaxed), 2);
    assert_eq!(pull.poll(), Progress::Pending);
    assert!(!pull.has_arrived(0..1), "what a failed pull brought is not looked at");
    assert!(
        matches!(pull.wait(soon()), Err(PullError::Failed { errors, .. }) if errors.len() == 1)
    );
    world.check(0, false, 0);
}

#[test]
fn what_was_checked_once_is_not_checked_again() {
    let mut world = World::new();
    let asked = |world: &World| world.transport.asked.load(Ordering::Relaxed);
    let pull = |world: &World, lease, live| {
        let pull = Pull::start(Arc::clone(&world.transport), lease, live, ..);
        let Settled { lease, live, .. } = pull.unwrap().wait(soon()).unwrap();
        (lease, live)
    };
    let first = world.start(&[&[Done, Done, Done, Done], &[Done, Done, Done, Done]]).unwrap();
    let Settled { lease, live, .. } = first.wait(soon()).unwrap();
    assert_eq!(asked(&world), 2);
    let (mut lease, live) = pull(&world, lease, live);
    assert_eq!(asked(&world), 2);
    // Whoever may have changed the batches, or the memory, has them checked again.
    let _ = lease.prepared_mut();
    let (lease, mut live) = pull(&world, lease, live);
    assert_eq!(asked(&world), 4);
    live.clear();
    let _ = pull(&world, lease, live);
    assert_eq!(asked(&world), 6);
}

#[test]
fn batches_that_are_not_there_are_refused_and_none_beside_them_posted() {
    let mut world = World::new();
    // One past the last is a pull of no batch, as it is an empty slice.
    drop(world.start_some(&[&[Done]], 1..).unwrap().wait(soon()).unwrap());
    for wrong in [0..2, 2..2, 1..usize::MAX] {
        let error = world.start_some(&[&[Done]], wrong).unwrap_err();
        assert!(matches!(&error, PullError::NoBatch { live, .. } if live.len() == 1), "{error:?}");
        assert!(error.to_string().contains("1 batches"), "{error}");
        drop(error);
    }
    assert!(world.start_some(&[&[Done]], ..=usize::MAX).is_err());
    assert_eq!(world.posted.load(Ordering::Relaxed), 0);
}

#[test]
fn a_failed_post_stops_further_ones_and_the_others_are_waited_for() {
    let mut world = World::new();
    let mut pull = world.start(&[&[Pending, Pending, Done], &[Failed], &[Done]]).unwrap();
    assert_eq!(world.posted.load(Ordering::Relaxed), 2);
    assert_eq!(pull.poll(), Progress::Pending);
    let error = pull.wait(soon()).unwrap_err();
    let PullError::Failed { errors, lease, live } = error else { panic!("{error:?}") };
    assert_eq!((errors.len(), live.len(), lease.arenas().len()), (1, 1, 1));
    drop((lease, live));
    world.check(0, false, 0);
}

#[test]
fn a_failed_first_post_fails_at_once() {
    let mut world = World::new();
    let error = world.start(&[&[Failed], &[Pending]]).unwrap_err();
    assert!(matches!(&error, PullError::Failed { errors, .. } if errors.len() == 1), "{error:?}");
    assert_eq!(world.posted.load(Ordering::Relaxed), 1);
    drop(error);
    world.check(0, false, 0);
}

#[test]
fn failures_wait_for_the_others_to_settle() {
    let mut world = World::new();
    let mut pull = world
        .start(&[&[Pending, Failed], &[Pending, Pending, Done], &[Pending, Pending, Failed]])
        .unwrap();
    assert_eq!(pull.poll(), Progress::Pending);
    assert_eq!(pull.poll(), Progress::Failed);
    let error = pull.finish().unwrap_err();
    assert!(matches!(&error, PullError::Failed { errors, .. } if errors.len() == 2), "{error:?}");
    drop(error);
    world.check(0, false, 0);
}

#[test]
fn lost_reads_take_their_memory_with_them() {
    for script in [&[Lost][..], &[Pending, Lost]] {
        let mut world = World::new();
        let error = match world.start(&[script, &[Pending, Done]]) {
            Ok(pull) => pull.wait(soon()).unwrap_err(),
            Err(error) => error,
        };
        let PullError::Lost { errors, bytes } = error else { panic!("{error:?}") };
        assert_eq!((errors.len(), bytes), (1, 8192));
        world.check(8192, true, 1);
    }
}

#[test]
fn deadlines_are_kept_and_the_pull_goes_on() {
    let mut world = World::new();
    let script: Vec<Step> = std::iter::repeat_n(Pending, 100).chain([Done]).collect();
    let pull = world.start(&[&script]).unwrap();
    let PullError::Deadline { pull } = pull.wait(Instant::now()).unwrap_err() else { panic!() };
    world.check_leased();
    drop(pull.wait(soon()).unwrap());
    world.check(0, false, 0);

    let mut world = World::new();
    let pull = world.start(&[&[]]).unwrap();
    let started = Instant::now();
    let PullError::Deadline { pull } = pull.wait(started + Duration::from_millis(50)).unwrap_err()
    else {
        panic!()
    };
    assert!(
        started.elapsed() >= Duration::from_millis(50)
            && started.elapsed() < Duration::from_secs(5)
    );
    drop(pull);
    world.check(4096, true, 1);
}

impl World {
    fn check_leased(&self) {
        assert_eq!(self.pool.stats().leased_bytes, 4096);
    }
}

#[test]
fn dropping_leaks_exactly_while_something_may_write() {
    let mut world = World::new();
    drop(world.start(&[&[Done], &[Pending]]).unwrap());
    world.check(8192, true, 1);

    let mut world = World::new();
    drop(world.start(&[&[Done], &[Done]]).unwrap());
    world.check(0, false, 0);
}

/// Polls until nothing is pending.
fn poll_out(parked: &mut Parked<Scripted>) {
    while parked.poll() == Progress::Pending {}
}

#[test]
fn p02_parked_memory_comes_back_when_its_reads_have_settled() {
    let mut world = World::new();
    let mut parked = world.start(&[&[Pending, Pending, Done], &[Pending, Failed]]).unwrap().park();
    world.check(2 * 4096, true, 0);
    assert_eq!((parked.bytes(), world.pool.stats().quarantined_entries), (3 * 4096, 1));
    assert_eq!(parked.poll(), Progress::Pending);
    let Err(Unsettled::Pending(mut parked)) = parked.settle() else { panic!() };
    world.check(2 * 4096, true, 0);
    poll_out(&mut parked);
    let returned = parked.settle().unwrap();
    assert_eq!((returned.live.len(), returned.errors.len()), (1, 1));
    world.check(0, true, 0);
    // It lies ready under its key.
    assert_eq!((world.pool.stats().entries, world.pool.stats().bytes), (1, 2 * 4096));
    drop(returned);
    world.check(0, false, 0);
}

#[test]
fn p02_parked_reads_that_are_lost_keep_their_memory() {
    let mut world = World::new();
    let mut parked = world.start(&[&[Pending, Lost], &[Pending, Done]]).unwrap().park();
    poll_out(&mut parked);
    let Err(Unsettled::Lost { errors, bytes }) = parked.settle() else { panic!() };
    assert_eq!((errors.len(), bytes), (1, 2 * 4096));
    world.check(2 * 4096, true, 1);
}

#[test]
fn p02_dropping_what_is_parked_leaks_exactly_while_something_may_write() {
    let mut world = World::new();
    drop(world.start(&[&[Done], &[Pending]]).unwrap().park());
    world.check(2 * 4096, true, 1);

    let mut world = World::new();
    let mut parked = world.start(&[&[Pending, Done]]).unwrap().park();
    poll_out(&mut parked);
    drop(parked);
    world.check(0, false, 0);
}
