//! Reads between GPUs: in one process, and between processes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use refit_planner::{Dims, Transform};
use refit_pool::cuda::{CudaAllocator, Device, Stream, download, upload};
use refit_pool::{Allocator, HostAllocator, Key, Memory, MemoryKind, Pool, PoolOptions};
use refit_transport::auto::AutoTransport;
use refit_transport::conformance::{Case, Harness, Outcome, cases};
use refit_transport::peer::{Engines, PeerOptions, PeerTransport};
use refit_transport::{
    Cause, LocalRange, Peer, Pull, PullError, ReadOp, RemoteRange, Settled, Transport,
    TransportError, TransportPool, TransportRegistrar,
};

use crate::gpu::Gpus;
use crate::remote::{Offer, Remote};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn agent(device: &Device, options: PeerOptions) -> PeerTransport {
    PeerTransport::new(Arc::new(Stream::new(device).unwrap()), options).unwrap()
}

pub(crate) fn bytes_of(device: &Device, memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; memory.len()];
    download(device, memory, 0, &mut bytes).unwrap();
    bytes
}

/// Sources on one device, targets on another or the same.
struct Devices {
    source: Device,
    target: Device,
    engines: Engines,
}

impl Devices {
    fn of(&self, role: &str) -> &Device {
        if role.starts_with("source") { &self.source } else { &self.target }
    }

    fn peer(&self, role: &str) -> Result<PeerTransport, TransportError> {
        let stream = Stream::new(self.of(role))
            .map_err(|error| TransportError::Start { agent: role.into(), cause: error.into() })?;
        PeerTransport::new(Arc::new(stream), PeerOptions::new(role).with_engines(self.engines))
    }

    fn device(&self, memory: &Memory) -> &Device {
        if memory.kind() == self.source.kind() { &self.source } else { &self.target }
    }

    fn read(&self, memory: &Memory) -> Vec<u8> {
        bytes_of(self.device(memory), memory)
    }

    fn write(&self, memory: &mut Memory, bytes: &[u8]) {
        let device = self.device(memory).clone();
        upload(&device, memory, 0, bytes).unwrap();
    }
}

impl Harness for Devices {
    type Transport = PeerTransport;
    type Allocator = CudaAllocator;

    fn agent(&self, role: &str) -> Result<PeerTransport, TransportError> {
        self.peer(role)
    }

    fn allocator(&self) -> CudaAllocator {
        CudaAllocator::new(self.target.clone())
    }

    fn source_allocator(&self) -> CudaAllocator {
        CudaAllocator::new(self.source.clone())
    }

    fn read(&self, memory: &Memory) -> Vec<u8> {
        self.read(memory)
    }

    fn write(&self, memory: &mut Memory, bytes: &[u8]) {
        self.write(memory, bytes);
    }
}

/// The same, by the transport that chooses.
struct Auto<F> {
    devices: Devices,
    make: F,
    reads_fail_without_owner: bool,
}

impl<F: Fn(&str) -> Result<AutoTransport, TransportError>> Harness for Auto<F> {
    type Transport = AutoTransport;
    type Allocator = CudaAllocator;

    fn agent(&self, role: &str) -> Result<AutoTransport, TransportError> {
        (self.make)(role)
    }

    fn allocator(&self) -> CudaAllocator {
        CudaAllocator::new(self.devices.target.clone())
    }

    fn source_allocator(&self) -> CudaAllocator {
        CudaAllocator::new(self.devices.source.clone())
    }

    fn read(&self, memory: &Memory) -> Vec<u8> {
        self.devices.read(memory)
    }

    fn write(&self, memory: &mut Memory, bytes: &[u8]) {
        self.devices.write(memory, bytes);
    }

    fn reads_fail_without_owner(&self) -> bool {
        self.reads_fail_without_owner
    }
}

