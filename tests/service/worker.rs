//! A thread that owns an agent: what its callers wait for, and what becomes of agents whose reads are out. By itself, since the
//! reaper is one for a process.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use refit_service::worker::{
    Agent, BuildError, Standing, Worker, WorkerError, WorkerOptions, reaper,
};
use refit_tests::starved;

/// What tests see of their agents from outside.
#[derive(Debug, Default)]
struct World {
    built: AtomicUsize,
    /// Whether agents have reads out.
    restless: AtomicBool,
    lost: AtomicBool,
    poll_panics: AtomicBool,
    build_fails: AtomicBool,
    /// Destroyed agents, and those of them that had reads out.
    destroyed: AtomicUsize,
    destroyed_restless: AtomicUsize,
    joins: AtomicU64,
}

struct Fake {
    world: Arc<World>,
    number: usize,
    commands: usize,
}

const BYTES: u64 = 1000;

impl Agent for Fake {
    fn name(&self) -> String {
        format!("fake-{}", self.number)
    }

    fn poll(&mut self) -> Standing {
        assert!(!self.world.poll_panics.load(Ordering::SeqCst), "a poll that panics");
        if self.world.lost.load(Ordering::SeqCst) {
            Standing::Lost
        } else if self.world.restless.load(Ordering::SeqCst) {
            Standing::Restless
        } else {
            Standing::Quiet
        }
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn joins(&self) -> u64 {
        self.world.joins.load(Ordering::SeqCst)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.world.destroyed.fetch_add(1, Ordering::SeqCst);
        if self.world.restless.load(Ordering::SeqCst) || self.world.lost.load(Ordering::SeqCst) {
            self.world.destroyed_restless.fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn start(options: WorkerOptions) -> (Worker<Fake>, Arc<World>) {
    let world = Arc::new(World::default());
    let worker = Worker::start("worker", options, soon(), maker(&world)).unwrap();
    (worker, world)
}

fn maker(
    world: &Arc<World>,
) -> impl Fn(Option<Fake>) -> Result<Fake, BuildError> + Send + Sync + 'static {
    let world = Arc::clone(world);
    move |old| {
        drop(old);
        if world.build_fails.load(Ordering::SeqCst) {
            return Err("no agent today".into());
        }
        world.joins.store(0, Ordering::SeqCst);
        let number = world.built.fetch_add(1, Ordering::SeqCst);
        Ok(Fake { world: Arc::clone(&world), number, commands: 0 })
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn eventually(what: &str, is: impl Fn() -> bool) {
    let until = soon();
    while !is() {
        assert!(Instant::now() < until, "not in time: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn number(worker: &Worker<Fake>) -> Result<usize, WorkerError> {
    worker.call("count", soon(), |fake, _| {
        fake.commands += 1;
        fake.number
    })
}

/// As long as the deadline and the 250 ms that are promised, not counting time in which the machine ran none of us.
fn in_time(limit: Duration, run: impl FnOnce()) {
    let (took, starved) = starved::while_running(|| {
        let started = Instant::now();
        run();
        started.elapsed()
    });
    let most = limit + Duration::from_millis(250) + starved;
    assert!(took <= most, "{took:?} for a limit of {limit:?}, {starved:?} of it not run");
}

/// Has the worker stuck in a command until something is sent, and says what its caller was told. A busy machine may not begin
/// it by its deadline, and then never does: such a one is asked for again.
fn stick(worker: &Worker<Fake>) -> (WorkerError, mpsc::Sender<()>) {
    let (go_on, wait) = mpsc::channel();
    let (wait, until) = (Arc::new(Mutex::new(wait)), soon());
    loop {
        let (wait, mut told) = (Arc::clone(&wait), None);
        in_time(SHORT, || {
            let post = move |_: &mut Fake, _| wait.lock().recv().is_ok();
            told = worker.call("post", Instant::now() + SHORT, post).err();
        });
        match told.unwrap() {
            WorkerError::Busy { .. } => assert!(Instant::now() < until, "it begins nothing"),
            told => return (told, go_on),
        }
    }
}

/// The reaper counts losses for all tests of the process: who waits for one of its own has to be alone.
static LOSSES: Mutex<()> = Mutex::new(());

const SHORT: Duration = Duration::from_millis(80);

#[test]
fn commands_run_in_order_on_one_named_thread() {
    let (worker, world) = start(WorkerOptions::default());
    let name = worker.call("look", soon(), |_, _| thread::current().name().map(str::to_owned));
    assert_eq!(name.unwrap().as_deref(), Some("worker"));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..50).for_each(|_| assert_eq!(number(&worker).unwrap(), 0)));
        }
    });
    assert_eq!(worker.call("look", soon(), |fake, _| fake.commands).unwrap(), 200);
    worker.shutdown(soon()).unwrap();
    assert_eq!(world.destroyed.load(Ordering::SeqCst), 1);
}

#[test]
fn p03_a_stuck_call_costs_its_deadline_and_those_behind_it_theirs() {
    let (worker, _) = start(WorkerOptions::default().with_linger(Duration::ZERO));
    let ran = Arc::new(AtomicBool::new(false));
    let (error, go_on) = stick(&worker);
    let text = error.to_string();
    assert!(matches!(error, WorkerError::Stuck { what: "post", .. }), "{error:?}");
    assert!(text.contains("fake-0") && text.contains("does not return"), "{text}");
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                in_time(SHORT, || {
                    let ran = Arc::clone(&ran);
                    let late = worker.call("wait", Instant::now() + SHORT, move |_, _| {
                        ran.store(true, Ordering::SeqCst);
                    });
                    let error = late.unwrap_err();
                    assert!(
                        matches!(error, WorkerError::Busy { what: "wait", doing: "post", .. }),
                        "{error:?}"
                    );
                });
            });
        }
    });
    assert!(worker.stats().doing.is_some_and(|(what, since)| what == "post" && since >= SHORT));
    go_on.send(()).unwrap();
    // It goes on by itself, without what was given up.
    assert_eq!(number(&worker).unwrap(), 0);
    assert!(
        !ran.load(Ordering::SeqCst),
        "a command ran after its caller was told that it will not"
    );
}

