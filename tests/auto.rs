//! Two transports as one, without a GPU: both are in-process ones, on networks of their own, so that whether the near one
//! reaches a peer is for the test to say.

#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "the lint spares test functions, not what they call; numbers of sources are small"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use refit_planner::{Dims, Transform};
use refit_pool::{Allocator, HostAllocator, Key, Memory, Pool, PoolOptions, Region};
use refit_transport::auto::{Auto, AutoTransport, Never};
use refit_transport::conformance::{Harness, Report, cases, run_all};
use refit_transport::local::{LocalOptions, LocalTransport, Network};
use refit_transport::{
    Cause, LocalRange, Peer, Pull, PullError, ReadOp, RemoteRange, Status, Transport,
    TransportError, TransportRegistrar, Written,
};

type Two = Auto<Near, LocalTransport>;

/// An in-process transport that refuses some memory, and counts how often it was asked to post.
#[derive(Debug)]
struct Near {
    inner: LocalTransport,
    /// Regions of this many bytes are of a kind it does not handle.
    foreign: u64,
    posts: Arc<std::sync::atomic::AtomicUsize>,
}

impl Transport for Near {
    type Registration = <LocalTransport as Transport>::Registration;
    type Prepared = <LocalTransport as Transport>::Prepared;

    fn backend(&self) -> &'static str {
        self.inner.backend()
    }

    fn agent(&self) -> &str {
        self.inner.agent()
    }

    fn capabilities(&self) -> refit_planner::Capabilities {
        self.inner.capabilities()
    }

    fn metadata(&self) -> Result<Vec<u8>, TransportError> {
        self.inner.metadata()
    }

    fn register(&self, region: &Region) -> Result<Self::Registration, TransportError> {
        if region.len() == self.foreign {
            return Err(TransportError::Register {
                agent: self.agent().into(),
                len: region.len(),
                kind: region.kind(),
                cause: Cause::Kind,
            });
        }
        self.inner.register(region)
    }

    fn deregister(&self, registration: Self::Registration) -> Result<(), TransportError> {
        self.inner.deregister(registration)
    }

    fn connect(&self, name: &str, metadata: &[u8]) -> Result<Peer, TransportError> {
        self.inner.connect(name, metadata)
    }

    fn disconnect(&self, peer: &Peer) -> Result<(), TransportError> {
        self.inner.disconnect(peer)
    }

    fn prepare(&self, peer: &Peer, reads: &[ReadOp]) -> Result<Self::Prepared, TransportError> {
        self.inner.prepare(peer, reads)
    }

    fn written<'a>(&self, prepared: &'a Self::Prepared) -> &'a [Written] {
        self.inner.written(prepared)
    }

    fn reads(&self, prepared: &Self::Prepared) -> usize {
        self.inner.reads(prepared)
    }

    unsafe fn post(&self, prepared: &mut Self::Prepared) -> Result<Status, TransportError> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.post(prepared) }
    }

    unsafe fn post_all(
        &self,
        batches: &mut [Self::Prepared],
    ) -> Vec<Result<Status, TransportError>> {
        self.posts.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { self.inner.post_all(batches) }
    }

    fn poll(&self, prepared: &mut Self::Prepared) -> Result<Status, TransportError> {
        self.inner.poll(prepared)
    }

    fn suspect(&self, prepared: &Self::Prepared) {
        self.inner.suspect(prepared);
    }
}

/// Which agents have a near transport that reaches the others'.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nearby {
    All,
    /// All but the second source.
    Mixed,
    None,
}

struct World {
    near: Network,
    far: Network,
    nearby: Nearby,
    foreign: u64,
    posts: Arc<std::sync::atomic::AtomicUsize>,
}

impl World {
    fn new(nearby: Nearby) -> Self {
        let (near, far) = (Network::new(), Network::new());
        Self { near, far, nearby, foreign: u64::MAX, posts: Arc::default() }
    }

