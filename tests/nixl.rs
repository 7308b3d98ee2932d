//! The transport over real NIXL. Needs the library, not hardware: `cargo xtask setup` fetches it.
//!
//! Every test runs in a process of its own, one at a time: the guard decides once per process, environment variables
//! choose what UCX uses, a crash is the crash of one test, and NIXL does not like to be tested in parallel.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "the lint spares test functions, not what they call"
)]

#[path = "nixl/errors.rs"]
mod errors;
#[path = "nixl/exact.rs"]
mod exact;
#[path = "nixl/failover.rs"]
mod failover;
#[path = "nixl/faults.rs"]
mod faults;
#[path = "nixl/guard.rs"]
mod guard;
#[path = "nixl/hostile.rs"]
mod hostile;
#[path = "nixl/isolated.rs"]
mod isolated;
#[path = "nixl/lanes.rs"]
mod lanes;
#[path = "nixl/pack.rs"]
mod pack;
#[path = "nixl/peer.rs"]
mod peer;
#[path = "nixl/rejoins.rs"]
mod rejoins;
#[path = "nixl/remap.rs"]
mod remap;
#[path = "nixl/stress.rs"]
mod stress;
#[path = "nixl/versions.rs"]
mod versions;

use std::sync::Arc;
use std::time::{Duration, Instant};

use refit_planner::{Dims, Transform};
use refit_pool::{HostAllocator, Key, LeaseError, Pool, PoolOptions};
use refit_transport::conformance::{Case, Harness, Outcome, cases};
use refit_transport::nixl::{NixlOptions, NixlTransport};
use refit_transport::{
    LocalRange, Pull, PullError, ReadOp, RemoteRange, Settled, Transport, TransportError,
    TransportLease, TransportPool, TransportRegistrar,
};

use crate::isolated::{isolated, library};
use crate::peer::{Offer, Remote};

/// Reads are one-sided: the processor of the reader copies.
const ONE_SIDED: &[(&str, &str)] = &[];
/// Reads are emulated over messages: the other process has to answer.
const EMULATED: &[(&str, &str)] = &[("UCX_TLS", "tcp")];

struct Nixl;

impl Harness for Nixl {
    type Transport = NixlTransport;
    type Allocator = HostAllocator;

    fn agent(&self, role: &str) -> Result<NixlTransport, TransportError> {
        NixlTransport::new(library(), NixlOptions::new(role))
    }

    fn allocator(&self) -> HostAllocator {
        HostAllocator
    }

    fn reads_fail_without_owner(&self) -> bool {
        // Between processes of one host nothing checks a read but the reader.
        false
    }
}

fn conformance<H: Harness>(harness: &H) {
    // One by one, so that a crash names its case. `REFIT_CONFORMANCE_CASE` picks one.
    let only = std::env::var("REFIT_CONFORMANCE_CASE").ok();
    for Case { name, run } in cases::<H>() {
        if only.as_ref().is_none_or(|only| only == name) {
            println!("case {name}");
            match run(harness).unwrap_or_else(|failure| panic!("{name}: {failure}")) {
                Outcome::Passed => {}
                Outcome::Skipped(why) => {
                    println!("skipped: {why}");
                    assert_eq!(
                        name, "pulls_dropped_in_flight",
                        "only this case may be out of reach"
                    );
                }
            }
        }
    }
}

#[test]
fn passes_the_suite_one_sided() {
    isolated("passes_the_suite_one_sided", ONE_SIDED, || conformance(&Nixl));
}

#[test]
fn passes_the_suite_emulated() {
    isolated("passes_the_suite_emulated", EMULATED, || conformance(&Nixl));
}

/// The choice between transports, where there is none: the host's memory is NIXL's.
#[cfg(feature = "cuda")]
mod auto {
    use refit_transport::auto::AutoTransport;

    use super::*;

    struct Auto;

    impl Harness for Auto {
        type Transport = AutoTransport;
        type Allocator = HostAllocator;

        fn agent(&self, role: &str) -> Result<AutoTransport, TransportError> {
            AutoTransport::new(Err("the memory is the host's".into()), Ok(Nixl.agent(role)?))
        }

