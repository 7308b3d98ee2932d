//! P9 over NIXL: a receiver whose source restarts again and again, at new addresses.
//!
//! NIXL keeps a file or two of every peer that it joined. So files grow with restarts, within bounds, and are given back
//! when the worker recycles its agent.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::{Duration, Instant};

use refit_pool::{Allocator, HostAllocator};
use refit_service::worker::{Agent, Standing, Worker, WorkerOptions};
use refit_tests::link::{Link, answer, hex, unhex};
use refit_transport::Transport;
use refit_transport::conformance::Harness;
use refit_transport::nixl::NixlOptions;

use crate::isolated::{Guarded, command, current, isolated};
use crate::peer::Offer;
use crate::{EMULATED, Nixl, ONE_SIDED, Target, check};

const ROLE: &str = "REFIT_NIXL_RESTARTS";
const BYTES: usize = 256 << 10;

/// So many restarts within a process of a source, before that is started anew as well.
const LIVES: u64 = 60;

/// How often a source restarts: more than an agent joins before it is recycled, on one lane at least.
fn restarts() -> u64 {
    let few = if std::env::var("UCX_TLS").is_ok_and(|lanes| lanes == "tcp") { 40 } else { 300 };
    std::env::var("REFIT_REJOINS").map_or(few, |count| count.parse().unwrap())
}

/// What every byte of a life is.
fn byte(life: u64) -> u8 {
    u8::try_from(life % 251).unwrap() + 1
}

/// Lives once for every line of the input, in another agent and in other memory than in the lives before.
fn live() {
    let mut held = None;
    for line in std::io::stdin().lines() {
        let life = line.unwrap().trim().parse().unwrap();
        // Before the last one goes, so that it is elsewhere.
        let mut memory = HostAllocator.allocate(BYTES).unwrap();
        memory.host_bytes_mut().unwrap().fill(byte(life));
        drop(held.take());
        let transport = Nixl.agent("source").unwrap();
        let registration = transport.register(memory.allocation()).unwrap();
        let metadata = hex(&transport.metadata().unwrap());
        answer(&format!("{} {} {metadata}", transport.agent(), memory.address()));
        held = Some((registration, transport, memory));
    }
}

struct Sources {
    child: Guarded,
    link: Link,
}

impl Sources {
    fn start() -> Self {
        let mut child = command(&current(), &[(ROLE, "1")]);
        let child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut child = Guarded(child);
        let link = Link::of(&mut child.0);
        Self { child, link }
    }

    fn next(&mut self, life: u64) -> Offer {
        self.link.tell(&life.to_string());
        let line = self.link.reply();
        let mut words = line.split(' ');
        let mut word = || words.next().unwrap();
        let (name, address) = (word().to_owned(), word().parse().unwrap());
        Offer { name, metadata: unhex(word()), address, len: BYTES as u64 }
    }
}

/// What a worker owns here: a target of whatever source there is.
struct Joiner {
    target: Target,
    met: Option<String>,
    joins: u64,
}

impl Joiner {
    fn new(offer: Offer) -> Self {
        Self { target: Target::with(NixlOptions::new("target"), offer), met: None, joins: 0 }
    }

    fn pull(&mut self, offer: Offer, life: u64) {
        if self.met.as_ref() != Some(&offer.name) {
            if let Some(name) = self.met.replace(offer.name.clone()) {
                // Its prepared reads go first.
                self.target.pool.clear();
                drop(self.target.transport.disconnect(&refit_transport::Peer { name }));
            }
            self.joins += 1;
        }
        self.target.offer = offer;
        let settled = self.target.pull(Duration::from_secs(20)).unwrap();
        check(&settled, byte(life));
    }
}

impl Agent for Joiner {
    fn name(&self) -> String {
        self.target.transport.agent().to_owned()
    }

    fn poll(&mut self) -> Standing {
        if self.target.transport.unsettled() == 0 { Standing::Quiet } else { Standing::Restless }
    }

    fn bytes(&self) -> u64 {
        self.target.pool.stats().bytes
    }

    fn joins(&self) -> u64 {
        self.joins
    }
}

/// Files, threads and resident KiB of this process.
fn usage() -> (u64, u64, u64) {
    let entries = |path: &str| std::fs::read_dir(path).unwrap().count() as u64;
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let resident = resident.trim().trim_end_matches(" kB").parse().unwrap();
    (entries("/proc/self/fd"), entries("/proc/self/task"), resident)
}

fn rejoins() {
    if std::env::var_os(ROLE).is_some() {
        return live();
    }
    let far = || Instant::now() + Duration::from_secs(30);
    let mut sources = Sources::start();
    let first = sources.next(0);
    let offer = first.clone();
    let worker =
        Worker::start("joiner", WorkerOptions::default(), far(), move |old: Option<Joiner>| {
            drop(old);
            Ok(Joiner::new(offer.clone()))
        });
    let worker = worker.unwrap();
    let (mut names, mut addresses) = (BTreeSet::new(), BTreeSet::new());
    let mut join = |sources: &mut Sources, life: u64| {
        let offer = if life == 0 { first.clone() } else { sources.next(life) };
        names.insert(offer.name.clone());
        addresses.insert(offer.address);
        worker.call("pull", far(), move |joiner, _| joiner.pull(offer, life)).unwrap();
    };
    // Whatever is made once.
    (0..8).for_each(|life| join(&mut sources, life));
    let (files, threads, resident) = usage();
    let (mut most_files, mut most_resident, mut recycled, mut since) = (0, 0, 0, 0_u64);
    let started = Instant::now();
    for life in 8..8 + restarts() {
        if life % LIVES == 0 {
            drop(std::mem::replace(&mut sources, Sources::start()));
        }
        join(&mut sources, life);
        since += 1;
        let now = usage();
        if worker.stats().recycled > recycled {
            recycled += 1;
            println!("recycled after {life} restarts: {} files", now.0);
            since = 1;
        }
        most_files = most_files.max(now.0);
        most_resident = most_resident.max(now.2);
        // Pipes to a source that is started anew aside.
        assert!(now.0 <= files + 2 * since + 8, "{} files of {files}, {since} joins", now.0);
        assert!(now.1 <= threads + 2, "{} threads of {threads}", now.1);
    }
    // It is recycled when it is quiet, which may be behind the last answer.
    let expected = (8 + restarts()) / 256;
    let until = far();
    while worker.stats().recycled < expected && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    let end = usage();
    println!(
        "{} restarts in {:?}: {files} files, {most_files} at most, {} at the end; {threads} threads, {} at the end; \
         {resident} KiB, {most_resident} at most, {} at the end",
        restarts(),
        started.elapsed(),
        end.0,
        end.1,
        end.2
    );
    assert_eq!(names.len() as u64, 8 + restarts(), "a name came back");
    assert!(addresses.len() > 2, "every life was at one address");
    assert_eq!(worker.stats().recycled, expected, "recycled by 256");
    assert!(most_resident <= resident + (32 << 10), "{most_resident} KiB of {resident}");
    assert_eq!(worker.stats().retired, 0);
    drop(sources.child);
}

#[test]
fn p09_restarts_of_a_peer_cost_files_until_256_one_sided() {
    isolated("rejoins::p09_restarts_of_a_peer_cost_files_until_256_one_sided", ONE_SIDED, rejoins);
}

#[test]
fn p09_restarts_of_a_peer_cost_files_until_256_emulated() {
    isolated("rejoins::p09_restarts_of_a_peer_cost_files_until_256_emulated", EMULATED, rejoins);
}
