//! Schedules in time: calls through a worker, over a wire that moves by itself and calls that block.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use refit_planner::{Dims, Transform};
use refit_pool::{Allocator, HostAllocator, Key, MemoryKind, Pool, PoolOptions};
use refit_service::worker::{Agent, Standing, Worker, WorkerError, WorkerOptions, reaper};
use refit_tests::faults::{Connect, FaultTransport, Script, Wire};
use refit_tests::starved;
use refit_transport::{
    LocalRange, Parked, Progress, Pull, PullError, ReadOp, RemoteRange, Transport, TransportPool,
    TransportRegistrar, Unsettled,
};

use super::scripts;

type T = FaultTransport;

const ARENA: u64 = 512;
/// What every answer may take beyond its deadline, of the time in which the machine runs us.
const LATE: Duration = Duration::from_millis(250);

struct Target {
    transport: Arc<T>,
    pool: TransportPool<T>,
    parked: Vec<Parked<T>>,
    lost: bool,
    joins: u64,
}

impl Target {
    fn new(wire: &Wire) -> Self {
        let transport = Arc::new(T::new("target", wire));
        let registrar = TransportRegistrar::new(Arc::clone(&transport));
        let pool = Pool::new(HostAllocator, registrar, PoolOptions::default());
        Self { transport, pool, parked: Vec::new(), lost: false, joins: 0 }
    }

    fn pull(&mut self, call: &Call, deadline: Instant) -> Result<(), String> {
        self.transport.script_connect(call.connect);
        self.transport.script(call.script.clone());
        let joins = &mut self.joins;
        let lease = self.pool.lease(Key::from([1; 32]), |build| {
            let arena = build.arena(ARENA)?;
            let peer = self.transport.connect("peer", &[])?;
            *joins += 1;
            let reads = (0..8).map(|read| ReadOp {
                from: RemoteRange { address: 100 * read, len: 64, kind: arena.kind() },
                into: LocalRange {
                    address: arena.address() + 64 * read,
                    len: 64,
                    kind: arena.kind(),
                },
                run: 64,
                dims: Dims::none(),
                transform: Transform::Copy,
                bulk: false,
            });
            let reads = reads.collect::<Vec<_>>();
            Ok::<_, Box<dyn std::error::Error>>(vec![self.transport.prepare(&peer, &reads)?])
        });
        let lease = match lease {
            Ok(lease) => lease,
            Err(error) => {
                self.transport.unscript();
                return Err(error.to_string());
            }
        };
        let pull = Pull::start(Arc::clone(&self.transport), lease, Vec::new(), ..);
        self.transport.unscript();
        match pull.and_then(|pull| pull.wait(deadline)) {
            Ok(settled) => {
                let bytes = settled.lease.arenas()[0].host_bytes().unwrap();
                for (at, &byte) in (0..).zip(bytes) {
                    assert_eq!(byte, T::byte(100 * (at / 64) + at % 64));
                }
                Ok(())
            }
            Err(PullError::Deadline { pull }) => {
                self.parked.push(pull.park());
                Err("deadline".into())
            }
            Err(error) => {
                self.lost |= matches!(error, PullError::Lost { .. });
                Err(error.to_string())
            }
        }
    }
}

impl Agent for Target {
    fn name(&self) -> String {
        self.transport.agent().to_owned()
    }

    fn poll(&mut self) -> Standing {
        for mut parked in std::mem::take(&mut self.parked) {
            if parked.poll() == Progress::Pending {
                self.parked.push(parked);
            } else if let Err(Unsettled::Lost { .. }) = parked.settle() {
                self.lost = true;
            }
        }
        match (self.lost, self.parked.is_empty()) {
            (true, _) => Standing::Lost,
            (false, true) => Standing::Quiet,
            (false, false) => Standing::Restless,
        }
    }

    fn bytes(&self) -> u64 {
        self.pool.stats().bytes
    }

    fn joins(&self) -> u64 {
        self.joins
    }
}

#[derive(Clone, Debug)]
struct Call {
    script: Script,
    connect: Connect,
    /// Milliseconds.
    deadline: u64,
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let connect = prop_oneof![
        6 => Just(Connect::After(Duration::ZERO)),
        1 => (0..400_u64).prop_map(|ms| Connect::After(Duration::from_millis(ms))),
        1 => (0..400_u64).prop_map(|ms| Connect::Fails(Duration::from_millis(ms))),
    ];
    let call = (scripts(400), connect, 0..60_u64).prop_map(|(script, connect, deadline)| Call {
        script,
        connect,
        deadline,
    });
    prop::collection::vec(call, 1..8)
}