        fn allocator(&self) -> HostAllocator {
            HostAllocator
        }

        fn reads_fail_without_owner(&self) -> bool {
            Nixl.reads_fail_without_owner()
        }
    }

    #[test]
    fn passes_the_suite_through_nixl() {
        isolated("auto::passes_the_suite_through_nixl", ONE_SIDED, || {
            conformance(&Auto);
            let (source, target) = (Auto.agent("source").unwrap(), Auto.agent("target").unwrap());
            let peer = target.connect(source.agent(), &source.metadata().unwrap()).unwrap();
            let route = target.route(&peer);
            assert!(route.ends_with("; not peer: the memory is the host's"), "{route}");
        });
    }
}

#[test]
fn names_carry_an_incarnation() {
    isolated("names_carry_an_incarnation", ONE_SIDED, || {
        let [first, second] = [(); 2].map(|()| Nixl.agent("trainer-3").unwrap());
        assert!(first.agent().starts_with("trainer-3-") && first.agent() != second.agent());
        assert_eq!(first.agent().len(), "trainer-3-".len() + 32);
        for prefix in ["", "a b", "a\0"] {
            assert!(matches!(Nixl.agent(prefix), Err(TransportError::Start { .. })), "{prefix:?}");
        }
        let options = NixlOptions::new("x").with_param("num_threads", "2");
        assert!(matches!(
            NixlTransport::new(library(), options),
            Err(TransportError::Start { .. })
        ));
    });
}

/// A target and one lease-ful of reads of everything a remote process offers.
struct Target {
    transport: Arc<NixlTransport>,
    pool: TransportPool<NixlTransport>,
    offer: Offer,
}

impl Target {
    fn new(offer: Offer) -> Self {
        Self::with(NixlOptions::new("target"), offer)
    }

    fn with(options: NixlOptions, offer: Offer) -> Self {
        let transport = Arc::new(NixlTransport::new(library(), options).unwrap());
        let pool = Pool::new(
            HostAllocator,
            TransportRegistrar::new(Arc::clone(&transport)),
            PoolOptions::default(),
        );
        Self { transport, pool, offer }
    }

    /// Pulls everything in 64 reads.
    fn start(&self) -> Result<Pull<NixlTransport>, PullError<NixlTransport>> {
        let lease = self.lease().unwrap();
        Pull::start(Arc::clone(&self.transport), lease, Vec::new(), ..)
    }

    /// As [`start`](Self::start), where the peer may not even be reached.
    fn try_start(&self) -> Result<Pull<NixlTransport>, Box<dyn std::error::Error>> {
        Ok(Pull::start(Arc::clone(&self.transport), self.lease()?, Vec::new(), ..)?)
    }

    fn lease(&self) -> Result<TransportLease<NixlTransport>, LeaseError<TransportError>> {
        let Offer { name, metadata, address, len } = &self.offer;
        self.pool.lease(Key::from([1; 32]), |build| {
            let arena = build.arena(*len).unwrap();
            let peer = self.transport.connect(name, metadata)?;
            let run = len / 64;
            let reads: Vec<ReadOp> = (0..64)
                .map(|read| ReadOp {
                    from: RemoteRange {
                        address: address + read * run,
                        len: run,
                        kind: arena.kind(),
                    },
                    into: LocalRange {
                        address: arena.address() + (63 - read) * run,
                        len: run,
                        kind: arena.kind(),
                    },
                    run,
                    dims: Dims::none(),
                    transform: Transform::Copy,
                    bulk: false,
                })
                .collect();
            Ok(vec![self.transport.prepare(&peer, &reads)?])
        })
    }

    fn pull(&self, patience: Duration) -> Result<Settled<NixlTransport>, PullError<NixlTransport>> {
        self.start()?.wait(Instant::now() + patience)
    }
}

fn check(settled: &Settled<NixlTransport>, fill: u8) {
    let bytes = settled.lease.arenas()[0].host_bytes().unwrap();
    assert!(bytes.iter().all(|&byte| byte == fill), "not every byte is {fill}");
}

