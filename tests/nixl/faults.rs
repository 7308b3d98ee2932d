//! Peers that stop, die and never answer, at random points. Promises P2, P3 and P10.
//!
//! `REFIT_FAULT_ROUNDS` says how often each is tried; a few times by default.

use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use refit_pool::Key;
use refit_service::worker::{Agent, Standing, Worker, WorkerError, WorkerOptions, reaper};
use refit_tests::link::{hex, unhex};
use refit_transport::nixl::{NixlOptions, NixlTransport};
use refit_transport::{Parked, Progress, PullError, Transport, TransportLease, Unsettled};

use crate::isolated::{Guarded, command, current, isolated};
use crate::peer::{Offer, Remote};
use crate::{EMULATED, ONE_SIDED, Target, check};

type Lease = TransportLease<NixlTransport>;

/// What an answer may take beyond its deadline.
const LATE: Duration = Duration::from_millis(250);
const POISON: u8 = 0xEE;
const RECEIVER: &str = "REFIT_NIXL_RECEIVER";

fn rounds(few: u64) -> u64 {
    std::env::var("REFIT_FAULT_ROUNDS").map_or(few, |rounds| rounds.parse().unwrap())
}

/// Different numbers in every process, told in the output.
fn random(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below.max(1)
    }
}

fn seed() -> u64 {
    let seed = std::env::var("REFIT_FAULT_SEED")
        .map_or_else(|_| u64::from(std::process::id()), |seed| seed.parse().unwrap());
    println!("REFIT_FAULT_SEED={seed}");
    seed
}

/// What a worker owns here: a target that parks what does not settle.
struct Puller {
    target: Target,
    parked: Vec<Parked<NixlTransport>>,
    lost: bool,
    /// When the last parked pull was seen to have settled.
    settled: Option<Instant>,
    /// What the pool lent after a pull was given up, full of poison.
    lent: Option<Lease>,
}

impl Puller {
    fn new(offer: Offer, first_byte: Duration) -> Self {
        let options = NixlOptions::new("target").with_first_byte(first_byte);
        let target = Target::with(options, offer);
        Self { target, parked: Vec::new(), lost: false, settled: None, lent: None }
    }

    /// Whether every byte has arrived; otherwise why not.
    fn pull(&mut self, fill: u8, deadline: Instant) -> Result<(), String> {
        let pulled = self.target.try_start().and_then(|pull| match pull.wait(deadline) {
            Ok(settled) => {
                check(&settled, fill);
                Ok(())
            }
            Err(PullError::Deadline { pull }) => {
                self.parked.push(pull.park());
                Err("deadline".into())
            }
            Err(error) => Err(error.into()),
        });
        pulled.map_err(|error| {
            let lost = error.downcast_ref::<PullError<NixlTransport>>();
            self.lost |= matches!(lost, Some(PullError::Lost { .. }));
            error.to_string()
        })
    }

    /// Takes what the pool lends now and fills it.
    fn poison(&mut self) -> u64 {
        let bytes = self.target.offer.len;
        let lease = self.target.pool.lease(Key::from([2; 32]), |build| {
            build.arena(bytes)?;
            Ok::<_, refit_pool::PoolError>(Vec::new())
        });
        let mut lease = lease.unwrap();
        lease.arenas_mut()[0].host_bytes_mut().unwrap().fill(POISON);
        self.lent = Some(lease);
        self.target.pool.stats().quarantined_bytes
    }

    fn poisoned(&self) -> bool {
        let lent = self.lent.as_ref().unwrap();
        lent.arenas()[0].host_bytes().unwrap().iter().all(|&byte| byte == POISON)
    }
}

impl Agent for Puller {
    fn name(&self) -> String {
        self.target.transport.agent().to_owned()
    }

    fn poll(&mut self) -> Standing {
        for mut parked in std::mem::take(&mut self.parked) {
            if parked.poll() == Progress::Pending {
                self.parked.push(parked);
                continue;
            }
            self.settled = Some(Instant::now());
            if let Err(Unsettled::Lost { .. }) = parked.settle() {
                self.lost = true;
            }
        }
        let strays = self.target.transport.unsettled();
        match (self.lost, self.parked.is_empty() && strays == 0) {
            (true, _) => Standing::Lost,
            (false, true) => Standing::Quiet,
            (false, false) => Standing::Restless,
        }
    }