    fn near(&self, role: &str) -> Result<Near, TransportError> {
        let reached = match self.nearby {
            Nearby::All => true,
            Nearby::Mixed => role != "source1",
            Nearby::None => false,
        };
        let elsewhere = Network::new();
        let network = if reached { &self.near } else { &elsewhere };
        // Strides on the near one only, as with GPUs.
        let inner = LocalTransport::new(network, &format!("{role}.near"))?;
        Ok(Near { inner, foreign: self.foreign, posts: Arc::clone(&self.posts) })
    }

    fn far(&self, role: &str) -> Result<LocalTransport, TransportError> {
        let options = LocalOptions::default().with_strided_reads(false);
        LocalTransport::with_options(&self.far, role, options)
    }
}

impl Harness for World {
    type Transport = Two;
    type Allocator = HostAllocator;

    fn agent(&self, role: &str) -> Result<Two, TransportError> {
        Auto::new(Ok(self.near(role)?), Ok(self.far(role)?))
    }

    fn allocator(&self) -> HostAllocator {
        HostAllocator
    }
}

fn passed<H: Harness>(report: &Report) {
    assert!(report.failed.is_empty() && report.skipped.is_empty(), "{report}");
    assert_eq!(report.passed.len(), cases::<H>().len());
}

#[test]
fn passes_the_suite_where_the_near_one_reaches_everybody() {
    passed::<World>(&run_all(&World::new(Nearby::All)));
}

#[test]
fn passes_the_suite_where_it_reaches_nobody() {
    passed::<World>(&run_all(&World::new(Nearby::None)));
}

#[test]
fn passes_the_suite_where_it_reaches_some() {
    passed::<World>(&run_all(&World::new(Nearby::Mixed)));
}

/// Agents with one of the two.
struct Half<const NEAR: bool>(World);

impl<const NEAR: bool> Harness for Half<NEAR> {
    type Transport = Two;
    type Allocator = HostAllocator;

    fn agent(&self, role: &str) -> Result<Two, TransportError> {
        if NEAR {
            Auto::new(Ok(self.0.near(role)?), Err("left out".into()))
        } else {
            Auto::new(Err("no device".into()), Ok(self.0.far(role)?))
        }
    }

    fn allocator(&self) -> HostAllocator {
        HostAllocator
    }
}

#[test]
fn passes_the_suite_with_either_alone() {
    passed::<Half<true>>(&run_all(&Half::<true>(World::new(Nearby::All))));
    passed::<Half<false>>(&run_all(&Half::<false>(World::new(Nearby::All))));
}

fn memory(bytes: usize, fill: u8) -> Memory {
    let mut memory = HostAllocator.allocate(bytes).unwrap();
    memory.host_bytes_mut().unwrap().fill(fill);
    memory
}

fn read(from: &Memory, into: LocalRange, at: u64) -> ReadOp {
    let len = from.len() as u64;
    ReadOp {
        from: RemoteRange { address: from.address(), len, kind: from.kind() },
        into: LocalRange { address: into.address + at, len, kind: into.kind },
        run: len,
        dims: Dims::none(),
        transform: Transform::Copy,
        bulk: false,
    }
}

#[test]
fn routes_say_which_and_why() {
    let world = World::new(Nearby::Mixed);
    let target = world.agent("target").unwrap();
    let mut routes = Vec::new();
    for role in ["source0", "source1"] {
        let source = world.agent(role).unwrap();
        let weights = memory(4096, 1);
        let _registration = source.register(weights.allocation()).unwrap();
        let peer = target.connect(source.agent(), &source.metadata().unwrap()).unwrap();
        routes.push((target.route(&peer), target.capabilities_of(&peer)));
    }
    assert_eq!(routes[0].0, "local");
    let why = "local; not peer: the peer is not connected; connect to it first";
    assert_eq!(routes[1].0, why);
    assert!(routes[0].1.strided_reads && !routes[1].1.strided_reads);
    assert!(!target.capabilities().strided_reads, "one that has both promises what both do");
    let unknown = target.route(&Peer { name: "nobody".into() });
    assert!(unknown.contains("not connected"), "{unknown}");
}