fn two_processes() {
    let Some(mut remote) = Remote::start(32 << 20) else { return };
    let target = Target::new(remote.offer());
    for cycle in 1..=20 {
        remote.fill(cycle);
        let settled = target.pull(Duration::from_secs(20)).unwrap();
        assert_eq!(settled.lease.is_hit(), cycle > 1);
        check(&settled, cycle);
    }
}

#[test]
fn two_processes_one_sided() {
    isolated("two_processes_one_sided", ONE_SIDED, two_processes);
}

#[test]
fn two_processes_emulated() {
    isolated("two_processes_emulated", EMULATED, two_processes);
}

/// A trainer that died between two refits costs an error, not memory.
fn killed_between_pulls() {
    let Some(mut remote) = Remote::start(8 << 20) else { return };
    let target = Target::new(remote.offer());
    remote.fill(1);
    drop(target.pull(Duration::from_secs(20)).unwrap());
    remote.kill();
    std::thread::sleep(Duration::from_millis(300));
    let started = Instant::now();
    let error = target.pull(Duration::from_secs(20)).unwrap_err();
    println!("killed peer reported after {:?}: {error}", started.elapsed());
    assert!(matches!(error, PullError::Failed { .. }), "{error:?}");
    drop(error);
    assert_eq!(target.pool.stats().quarantined_bytes, 0);
    // And again: the peer stays gone.
    assert!(matches!(target.pull(Duration::from_secs(20)), Err(PullError::Failed { .. })));
    assert_eq!(target.pool.stats().quarantined_bytes, 0);
}

#[test]
fn killed_between_pulls_one_sided() {
    isolated("killed_between_pulls_one_sided", ONE_SIDED, killed_between_pulls);
}

#[test]
fn killed_between_pulls_emulated() {
    isolated("killed_between_pulls_emulated", EMULATED, killed_between_pulls);
}

/// Without the byte in front of a batch the bytes are the same; a peer that dies costs an error then too, and perhaps
/// memory, which is kept apart for good.
fn peers_that_answered_need_not_be_asked() {
    let Some(mut remote) = Remote::start(8 << 20) else { return };
    let options = NixlOptions::new("target").with_probe_after(Duration::from_secs(600));
    let target = Target::with(options, remote.offer());
    for cycle in 1..=20 {
        remote.fill(cycle);
        check(&target.pull(Duration::from_secs(20)).unwrap(), cycle);
    }
    remote.kill();
    std::thread::sleep(Duration::from_millis(300));
    let error = target.pull(Duration::from_secs(20)).unwrap_err();
    println!("killed peer: {error}");
    let kept_apart = match &error {
        PullError::Failed { .. } => 0,
        PullError::Lost { .. } => 8 << 20,
        other => panic!("{other:?}"),
    };
    drop(error);
    assert_eq!(target.pool.stats().quarantined_bytes, kept_apart);
}

#[test]
fn peers_that_answered_need_not_be_asked_one_sided() {
    isolated(
        "peers_that_answered_need_not_be_asked_one_sided",
        ONE_SIDED,
        peers_that_answered_need_not_be_asked,
    );
}

#[test]
fn peers_that_answered_need_not_be_asked_emulated() {
    isolated(
        "peers_that_answered_need_not_be_asked_emulated",
        EMULATED,
        peers_that_answered_need_not_be_asked,
    );
}

/// A trainer that hangs costs a deadline; when it goes on, so does the same pull, and every byte is right.
#[test]
fn a_paused_peer_is_waited_for() {
    isolated("a_paused_peer_is_waited_for", EMULATED, || {
        let Some(mut remote) = Remote::start(32 << 20) else { return };
        let target = Target::new(remote.offer());
        remote.fill(1);
        drop(target.pull(Duration::from_secs(20)).unwrap());
        remote.fill(2);
        remote.pause();
        let started = Instant::now();
        let error = target.pull(Duration::from_millis(300)).unwrap_err();
        println!("deadline of 300 ms kept in {:?}", started.elapsed());
        let PullError::Deadline { pull } = error else { panic!("{error:?}") };
        remote.resume();
        let settled = pull.wait(Instant::now() + Duration::from_secs(20)).unwrap();
        check(&settled, 2);
    });
}