fn run(calls: Vec<Call>) {
    let wire = Wire::default();
    let stop = Arc::new(AtomicBool::new(false));
    let mover = thread::spawn({
        let (wire, stop) = (wire.clone(), Arc::clone(&stop));
        move || {
            while !stop.load(Ordering::Acquire) {
                wire.step();
                thread::sleep(Duration::from_millis(1));
            }
        }
    });
    let built = wire.clone();
    let options = WorkerOptions::default().with_linger(Duration::ZERO).with_recycle_after(4);
    let far = || Instant::now() + Duration::from_secs(10);
    let worker = Worker::start("target", options, far(), move |old: Option<Target>| {
        drop(old);
        Ok(Target::new(&built))
    });
    let worker = worker.unwrap();
    let lost = reaper::stats().lost;
    for call in calls {
        let deadline = Instant::now() + Duration::from_millis(call.deadline);
        let (generation, plan) = (worker.generation(), call.clone());
        let ((answer, answered), starved) = starved::while_running(|| {
            let pull = move |target: &mut Target, deadline| target.pull(&plan, deadline);
            (worker.call("pull", deadline, pull), Instant::now())
        });
        let late = answered.saturating_duration_since(deadline);
        assert!(late <= LATE + starved, "{late:?} late, {starved:?} not run: {call:?}: {answer:?}");
        match answer {
            Ok(Ok(()) | Err(_)) => {}
            Err(WorkerError::Stuck { .. } | WorkerError::Busy { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        // What cannot settle, or does not return, is replaced; nobody waits for it.
        let stats = worker.stats();
        if stats.standing != Standing::Quiet || stats.doing.is_some() {
            let (took, starved) = starved::while_running(|| {
                let started = Instant::now();
                worker.renew(generation, far()).unwrap();
                started.elapsed()
            });
            assert!(took <= LATE + starved, "{took:?}, {starved:?} of it not run");
        }
    }
    // The peer is killed, and what could be watched comes back.
    let until = far();
    loop {
        wire.kill();
        let now = worker.stats();
        let leaked = reaper::stats().lost - lost;
        if now.retired <= leaked && now.doing.is_none() && now.standing != Standing::Restless {
            break;
        }
        assert!(Instant::now() < until, "{now:?}, {leaked} leaked");
        thread::sleep(Duration::from_millis(1));
    }
    drop(worker);
    stop.store(true, Ordering::Release);
    mover.join().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn p03_every_call_is_answered_by_its_deadline(calls in calls()) {
        run(calls);
    }
}

/// The memory that is kept away while its reads may land is not counted for ever.
#[test]
fn p08_memory_of_a_retired_agent_goes_after_its_reads() {
    let wire = Wire::default();
    let built = wire.clone();
    let far = || Instant::now() + Duration::from_secs(10);
    let worker =
        Worker::start("target", WorkerOptions::default(), far(), move |_| Ok(Target::new(&built)));
    let worker = worker.unwrap();
    let script = Script { end: refit_tests::faults::End::Never, ..Script::default() };
    let call = Call { script, connect: Connect::After(Duration::ZERO), deadline: 20 };
    let deadline = Instant::now() + Duration::from_millis(20);
    let answer = worker.call("pull", deadline, move |target, deadline| {
        let answer = target.pull(&call, deadline);
        (answer, target.pool.stats().quarantined_bytes)
    });
    assert_eq!(answer.unwrap(), (Err("deadline".to_owned()), ARENA));
    worker.renew(0, far()).unwrap();
    // A neighbour, filled with what no read brings, next to reads that go on landing.
    let mut neighbour = HostAllocator.allocate(1 << 16).unwrap();
    assert_eq!(neighbour.kind(), MemoryKind::Host);
    neighbour.host_bytes_mut().unwrap().fill(0xEE);
    for _ in 0..100 {
        wire.step();
    }
    assert_eq!((worker.stats().retired, worker.stats().retired_bytes), (1, ARENA));
    assert!(neighbour.host_bytes().unwrap().iter().all(|&byte| byte == 0xEE));
    wire.kill();
    let until = far();
    while worker.stats().retired > 0 {
        assert!(Instant::now() < until, "memory is not back");
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(wire.in_flight(), 0);
}