#[test]
fn p03_deadlines_at_the_ends_of_time() {
    let (worker, _) = start(WorkerOptions::default());
    let far = Instant::now() + Duration::from_secs(1 << 40);
    assert_eq!(worker.call("count", far, |fake, _| fake.number).unwrap(), 0);
    let passed = Instant::now().checked_sub(Duration::from_secs(5)).unwrap();
    in_time(Duration::ZERO, || {
        // Whether it was begun is the thread's luck.
        let error = worker.call("sleep", passed, |_, _| thread::sleep(SHORT)).unwrap_err();
        assert!(matches!(error, WorkerError::Stuck { .. } | WorkerError::Busy { .. }), "{error:?}");
    });
}

#[test]
fn p03_a_panic_is_an_error_for_all_who_wait() {
    let (worker, world) = start(WorkerOptions::default());
    let (go_on, wait) = mpsc::channel::<()>();
    let said = |error: WorkerError| {
        let WorkerError::Panicked { what: "fall over", message, .. } = error else {
            panic!("{error:?}")
        };
        assert_eq!(message, "on purpose");
    };
    thread::scope(|scope| {
        let falls = scope.spawn(|| {
            worker.call("fall over", soon(), move |_, _| {
                wait.recv().unwrap();
                panic!("on purpose");
            })
        });
        eventually("begun", || worker.stats().doing.is_some());
        let behind = [(); 3].map(|()| {
            scope.spawn(|| {
                in_time(Duration::from_secs(1), || {
                    said(number(&worker).unwrap_err());
                })
            })
        });
        thread::sleep(Duration::from_millis(20));
        go_on.send(()).unwrap();
        said(falls.join().unwrap().unwrap_err());
        behind.into_iter().for_each(|thread| thread.join().unwrap());
    });
    in_time(Duration::ZERO, || said(number(&worker).unwrap_err()));
    // The agent is quiet, so the reaper destroys it; a fresh one takes over.
    eventually("destroyed", || world.destroyed.load(Ordering::SeqCst) == 1);
    worker.renew(worker.generation(), soon()).unwrap();
    assert_eq!(number(&worker).unwrap(), 1);
}

#[test]
fn p02_an_agent_with_reads_out_is_replaced_and_destroyed_when_they_settle() {
    let (worker, world) = start(WorkerOptions::default());
    world.restless.store(true, Ordering::SeqCst);
    number(&worker).unwrap();
    eventually("seen", || worker.stats().standing == Standing::Restless);
    worker.renew(0, soon()).unwrap();
    assert_eq!((number(&worker).unwrap(), worker.generation()), (1, 1));
    // Another caller that saw the same agent fail changes nothing.
    worker.renew(0, soon()).unwrap();
    assert_eq!((number(&worker).unwrap(), worker.generation()), (1, 1));
    thread::sleep(Duration::from_millis(100));
    let stats = worker.stats();
    assert_eq!((stats.retired, stats.retired_bytes), (1, BYTES));
    assert_eq!(world.destroyed.load(Ordering::SeqCst), 0);
    world.restless.store(false, Ordering::SeqCst);
    in_time(Duration::from_secs(1), || eventually("settled", || worker.stats().retired == 0));
    assert_eq!(world.destroyed.load(Ordering::SeqCst), 1);
    assert_eq!(world.destroyed_restless.load(Ordering::SeqCst), 0);
    assert_eq!(worker.stats().retired_bytes, 0);
}