#[test]
fn agents_that_lack_one_say_so() {
    let world = World::new(Nearby::All);
    let alone: Two = Auto::new(Ok(world.near("alone").unwrap()), Err("left out".into())).unwrap();
    let both = world.agent("both").unwrap();
    let far: Two = Auto::new(Err("no device".into()), Ok(world.far("far").unwrap())).unwrap();
    assert_eq!((alone.agent(), both.agent(), far.agent()), ("alone.near", "both", "far"));
    let connect = |reader: &Two, source: &Two| {
        let metadata = source.metadata().unwrap();
        reader.connect(source.agent(), &metadata).map(|peer| reader.route(&peer))
    };
    assert_eq!(connect(&alone, &both).unwrap(), "local; no nixl: left out");
    assert_eq!(connect(&both, &alone).unwrap(), "local; no nixl: the peer has none");
    assert_eq!(connect(&far, &both).unwrap(), "local; not peer: no device");
    assert_eq!(connect(&both, &far).unwrap(), "local; not peer: the peer has none");
    let error = connect(&far, &alone).unwrap_err();
    let TransportError::Connect { cause: Cause::NoRoute { why }, .. } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(why, "peer: no device; nixl: the peer has none");
    let neither: Result<Two, _> = Auto::new(Err("no device".into()), Err("left out".into()));
    let error = neither.unwrap_err().to_string();
    assert!(error.contains("peer: no device; nixl: left out"), "{error}");
}

/// An agent that has memory which the near one does not handle is read through the far one, all of it.
#[test]
fn memory_of_another_kind_is_for_the_far_one() {
    let world = World { foreign: 8192, ..World::new(Nearby::All) };
    let (source, target) = (world.agent("source").unwrap(), world.agent("target").unwrap());
    let (device, host) = (memory(4096, 1), memory(8192, 2));
    let _device = source.register(device.allocation()).unwrap();
    let peer = target.connect(source.agent(), &source.metadata().unwrap()).unwrap();
    assert_eq!(target.route(&peer), "local");
    let arena = memory(16_384, 0);
    let _arena = target.register(arena.allocation()).unwrap();
    let into = LocalRange { address: arena.address(), len: 16_384, kind: arena.kind() };
    let before = target.prepare(&peer, &[read(&device, into, 0)]).unwrap();

    let host_registration = source.register(host.allocation()).unwrap();
    target.connect(source.agent(), &source.metadata().unwrap()).unwrap();
    let route = target.route(&peer);
    assert!(
        route.contains("not peer: the peer has registered memory that is not a GPU's"),
        "{route}"
    );
    let after = target.prepare(&peer, &[read(&host, into, 4096)]).unwrap();

    // Batches of before stay good, and both run in one pull.
    let target = Arc::new(target);
    let pool = Pool::new(
        HostAllocator,
        TransportRegistrar::new(Arc::clone(&target)),
        PoolOptions::default(),
    );
    let lease =
        pool.lease(Key::from([0; 32]), |_| Ok::<_, TransportError>(vec![before, after])).unwrap();
    let settled = Pull::start(Arc::clone(&target), lease, vec![arena], ..)
        .unwrap()
        .wait(Instant::now() + Duration::from_secs(10))
        .unwrap();
    let bytes = settled.live[0].host_bytes().unwrap();
    assert!(bytes[..4096].iter().all(|&byte| byte == 1));
    assert!(bytes[4096..12_288].iter().all(|&byte| byte == 2));
    assert!(bytes[12_288..].iter().all(|&byte| byte == 0));

    // Leaving the peer leaves it both ways.
    target.disconnect(&peer).unwrap();
    let error = Pull::start(Arc::clone(&target), settled.lease, settled.live, ..).unwrap_err();
    assert!(matches!(error, PullError::Failed { .. }), "{error:?}");
    source.deregister(host_registration).unwrap();

    // Without a far one, there is nobody to take it.
    let alone: Two = Auto::new(Ok(world.near("alone").unwrap()), Err("left out".into())).unwrap();
    let refused = alone.register(host.allocation()).unwrap_err();
    assert!(
        matches!(&refused, TransportError::Register { agent, cause: Cause::Kind, .. }
        if agent == "peer/alone.near"),
        "{refused:?}"
    );
}