fn conformance<H: Harness>(harness: &H) {
    let mut failed = Vec::new();
    for Case { name, run } in cases::<H>() {
        match run(harness) {
            Ok(Outcome::Passed) => {}
            Ok(Outcome::Skipped(why)) => {
                println!("{name} skipped: {why}");
                assert_eq!(name, "pulls_dropped_in_flight", "only this case may be out of reach");
            }
            Err(failure) => failed.push(format!("{name}: {failure}")),
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn passes_the_suite_on_one_device() {
    let Some(gpus) = Gpus::get("peer::passes_the_suite_on_one_device", 1) else { return };
    for engines in [Engines::AsPlanned, Engines::Kernel, Engines::Copy] {
        conformance(&Devices { source: gpus[0].clone(), target: gpus[0].clone(), engines });
    }
}

#[test]
fn passes_the_suite_between_devices() {
    let Some(gpus) = Gpus::get("peer::passes_the_suite_between_devices", 2) else { return };
    for engines in [Engines::AsPlanned, Engines::Kernel, Engines::Copy] {
        conformance(&Devices { source: gpus[1].clone(), target: gpus[0].clone(), engines });
    }
}

#[test]
fn auto_without_nixl_passes_the_suite() {
    let Some(gpus) = Gpus::get("peer::auto_without_nixl_passes_the_suite", 1) else { return };
    let devices = || Devices {
        source: gpus[gpus.len() - 1].clone(),
        target: gpus[0].clone(),
        engines: Engines::AsPlanned,
    };
    let make = |role: &str| AutoTransport::new(Ok(devices().peer(role)?), Err("left out".into()));
    conformance(&Auto { devices: devices(), make, reads_fail_without_owner: true });
    let (source, target) = (make("source").unwrap(), make("target").unwrap());
    let peer = target.connect(source.agent(), &source.metadata().unwrap()).unwrap();
    let route = target.route(&peer);
    println!("{route}");
    assert!(route.starts_with("peer: same process, direct access, device 0 <- device "), "{route}");
    assert!(route.ends_with("; no nixl: left out"), "{route}");
}

/// One source by mapping its memory, the next through NIXL, all of them in one pull.
#[cfg(feature = "nixl")]
#[test]
fn auto_passes_the_suite_with_both() {
    use refit_transport::nixl::{NixlOptions, NixlTransport};

    use crate::isolated::{isolated, library};

    isolated("peer::auto_passes_the_suite_with_both", &[], || {
        let Some(gpus) = Gpus::get("peer::auto_passes_the_suite_with_both", 1) else { return };
        let devices = || Devices {
            source: gpus[gpus.len() - 1].clone(),
            target: gpus[0].clone(),
            engines: Engines::AsPlanned,
        };
        let make = |role: &str| {
            let devices = devices();
            let peer = match role {
                "source1" => Err("it is told not to".into()),
                _ => Ok(devices.peer(role)?),
            };
            let options = NixlOptions::on_device(role, devices.of(role).clone());
            AutoTransport::new(peer, Ok(NixlTransport::new(library(), options)?))
        };
        // NIXL does not notice.
        conformance(&Auto { devices: devices(), make, reads_fail_without_owner: false });
        let target = make("target").unwrap();
        let routes = ["source0", "source1"].map(|role| {
            let source = make(role).unwrap();
            let peer = target.connect(source.agent(), &source.metadata().unwrap()).unwrap();
            target.route(&peer)
        });
        println!("{routes:#?}");
        assert!(routes[0].starts_with("peer: same process"), "{routes:?}");
        assert!(routes[1].ends_with("; not peer: the peer has none"), "{routes:?}");
    });
}

#[test]
fn memory_of_others_is_refused() {
    let Some(gpus) = Gpus::get("peer::memory_of_others_is_refused", 1) else { return };
    let transport = agent(&gpus[0], PeerOptions::new("x"));
    let host = HostAllocator.allocate(4096).unwrap();
    let refused = transport.register(host.allocation()).unwrap_err();
    assert!(matches!(refused, TransportError::Register { cause: Cause::Kind, .. }), "{refused:?}");
    if let Some(other) = gpus.get(1) {
        let memory = CudaAllocator::new(other.clone()).allocate(4096).unwrap();
        let refused = transport.register(memory.allocation()).unwrap_err();
        assert!(
            matches!(refused, TransportError::Register { cause: Cause::Device { agent: 0 }, .. }),
            "{refused:?}"
        );
    }
    for prefix in ["", "a b", &"x".repeat(200)] {
        let stream = Arc::new(Stream::new(&gpus[0]).unwrap());
        let refused = PeerTransport::new(stream, PeerOptions::new(prefix)).unwrap_err();
        assert!(matches!(refused, TransportError::Start { .. }), "{refused:?}");
    }
}

/// Memory that no other process could map is refused where it is registered, not where it is read.
#[test]
fn memory_that_cannot_be_exported_is_refused() {
    let Some(gpus) = Gpus::get("peer::memory_that_cannot_be_exported_is_refused", 1) else {
        return;
    };
    let device = &gpus[0];
    let transport = agent(device, PeerOptions::new("x"));
    let entered = device.enter().unwrap();
    let stream = std::ptr::null_mut();
    // SAFETY: the device is current; the memory is never looked at.
    let address = unsafe { cudarc::driver::result::malloc_async(stream, 1 << 20) }.unwrap();
    device.synchronize().unwrap();
    let start = std::ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap());
    let start = std::ptr::NonNull::new(start).unwrap();
    // SAFETY: so many bytes are there, and nobody reads or writes them.
    let memory = unsafe { Memory::adopt(start, 1 << 20, device.kind(), Arc::new(())) };
    let refused = transport.register(memory.allocation()).unwrap_err();
    drop(memory);
    // SAFETY: allocated above, freed once.
    unsafe { cudarc::driver::result::free_async(address, stream) }.unwrap();
    drop(entered);
    device.synchronize().unwrap();
    assert!(
        matches!(refused, TransportError::Register { cause: Cause::NotExportable { .. }, .. }),
        "{refused:?}"
    );
    assert!(refused.to_string().contains("cudaMallocAsync"), "{refused}");
}

/// A target of everything that a remote process offers.
struct Target {
    device: Device,
    transport: Arc<PeerTransport>,
    pool: TransportPool<PeerTransport>,
}

impl Target {
    fn new(device: &Device) -> Self {
        let transport = Arc::new(agent(device, PeerOptions::new("target")));
        let pool = Pool::new(
            CudaAllocator::new(device.clone()),
            TransportRegistrar::new(Arc::clone(&transport)),
            PoolOptions::default(),
        );
        Self { device: device.clone(), transport, pool }
    }

    /// Pulls a block in 64 reads, every other one by the copy engine, back to front.
    fn pull(
        &self,
        key: u8,
        offer: &Offer,
    ) -> Result<Settled<PeerTransport>, PullError<PeerTransport>> {
        let lease = self.pool.lease(Key::from([key; 32]), |build| {
            let arena = build.arena(offer.len).unwrap();
            let peer = self.transport.connect(&offer.name, &offer.metadata)?;
            let run = offer.len / 64;
            let reads: Vec<ReadOp> = (0..64)
                .map(|read| ReadOp {
                    from: RemoteRange {
                        address: offer.address + read * run,
                        len: run,
                        kind: MemoryKind::Cuda(offer.ordinal),
                    },
                    into: LocalRange {
                        address: arena.address() + (63 - read) * run,
                        len: run,
                        kind: arena.kind(),
                    },
                    run,
                    dims: Dims::none(),
                    transform: Transform::Copy,
                    bulk: read % 2 == 0,
                })
                .collect();
            Ok::<_, TransportError>(vec![self.transport.prepare(&peer, &reads)?])
        });
        Pull::start(Arc::clone(&self.transport), lease.unwrap(), Vec::new(), ..)?
            .wait(Instant::now() + PATIENCE)
    }

    fn check(&self, settled: &Settled<PeerTransport>, fill: u8) {
        let bytes = bytes_of(&self.device, &settled.lease.arenas()[0]);
        assert!(bytes.iter().all(|&byte| byte == fill), "not every byte is {fill}");
    }
}

/// Sources on every device that there is, our own included.
#[test]
fn two_processes() {
    if Remote::is_this() {
        return;
    }
    let Some(gpus) = Gpus::get("peer::two_processes", 1) else { return };
    for ordinal in 0..gpus.len().min(2) {
        let ordinal = u32::try_from(ordinal).unwrap();
        let mut remote = Remote::start("peer::two_processes", ordinal, 32 << 20);
        let offer = remote.offer();
        let target = Target::new(&gpus[0]);
        for cycle in 1..=20 {
            remote.fill(cycle);
            let settled = target.pull(0, &offer).unwrap();
            assert_eq!(settled.lease.is_hit(), cycle > 1);
            target.check(&settled, cycle);
        }
        let route = target.transport.route(&Peer { name: offer.name.clone() });
        println!("{route}");
        let expected = format!("peer: same host, CUDA IPC, device 0 <- device {ordinal} (");
        assert!(route.starts_with(&expected), "{route}");

        // Two agents of one process map the same memory, and one that comes back maps it again; whoever goes first
        // leaves the others theirs.
        let second = Target::new(&gpus[0]);
        second.check(&second.pull(0, &offer).unwrap(), 20);
        target.transport.disconnect(&Peer { name: offer.name.clone() }).unwrap();
        remote.fill(21);
        target.check(&target.pull(1, &offer).unwrap(), 21);
        drop(second);
        remote.fill(22);
        target.check(&target.pull(1, &offer).unwrap(), 22);
    }
}

/// What a source registers later is mapped when the peer is connected again, and batches of before stay good. What it
/// withdrew meanwhile cannot be read any more.
#[test]
fn sources_that_register_more() {
    if Remote::is_this() {
        return;
    }
    let Some(gpus) = Gpus::get("peer::sources_that_register_more", 1) else { return };
    let mut remote = Remote::start("peer::sources_that_register_more", 0, 4 << 20);
    let first = remote.offer();
    let target = Target::new(&gpus[0]);
    remote.fill(1);
    target.check(&target.pull(0, &first).unwrap(), 1);
    // Of a few bytes: it shares a page of the device with others.
    let small = remote.more(6400);
    remote.fill(2);
    target.check(&target.pull(1, &small).unwrap(), 2);
    target.check(&target.pull(0, &first).unwrap(), 2);
    remote.withdraw_first();
    let third = remote.more(4 << 20);
    remote.fill(3);
    target.check(&target.pull(2, &third).unwrap(), 3);
    target.check(&target.pull(1, &small).unwrap(), 3);
    // Not published any more.
    let peer = Peer { name: first.name.clone() };
    let arena = CudaAllocator::new(gpus[0].clone()).allocate(64).unwrap();
    let _registration = target.transport.register(arena.allocation()).unwrap();
    let op = ReadOp {
        from: RemoteRange { address: first.address, len: 64, kind: MemoryKind::Cuda(0) },
        into: LocalRange { address: arena.address(), len: 64, kind: arena.kind() },
        run: 64,
        dims: Dims::none(),
        transform: Transform::Copy,
        bulk: false,
    };
    let refused = target.transport.prepare(&peer, &[op]).unwrap_err();
    assert!(matches!(refused, TransportError::NotRegistered { .. }), "{refused:?}");
}

/// A trainer that died between two refits costs an error, not memory, nor its last weights as if they were new.
#[test]
fn killed_between_pulls() {
    if Remote::is_this() {
        return;
    }
    let Some(gpus) = Gpus::get("peer::killed_between_pulls", 1) else { return };
    let mut remote = Remote::start("peer::killed_between_pulls", 0, 8 << 20);
    let offer = remote.offer();
    let target = Target::new(&gpus[0]);
    remote.fill(1);
    drop(target.pull(0, &offer).unwrap());
    // One that is stopped is read all the same: nobody has to answer.
    remote.stop();
    target.check(&target.pull(0, &offer).unwrap(), 1);
    remote.kill();
    let own = rustix::process::getpid();
    if rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty()).is_err() {
        println!("this kernel has no way to watch a process: what is mapped stays readable");
        drop(target.pull(0, &offer));
        assert_eq!(target.pool.stats().quarantined_bytes, 0);
        return;
    }
    let started = Instant::now();
    let error = target.pull(0, &offer).unwrap_err();
    println!("killed peer reported after {:?}: {error}", started.elapsed());
    let PullError::Failed { errors, .. } = &error else { panic!("{error:?}") };
    assert!(
        matches!(&errors[0], TransportError::Failed { cause: Cause::PeerGone, .. }),
        "{errors:?}"
    );
    drop(error);
    assert_eq!(target.pool.stats().quarantined_bytes, 0);
    let error = target.transport.connect("x", &offer.metadata).unwrap_err();
    assert!(matches!(&error, TransportError::Connect { cause: Cause::Published { .. }, .. }));
    let fresh = Target::new(&gpus[0]);
    let error = fresh.transport.connect(&offer.name, &offer.metadata).unwrap_err();
    assert!(matches!(&error, TransportError::Connect { cause: Cause::PeerGone, .. }), "{error:?}");

    // Its successor is another one, and the same target goes on.
    let mut next = Remote::start("peer::killed_between_pulls", 0, 8 << 20);
    let offer = next.offer();
    next.fill(2);
    target.check(&target.pull(1, &offer).unwrap(), 2);
}

/// Thousands of cycles leave nothing behind, and start quickly.
#[test]
fn cycles_keep_nothing() {
    if Remote::is_this() {
        return;
    }
    let Some(gpus) = Gpus::get("peer::cycles_keep_nothing", 1) else { return };
    let mut remote = Remote::start("peer::cycles_keep_nothing", 0, 1 << 16);
    let offer = remote.offer();
    let target = Target::new(&gpus[0]);
    remote.fill(1);
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    for _ in 0..100 {
        drop(target.pull(0, &offer).unwrap());
    }
    let (before, free) = (open(), gpus[0].memory().unwrap().0);
    let started = Instant::now();
    let mut posting = Duration::ZERO;
    for _ in 0..3_000 {
        posting += target.pull(0, &offer).unwrap().stats.posting;
    }
    println!(
        "3,000 warm cycles of 64 x 1 KiB, half by the copy engine: {:?} each, posted in {:?}",
        started.elapsed() / 3_000,
        posting / 3_000
    );
    assert_eq!(open(), before);
    // Others may be at work on the device, but not by so much.
    assert!(gpus[0].memory().unwrap().0 + (64 << 20) > free);
}