/// A trainer that is killed while it hangs settles the pull: the memory comes back and stays as it is.
#[test]
fn killing_a_paused_peer_settles_its_reads() {
    isolated("killing_a_paused_peer_settles_its_reads", EMULATED, || {
        let Some(mut remote) = Remote::start(32 << 20) else { return };
        let target = Target::new(remote.offer());
        remote.fill(1);
        drop(target.pull(Duration::from_secs(20)).unwrap());
        remote.fill(2);
        remote.pause();
        let pull = match target.pull(Duration::from_millis(200)) {
            Err(PullError::Deadline { pull }) => pull,
            other => panic!("{other:?}"),
        };
        let started = Instant::now();
        remote.kill();
        let error = pull.wait(Instant::now() + Duration::from_secs(20)).unwrap_err();
        println!("settled {:?} after the kill: {error}", started.elapsed());
        let PullError::Failed { mut lease, .. } = error else { panic!("{error:?}") };
        let bytes = lease.arenas_mut()[0].host_bytes_mut().unwrap();
        bytes.fill(0xEE);
        std::thread::sleep(Duration::from_millis(500));
        assert!(bytes.iter().all(|&byte| byte == 0xEE), "a settled read wrote memory");
    });
}

/// A pull dropped while its peer hangs is quarantined; what arrives later arrives nowhere else.
#[test]
fn an_abandoned_pull_writes_quarantined_memory_only() {
    isolated("an_abandoned_pull_writes_quarantined_memory_only", EMULATED, || {
        const BYTES: u64 = 32 << 20;
        let Some(mut remote) = Remote::start(BYTES) else { return };
        let target = Target::new(remote.offer());
        remote.fill(1);
        drop(target.pull(Duration::from_secs(20)).unwrap());
        remote.pause();
        match target.pull(Duration::from_millis(200)) {
            Err(PullError::Deadline { pull }) => drop(pull),
            other => panic!("{other:?}"),
        }
        assert_eq!(target.pool.stats().quarantined_bytes, BYTES);
        let peer = refit_transport::Peer { name: target.offer.name.clone() };
        assert!(matches!(
            target.transport.prepare(&peer, &[]),
            Err(TransportError::Suspect { .. })
        ));

        // A new agent of the same process goes on, in memory of its own.
        let next = Target::new(target.offer.clone());
        remote.resume();
        remote.fill(3);
        let settled = next.pull(Duration::from_secs(20)).unwrap();
        check(&settled, 3);
        drop((settled, target));
        check(&next.pull(Duration::from_secs(20)).unwrap(), 3);
    });
}

/// Thousands of cycles leave nothing behind.
#[test]
fn cycles_keep_no_descriptors() {
    isolated("cycles_keep_no_descriptors", ONE_SIDED, || {
        let Some(mut remote) = Remote::start(1 << 16) else { return };
        let target = Target::new(remote.offer());
        remote.fill(1);
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        for _ in 0..100 {
            drop(target.pull(Duration::from_secs(20)).unwrap());
        }
        let before = open();
        let started = Instant::now();
        for _ in 0..3_000 {
            drop(target.pull(Duration::from_secs(20)).unwrap());
        }
        println!("3,000 warm cycles of 64 x 1 KiB: {:?} each", started.elapsed() / 3_000);
        assert_eq!(open(), before);
    });
}

/// What a finer engine wants of row-parallel parameters crosses the wire once.
fn packs() {
    for (source_tp, target_tp) in [(1, 2), (2, 4), (1, 4)] {
        pack::packed(source_tp, target_tp);
    }
}

#[test]
fn packs_one_sided() {
    isolated("packs_one_sided", ONE_SIDED, packs);
}

#[test]
fn packs_emulated() {
    isolated("packs_emulated", EMULATED, packs);
}

#[test]
fn rewritten_while_pulled_one_sided() {
    isolated("rewritten_while_pulled_one_sided", ONE_SIDED, versions::rewritten_while_pulled);
}

#[test]
fn rewritten_while_pulled_emulated() {
    isolated("rewritten_while_pulled_emulated", EMULATED, versions::rewritten_while_pulled);
}