/// Batches of several peers either way: one post of the near one, whatever their order, and every byte in place.
#[test]
fn batches_are_posted_together_whatever_their_order() {
    const SOURCES: usize = 5;
    let world = World::new(Nearby::Mixed);
    let target = Arc::new(world.agent("target").unwrap());
    let pool = Pool::new(
        HostAllocator,
        TransportRegistrar::new(Arc::clone(&target)),
        PoolOptions::default(),
    );
    // The second, the fourth and so on are far.
    let elsewhere =
        World { near: Network::new(), far: world.far.clone(), ..World::new(Nearby::All) };
    let sources: Vec<_> = (0..SOURCES)
        .map(|index| {
            let from = if index % 2 == 0 { &world } else { &elsewhere };
            let source = from.agent(&format!("s{index}")).unwrap();
            let weights = memory(1000, u8::try_from(index).unwrap() + 1);
            let registration = source.register(weights.allocation()).unwrap();
            (source, weights, registration)
        })
        .collect();
    let lease = pool.lease(Key::from([0; 32]), |build| {
        let arena = build.arena(1000 * SOURCES as u64).unwrap();
        let into =
            LocalRange { address: arena.address(), len: 1000 * SOURCES as u64, kind: arena.kind() };
        let batches = sources.iter().enumerate().map(|(index, (source, weights, _))| {
            let peer = target.connect(source.agent(), &source.metadata()?)?;
            target.prepare(&peer, &[read(weights, into, 1000 * index as u64)])
        });
        batches.collect::<Result<Vec<_>, TransportError>>()
    });
    let settled = Pull::start(Arc::clone(&target), lease.unwrap(), Vec::new(), ..)
        .unwrap()
        .wait(Instant::now() + Duration::from_secs(10))
        .unwrap();
    let bytes = settled.lease.arenas()[0].host_bytes().unwrap();
    for (index, part) in bytes.chunks(1000).enumerate() {
        assert!(part.iter().all(|&byte| byte == u8::try_from(index).unwrap() + 1), "part {index}");
    }
    assert_eq!(world.posts.load(std::sync::atomic::Ordering::Relaxed), 1);

    // A far one in the middle fails: what ran beside it settles, what was not posted says so, nothing is lost.
    let peer = Peer { name: sources[1].0.agent().into() };
    target.disconnect(&peer).unwrap();
    let pulled = Pull::start(Arc::clone(&target), settled.lease, Vec::new(), ..)
        .and_then(|pull| pull.wait(Instant::now() + Duration::from_secs(10)));
    let Err(PullError::Failed { errors, .. }) = pulled else { panic!("{pulled:?}") };
    let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
    assert!(texts[0].contains("nixl/target") && texts[0].contains("`s1`"), "{texts:?}");
    assert_eq!(pool.stats().quarantined_bytes, 0);
}

/// The types that a build without a GPU and without NIXL has.
#[test]
fn a_build_without_either_says_so() {
    let neither = Auto::<Never, Never>::new(Err("no driver".into()), Err("left out".into()));
    assert!(matches!(neither, Err(TransportError::Start { .. })));
    let named: fn(Result<_, String>, Result<_, String>) -> Result<AutoTransport, TransportError> =
        AutoTransport::new;
    assert!(named(Err("no driver".into()), Err("left out".into())).is_err());
}