    fn bytes(&self) -> u64 {
        self.target.pool.stats().bytes
    }
}

fn far() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn worker(offer: &Offer, first_byte: Duration) -> Worker<Puller> {
    let offer = offer.clone();
    let options = WorkerOptions::default().with_linger(Duration::from_millis(100));
    Worker::start("puller", options, far(), move |old: Option<Puller>| {
        drop(old);
        Ok(Puller::new(offer.clone(), first_byte))
    })
    .unwrap()
}

/// A call that keeps its deadline, whatever comes of it.
fn pull(worker: &Worker<Puller>, fill: u8, limit: Duration) -> Result<(), String> {
    let deadline = Instant::now() + limit;
    let answer = worker.call("pull", deadline, move |puller, deadline| puller.pull(fill, deadline));
    let late = Instant::now().saturating_duration_since(deadline);
    assert!(late <= LATE, "{late:?} beyond a deadline of {limit:?}: {answer:?}");
    match answer {
        Ok(answer) => answer,
        Err(error @ (WorkerError::Stuck { .. } | WorkerError::Busy { .. })) => {
            Err(error.to_string())
        }
        Err(error) => panic!("{error}"),
    }
}

fn until(what: &str, limit: Duration, is: impl Fn() -> bool) {
    let started = Instant::now();
    while !is() {
        assert!(started.elapsed() < limit, "not within {limit:?}: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The source stops while it is read, the pull is given up, and what the pool lends then stays as it is.
fn late_writes() {
    const BYTES: u64 = 64 << 20;
    let Some(mut remote) = Remote::start(BYTES) else { return };
    let offer = remote.offer();
    let emulated = std::env::var("UCX_TLS").is_ok_and(|lanes| lanes == "tcp");
    let mut random = random(seed());
    let mut given_up = 0;
    for round in 0..rounds(4) {
        let worker = worker(&offer, Duration::from_secs(10));
        remote.fill(1);
        pull(&worker, 1, Duration::from_secs(20)).unwrap();
        remote.fill(2);
        // The first time nothing has been sent yet, then something has. What needs no answer is given up early.
        let limit = Duration::from_millis(if emulated { 300 } else { random(15) });
        let outcome = if round == 0 {
            remote.pause();
            pull(&worker, 2, limit)
        } else {
            thread::scope(|scope| {
                let pulling = scope.spawn(|| pull(&worker, 2, limit));
                thread::sleep(Duration::from_micros(random(30_000)));
                remote.pause();
                pulling.join().unwrap()
            })
        };
        println!("round {round}: {outcome:?}");
        given_up += u64::from(outcome.is_err());
        let stuck = worker.stats().doing.is_some();
        let parked = worker.stats().standing == Standing::Restless;
        // Either the agent goes on in other memory, or another one does.
        let same = round % 2 == 0 && !stuck;
        if !same {
            worker.renew(0, far()).unwrap();
        }
        let quarantined = worker.call("poison", far(), |puller, _| puller.poison()).unwrap();
        if same && parked {
            assert_eq!(quarantined, BYTES);
        }
        let resumed = Instant::now();
        remote.resume();
        // What is under way arrives now, where nobody looks.
        let settled = || {
            worker
                .call("poll", far(), |puller, _| {
                    (
                        puller.poll() == Standing::Quiet,
                        puller.settled,
                        puller.target.pool.stats().quarantined_bytes,
                    )
                })
                .unwrap()
        };
        until("memory is back", Duration::from_secs(20), || {
            let (quiet, terminal, quarantined) = settled();
            if let Some(terminal) = terminal {
                assert!(quarantined == 0 && terminal.elapsed() < Duration::from_secs(1));
            }
            quiet && worker.stats().retired == 0
        });
        println!("  settled {:?} after the source went on", resumed.elapsed());
        assert!(worker.call("look", far(), |puller, _| puller.poisoned()).unwrap(), "a late write");
        assert_eq!(settled().2, 0);
        // And the next one is right, in the memory that came back or new.
        remote.fill(3);
        pull(&worker, 3, Duration::from_secs(20)).unwrap();
        assert!(worker.call("look", far(), |puller, _| puller.poisoned()).unwrap(), "a late write");
    }
    println!("{given_up} pulls were given up");
    assert!(given_up > 0 || !emulated, "a stopped source answered");
}

#[test]
fn p02_late_writes_land_in_quarantine_one_sided() {
    isolated("faults::p02_late_writes_land_in_quarantine_one_sided", ONE_SIDED, late_writes);
}

#[test]
fn p02_late_writes_land_in_quarantine_emulated() {
    isolated("faults::p02_late_writes_land_in_quarantine_emulated", EMULATED, late_writes);
}

const DEADLINES: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];
const MATRIX: u64 = 32 << 20;

/// A peer that stops while it is read, or dies: before a pull, or while it waits.
fn stopped_and_killed() {
    // In the process of a source this serves.
    let Some(first) = Remote::start(MATRIX) else { return };
    drop(first);
    for limit in DEADLINES {
        for kill_first in [false, true] {
            let mut remote = Remote::start(MATRIX).unwrap();
            let offer = remote.offer();
            let worker = worker(&offer, Duration::from_secs(10));
            remote.fill(1);
            pull(&worker, 1, Duration::from_secs(20)).unwrap();
            if kill_first {
                remote.kill();
                let killed = Instant::now();
                let error = pull(&worker, 1, limit).unwrap_err();
                println!("{limit:?}, killed: {:?}: {error}", killed.elapsed());
                assert!(killed.elapsed() <= Duration::from_secs(1), "{:?}", killed.elapsed());
                continue;
            }
            remote.pause();
            // One-sided reads need no answer.
            let started = Instant::now();
            let outcome = pull(&worker, 1, limit);
            println!("{limit:?}, stopped: {:?}: {outcome:?}", started.elapsed());
            // Killed while it is waited for, by whoever cares.
            let done = AtomicBool::new(false);
            thread::scope(|scope| {
                let waiting = scope.spawn(|| {
                    let outcome = pull(&worker, 1, Duration::from_secs(20));
                    done.store(true, Ordering::Release);
                    outcome
                });
                thread::sleep(Duration::from_millis(100));
                let before = done.load(Ordering::Acquire);
                let killed = Instant::now();
                remote.kill();
                let outcome = waiting.join().unwrap();
                if !before {
                    println!("  killed while waited for: {:?}: {outcome:?}", killed.elapsed());
                    assert!(killed.elapsed() <= Duration::from_secs(1), "{:?}", killed.elapsed());
                }
            });
            until("everything has settled", Duration::from_secs(5), || {
                let quarantined = worker
                    .call("poll", far(), |puller, _| puller.target.pool.stats().quarantined_bytes);
                quarantined.unwrap() == 0
            });
        }
    }
}

#[test]
fn p03_stopped_and_killed_peers_cost_a_deadline_one_sided() {
    isolated(
        "faults::p03_stopped_and_killed_peers_cost_a_deadline_one_sided",
        ONE_SIDED,
        stopped_and_killed,
    );
}

#[test]
fn p03_stopped_and_killed_peers_cost_a_deadline_emulated() {
    isolated(
        "faults::p03_stopped_and_killed_peers_cost_a_deadline_emulated",
        EMULATED,
        stopped_and_killed,
    );
}

/// A peer that published and then never takes a connection.
fn never_accepting() {
    let Some(mut remote) = Remote::start(MATRIX) else { return };
    let offer = remote.offer();
    remote.fill(1);
    for limit in DEADLINES {
        remote.pause();
        let worker = worker(&offer, Duration::from_secs(3));
        let started = Instant::now();
        let outcome = pull(&worker, 1, limit);
        println!("{limit:?}, never accepting: {:?}: {outcome:?}", started.elapsed());
        // A fresh agent does no better, and does not wait for the one before.
        let began = Instant::now();
        worker.renew(0, far()).unwrap();
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        let again = pull(&worker, 1, limit);
        assert_eq!(outcome.is_ok(), again.is_ok());
        remote.resume();
        until("a connection", Duration::from_secs(20), || {
            pull(&worker, 1, Duration::from_secs(5)).is_ok()
        });
        // The agent that could not connect is quiet now, and gone.
        until("the retired agent is gone", Duration::from_secs(20), || worker.stats().retired == 0);
        assert_eq!(reaper::stats().lost, 0);
    }
}

#[test]
fn p03_a_peer_that_never_accepts_costs_a_deadline_one_sided() {
    isolated(
        "faults::p03_a_peer_that_never_accepts_costs_a_deadline_one_sided",
        ONE_SIDED,
        never_accepting,
    );
}

#[test]
fn p03_a_peer_that_never_accepts_costs_a_deadline_emulated() {
    isolated(
        "faults::p03_a_peer_that_never_accepts_costs_a_deadline_emulated",
        EMULATED,
        never_accepting,
    );
}

/// In the process of a receiver, pulls until its time is over and ends in order.
fn receive() -> bool {
    let Ok(line) = std::env::var(RECEIVER) else { return false };
    let mut words = line.split(' ');
    let mut word = || words.next().unwrap();
    let time = Duration::from_micros(word().parse().unwrap());
    let offer = Offer {
        name: word().into(),
        address: word().parse().unwrap(),
        len: word().parse().unwrap(),
        metadata: unhex(word()),
    };
    let until = Instant::now() + time;
    let worker = worker(&offer, Duration::from_secs(10));
    while Instant::now() < until {
        let left = until.saturating_duration_since(Instant::now());
        // Whatever comes of it: the source may be stopped.
        drop(pull(&worker, 1, left.min(Duration::from_millis(500))));
    }
    drop(worker);
    true
}

fn receiver(offer: &Offer, time: Duration) -> Guarded {
    let Offer { name, metadata, address, len } = offer;
    let line = format!("{} {name} {address} {len} {}", time.as_micros(), hex(metadata));
    let mut command = command(&current(), &[(RECEIVER, &line)]);
    Guarded(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
}

/// Receivers are killed and end in order, at any point, while the source runs and while it is stopped. It survives.
fn receivers_come_and_go() {
    const BYTES: u64 = 32 << 20;
    if receive() {
        return;
    }
    let Some(mut remote) = Remote::start(BYTES) else { return };
    let offer = remote.offer();
    remote.fill(1);
    let mut random = random(seed());
    for round in 0..rounds(2) * 4 {
        let (kill, stop) = (round % 2 == 0, round % 4 >= 2);
        let time = Duration::from_micros(50_000 + random(400_000));
        let mut child = receiver(&offer, time);
        if stop {
            thread::sleep(Duration::from_micros(random(500_000)));
            remote.pause();
        }
        if kill {
            thread::sleep(Duration::from_micros(random(500_000)));
            child.0.kill().unwrap();
        }
        until("the receiver ends", Duration::from_secs(30), {
            let child = std::cell::RefCell::new(&mut child);
            move || child.borrow_mut().0.try_wait().unwrap().is_some()
        });
        println!("round {round}: kill {kill}, stop {stop}: {:?}", child.0.wait().unwrap());
        remote.resume();
        // It answers, and the next pull is right.
        let fill = u8::try_from(round % 100).unwrap() + 2;
        remote.fill(fill);
        let next = worker(&offer, Duration::from_secs(10));
        let started = Instant::now();
        pull(&next, fill, Duration::from_secs(5)).unwrap();
        println!("  the next pull took {:?}", started.elapsed());
        remote.fill(1);
    }
}

#[test]
fn p10_receivers_never_take_the_source_down_one_sided() {
    isolated(
        "faults::p10_receivers_never_take_the_source_down_one_sided",
        ONE_SIDED,
        receivers_come_and_go,
    );
}

#[test]
fn p10_receivers_never_take_the_source_down_emulated() {
    isolated(
        "faults::p10_receivers_never_take_the_source_down_emulated",
        EMULATED,
        receivers_come_and_go,
    );
}