#[test]
fn p02_a_thread_that_is_stuck_keeps_its_memory_until_it_returns() {
    let (worker, world) = start(WorkerOptions::default());
    let (stuck, go_on) = stick(&worker);
    assert!(matches!(stuck, WorkerError::Stuck { .. }), "{stuck:?}");
    in_time(Duration::from_secs(1), || worker.renew(0, soon()).unwrap());
    assert_eq!(number(&worker).unwrap(), 1);
    assert_eq!((worker.stats().retired, worker.stats().retired_bytes), (1, BYTES));
    assert_eq!(world.destroyed.load(Ordering::SeqCst), 0);
    go_on.send(()).unwrap();
    eventually("destroyed", || world.destroyed.load(Ordering::SeqCst) == 1);
    eventually("given back", || worker.stats().retired == 0);
}

#[test]
fn p02_retired_agents_are_limited() {
    let options = WorkerOptions::of_budget(8 * BYTES).with_linger(Duration::ZERO);
    assert_eq!(options.quarantine_bytes, 2 * BYTES);
    let (worker, world) = start(options);
    world.restless.store(true, Ordering::SeqCst);
    for generation in 0..2 {
        number(&worker).unwrap();
        eventually("seen", || worker.stats().standing == Standing::Restless);
        worker.renew(generation, soon()).unwrap();
    }
    number(&worker).unwrap();
    eventually("seen", || worker.stats().standing == Standing::Restless);
    let error = worker.renew(2, soon()).unwrap_err();
    assert!(matches!(error, WorkerError::Quarantine { bytes: 3000, limit: 2000, .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains("end the silent peer") && text.contains("restart this process"),
        "{text}"
    );
    // The one that is there goes on.
    assert_eq!((number(&worker).unwrap(), worker.generation()), (2, 2));
    world.restless.store(false, Ordering::SeqCst);
    eventually("settled", || worker.stats().retired == 0);
    worker.renew(2, soon()).unwrap();
    assert_eq!(world.destroyed_restless.load(Ordering::SeqCst), 0);
}

#[test]
fn p02_lost_reads_are_never_given_back() {
    let _alone = LOSSES.lock();
    let (worker, world) = start(WorkerOptions::default());
    world.lost.store(true, Ordering::SeqCst);
    let before = reaper::stats();
    number(&worker).unwrap();
    worker.renew(0, soon()).unwrap();
    eventually("leaked", || reaper::stats().lost > before.lost);
    assert!(reaper::stats().lost_bytes >= before.lost_bytes + BYTES);
    world.lost.store(false, Ordering::SeqCst);
    assert_eq!(worker.stats().retired_bytes, BYTES);
    assert_eq!(world.destroyed.load(Ordering::SeqCst), 0);
}

#[test]
fn p09_agents_are_recycled_at_a_quiet_point() {
    let (worker, world) = start(WorkerOptions::default().with_recycle_after(3));
    world.restless.store(true, Ordering::SeqCst);
    let join = || {
        worker.call("join", soon(), |fake, _| {
            fake.world.joins.fetch_add(1, Ordering::SeqCst);
            fake.number
        })
    };
    for _ in 0..5 {
        assert_eq!(join().unwrap(), 0);
    }
    assert_eq!(worker.stats().recycled, 0);
    world.restless.store(false, Ordering::SeqCst);
    eventually("recycled", || worker.stats().recycled == 1);
    assert_eq!(number(&worker).unwrap(), 1);
    assert_eq!((worker.generation(), world.destroyed.load(Ordering::SeqCst)), (0, 1));
    for _ in 0..3 {
        assert_eq!(join().unwrap(), 1);
    }
    assert_eq!(join().unwrap(), 2);
    // A build that fails then leaves a worker that says so.
    world.build_fails.store(true, Ordering::SeqCst);
    let until = soon();
    let error = loop {
        assert!(Instant::now() < until);
        if let Err(error) = join() {
            break error;
        }
    };
    assert!(error.to_string().contains("no agent today"), "{error}");
    assert!(matches!(worker.renew(0, soon()), Err(WorkerError::Build { .. })));
    world.build_fails.store(false, Ordering::SeqCst);
    worker.renew(1, soon()).unwrap();
    join().unwrap();
}

#[test]
fn p03_ending_is_bounded() {
    for shut_down in [false, true] {
        let (worker, world) = start(WorkerOptions::default().with_linger(SHORT));
        let (_, go_on) = stick(&worker);
        in_time(SHORT, || {
            if shut_down {
                let error = worker.shutdown(Instant::now() + SHORT).unwrap_err();
                assert!(matches!(error, WorkerError::Stuck { doing: "post", .. }), "{error:?}");
            } else {
                drop(worker);
            }
        });
        assert_eq!(world.destroyed.load(Ordering::SeqCst), 0);
        go_on.send(()).unwrap();
        eventually("destroyed", || world.destroyed.load(Ordering::SeqCst) == 1);
    }
}

#[test]
fn p03_a_build_that_hangs_or_falls_over_is_an_error() {
    let (go_on, wait) = mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let world = Arc::new(World::default());
    let make = maker(&world);
    in_time(SHORT, || {
        let options = WorkerOptions::default();
        let started = Worker::start("slow", options, Instant::now() + SHORT, move |old| {
            let _ = wait.lock().recv();
            make(old)
        });
        assert!(matches!(started, Err(WorkerError::Stuck { doing: "build an agent", .. })));
    });
    go_on.send(()).unwrap();
    eventually("destroyed", || world.destroyed.load(Ordering::SeqCst) == 1);

    let fails: Result<Worker<Fake>, _> =
        Worker::start("x\0y", WorkerOptions::default(), soon(), |_| panic!("no {}", "way"));
    assert!(
        matches!(&fails, Err(WorkerError::Panicked { message, .. }) if message == "no way"),
        "{fails:?}"
    );
    let fails: Result<Worker<Fake>, _> =
        Worker::start("x", WorkerOptions::default(), soon(), |_| Err("no library".into()));
    assert!(fails.unwrap_err().to_string().contains("no library"));
}

#[test]
fn an_agent_whose_poll_falls_over_is_leaked_and_said() {
    let _alone = LOSSES.lock();
    let (worker, world) = start(WorkerOptions::default());
    world.poll_panics.store(true, Ordering::SeqCst);
    let before = reaper::stats().lost;
    // The command itself may have been answered before the agent was looked at.
    let _ = number(&worker);
    eventually("failed", || number(&worker).is_err());
    assert!(matches!(number(&worker), Err(WorkerError::Panicked { what: "poll its agent", .. })));
    eventually("leaked", || reaper::stats().lost > before);
    world.poll_panics.store(false, Ordering::SeqCst);
    worker.renew(0, soon()).unwrap();
    assert_eq!(number(&worker).unwrap(), 1);
    assert_eq!(world.destroyed.load(Ordering::SeqCst), 0);
}

/// Whoever ends the process waits for what is with the reaper, and for what is still in a call, and no longer than it wants to.
#[test]
fn p10_an_end_waits_for_retired_agents() {
    let (worker, world) = start(WorkerOptions::default());
    world.restless.store(true, Ordering::SeqCst);
    number(&worker).unwrap();
    eventually("seen", || worker.stats().standing == Standing::Restless);
    drop(worker);
    in_time(SHORT, || assert!(!reaper::wait(Instant::now() + SHORT)));
    assert_eq!(world.destroyed.load(Ordering::SeqCst), 0);
    world.restless.store(false, Ordering::SeqCst);
    assert!(reaper::wait(soon()));
    assert_eq!(world.destroyed.load(Ordering::SeqCst), 1);

    let (worker, world) = start(WorkerOptions::default().with_linger(Duration::ZERO));
    let (go_on, wait) = mpsc::channel::<()>();
    let stuck = worker.call("post", Instant::now() + SHORT, move |_, _| wait.recv().is_ok());
    stuck.unwrap_err();
    drop(worker);
    in_time(SHORT, || assert!(!reaper::wait(Instant::now() + SHORT)));
    assert_eq!(world.destroyed.load(Ordering::SeqCst), 0);
    go_on.send(()).unwrap();
    assert!(reaper::wait(soon()));
    assert_eq!(world.destroyed.load(Ordering::SeqCst), 1);
}

/// What nobody can watch any more would be waited for for ever.
#[test]
fn p10_an_end_does_not_wait_for_what_is_lost() {
    let _alone = LOSSES.lock();
    let (worker, world) = start(WorkerOptions::default());
    world.lost.store(true, Ordering::SeqCst);
    let before = reaper::stats().lost;
    number(&worker).unwrap();
    drop(worker);
    eventually("leaked", || reaper::stats().lost > before);
    assert!(reaper::wait(soon()));
    assert_eq!(world.destroyed.load(Ordering::SeqCst), 0);
}
