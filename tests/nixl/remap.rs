//! P8 over NIXL: memory that is freed and mapped anew at the same address is not read, or written, as what it was.

use std::any::Any;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use refit::planner::{Band, Dims, Dtype, LayoutBuilder, Param, RankLayout, Transform};
use refit::{Failed, Publication, RefitError, Source, TargetOptions, Unfinished};
use refit_pool::{Key, Memory, MemoryKind};
use refit_tests::fuzz::mutate::Random;
use refit_tests::ranks;
use refit_transport::conformance::Harness;
use refit_transport::nixl::NixlTransport;
use refit_transport::{
    LocalRange, Pull, ReadOp, RemoteRange, Transport, TransportError, TransportLease, TransportPool,
};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::isolated::isolated;
use crate::{EMULATED, Nixl, ONE_SIDED};

/// Bytes of a window: where memory is mapped, freed and mapped again.
const WINDOW: usize = 16 << 10;
const WINDOWS: usize = 64;

fn operations() -> u64 {
    std::env::var("REFIT_REMAPS").map_or(100_000, |count| count.parse().unwrap())
}

/// Memory of somebody else's allocator, unmapped when its owner goes.
struct Foreign {
    start: NonNull<u8>,
    unmapped: Arc<AtomicU64>,
}

// SAFETY: an address range, which any thread may unmap.
unsafe impl Send for Foreign {}
// SAFETY: nothing can be done through a shared reference.
unsafe impl Sync for Foreign {}

impl Drop for Foreign {
    fn drop(&mut self) {
        // SAFETY: the pages are this owner's, and whoever used them holds a share of it.
        unsafe { munmap(self.start.as_ptr().cast(), WINDOW) }.unwrap();
        self.unmapped.fetch_add(1, Ordering::SeqCst);
    }
}

/// Maps the window at exactly this address, unless something is mapped there.
fn map(address: usize, unmapped: &Arc<AtomicU64>) -> Option<Memory> {
    let at = ptr::with_exposed_provenance_mut(address);
    let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
    // SAFETY: the kernel refuses where something is mapped.
    let start = unsafe { mmap_anonymous(at, WINDOW, ProtFlags::READ | ProtFlags::WRITE, flags) };
    let start = NonNull::new(start.ok()?.cast::<u8>()).unwrap();
    assert_eq!(start.as_ptr().addr(), address, "a kernel that does not know the flag");
    let owner: Arc<dyn Any + Send + Sync> = Arc::new(Foreign { start, unmapped: unmapped.clone() });
    // SAFETY: the pages are new, nobody else knows them, and they stay mapped as long as their owner lives.
    Some(unsafe { Memory::adopt(start, WINDOW, MemoryKind::Host, owner) })
}

/// An address with room for all windows, which nothing is mapped at.
fn room() -> usize {
    let bytes = 2 * WINDOWS * WINDOW;
    // SAFETY: the kernel picks pages that nobody uses, and nobody has used them when they are given back.
    let start =
        unsafe { mmap_anonymous(ptr::null_mut(), bytes, ProtFlags::empty(), MapFlags::PRIVATE) };
    let start = start.unwrap();
    // SAFETY: as above.
    unsafe { munmap(start, bytes) }.unwrap();
    start.expose_provenance()
}

/// What a window holds.
#[derive(Default)]
struct Window {
    memory: Option<Memory>,
    registrations: Vec<<NixlTransport as Transport>::Registration>,
    /// Counts what was mapped here; what its bytes say.
    life: u64,
}

fn fill(memory: &mut Memory, life: u64) {
    let bytes = memory.host_bytes_mut().unwrap();
    bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&life.to_le_bytes()));
}

/// Reads all registered windows with what is published now, and compares every byte.
fn look(
    source: &NixlTransport,
    target: &Arc<NixlTransport>,
    pool: &TransportPool<NixlTransport>,
    windows: &[Window],
    base: usize,
) {
    let live: Vec<usize> =
        (0..windows.len()).filter(|&at| !windows[at].registrations.is_empty()).collect();
    if live.is_empty() {
        return;
    }
    let peer = target.connect(source.agent(), &source.metadata().unwrap()).unwrap();
    let lease = pool.lease(Key::from([8; 32]), |build| {
        let arena = build.arena((WINDOW * WINDOWS) as u64).unwrap();
        let read = |&at: &usize| ReadOp {
            from: RemoteRange {
                address: (base + at * WINDOW) as u64,
                len: WINDOW as u64,
                kind: MemoryKind::Host,
            },
            into: LocalRange {
                address: arena.address() + (at * WINDOW) as u64,
                len: WINDOW as u64,
                kind: arena.kind(),
            },
            run: WINDOW as u64,
            dims: Dims::none(),
            transform: Transform::Copy,
            bulk: false,
        };
        Ok::<_, TransportError>(vec![
            target.prepare(&peer, &live.iter().map(read).collect::<Vec<_>>())?,
        ])
    });
    let lease: TransportLease<NixlTransport> = lease.unwrap();
    let settled = Pull::start(target.clone(), lease, Vec::new(), ..).unwrap();
    let settled = settled.wait(Instant::now() + Duration::from_secs(20)).unwrap();
    let bytes = settled.lease.arenas()[0].host_bytes().unwrap();
    for at in live {
        let stale = bytes[at * WINDOW..(at + 1) * WINDOW]
            .chunks_exact(8)
            .filter(|word| **word != windows[at].life.to_le_bytes());
        assert_eq!(stale.count(), 0, "window {at} is read as it was in another life");
    }
    drop(settled);
    pool.clear();
}

/// Maps, registers, frees and deregisters in every order, at the same few addresses, over and over. As long as something is
/// registered the kernel finds it mapped; what is mapped behind that is read as what it is.
fn remaps() {
    let (source, target) = (Nixl.agent("source").unwrap(), Arc::new(Nixl.agent("target").unwrap()));
    let pool = ranks::pool(&target);
    let (base, unmapped) = (room(), Arc::new(AtomicU64::new(0)));
    let mut windows: Vec<Window> = (0..WINDOWS).map(|_| Window::default()).collect();
    let mut random = Random::new(8);
    let (mut lives, mut mapped, mut kept, mut looks) = (0, 0_u64, 0_u64, 0);
    for operation in 0..operations() {
        let at = random.below(WINDOWS);
        let window = &mut windows[at];
        let freed = unmapped.load(Ordering::SeqCst);
        match random.below(4) {
            0 | 1 => match map(base + at * WINDOW, &unmapped) {
                Some(mut memory) => {
                    assert!(
                        window.memory.is_none() && window.registrations.is_empty(),
                        "mapped over what is registered"
                    );
                    lives += 1;
                    window.life = lives;
                    fill(&mut memory, lives);
                    window.registrations.push(source.register(memory.allocation()).unwrap());
                    window.memory = Some(memory);
                    mapped += 1;
                }
                None => {
                    kept += u64::from(window.memory.is_none() && !window.registrations.is_empty())
                }
            },
            // Its owner frees it, registered or not.
            2 => {
                let registered = !window.registrations.is_empty();
                drop(window.memory.take());
                let gone = unmapped.load(Ordering::SeqCst) - freed;
                assert!(!registered || gone == 0, "unmapped while it is registered");
            }
            _ => match (&window.memory, window.registrations.len()) {
                // Once more, as a second pool entry would.
                (Some(memory), 1) => {
                    window.registrations.push(source.register(memory.allocation()).unwrap())
                }
                _ => drop(window.registrations.pop()),
            },
        }
        if operation % 200 == 0 {
            look(&source, &target, &pool, &windows, base);
            looks += 1;
        }
    }
    look(&source, &target, &pool, &windows, base);
    println!(
        "{} operations: mapped {mapped} times at {WINDOWS} addresses, {kept} times kept mapped by a registration alone, \
         compared {looks} times",
        operations()
    );
    assert!(
        mapped > operations() / 20 && kept > operations() / 100,
        "{mapped} mapped, {kept} kept"
    );
    windows.clear();
    assert_eq!(unmapped.load(Ordering::SeqCst), mapped, "memory is left behind");
}

#[test]
fn p08_registrations_keep_what_they_are_of_one_sided() {
    isolated("remap::p08_registrations_keep_what_they_are_of_one_sided", ONE_SIDED, remaps);
}

#[test]
fn p08_registrations_keep_what_they_are_of_emulated() {
    isolated("remap::p08_registrations_keep_what_they_are_of_emulated", EMULATED, remaps);
}

const BYTES: u64 = WINDOW as u64;

fn layout() -> RankLayout {
    let mut layout = LayoutBuilder::new(0);
    let tensor = layout.tensor("w", BYTES, 1).unwrap();
    let band = Band::new(tensor, 0..BYTES, 0..1);
    layout.param(Param::new("w", Dtype::U8, BYTES, 1).band(band)).unwrap();
    layout.build()
}

type Life = (Source<NixlTransport>, TransportPool<NixlTransport>, Arc<NixlTransport>);

/// A life of a trainer, whose parameters are all of this byte and lie at this address, unless something else does.
fn live(address: usize, byte: u8, unmapped: &Arc<AtomicU64>) -> Option<Life> {
    let mut memory = map(address, unmapped)?;
    memory.host_bytes_mut().unwrap().fill(byte);
    let agent = Arc::new(Nixl.agent("trainer").unwrap());
    let pool = ranks::pool(&agent);
    let params = [("w".to_owned(), memory)];
    Some((Source::new(agent.clone(), &pool, layout(), params).unwrap(), pool, agent))
}

/// A trainer's parameters go, and others are mapped in their place: those of its next life, or anything. Whoever has the old
/// publication still is told, and installs nothing. One-sided, where the trainer has no say in a read.
#[test]
fn p08_what_was_remapped_is_not_read_as_the_old() {
    isolated("remap::p08_what_was_remapped_is_not_read_as_the_old", ONE_SIDED, || {
        const ROUNDS: u32 = 20;
        let engine = Arc::new(Nixl.agent("engine").unwrap());
        let (base, unmapped) = (room(), Arc::new(AtomicU64::new(0)));
        let (mut target, _, canaries) = ranks::target(&engine, &layout(), TargetOptions::default());
        let (mut refused, mut said) = (0, std::collections::BTreeMap::new());
        for round in 0..ROUNDS {
            let byte = u8::try_from(3 * round % 250).unwrap();
            let Some((source, pool, agent)) = live(base, byte, &unmapped) else { continue };
            let old = [source.publication().unwrap()];
            target = refit(target, &old, byte);
            // Registered and idle, it stays where it is; only then is its address free.
            drop(source);
            assert!(map(base, &unmapped).is_none(), "unmapped while it is registered");
            drop(pool);
            // The next life of the trainer, or memory that is nobody's business. The agent is the same that was there.
            let next = if round % 2 == 0 {
                live(base, byte + 1, &unmapped).map(Ok)
            } else {
                map(base, &unmapped).map(Err)
            };
            let Some(next) = next else { continue };
            let (error, state) = stale(target, &old);
            let kind = match error {
                RefitError::StaleIncarnation { rank: 0, .. } => "another incarnation",
                RefitError::NoHeader { rank: 0 } => "no header",
                RefitError::Torn { rank: 0, .. } => "torn",
                RefitError::Transport(_) => "not readable",
                other => panic!("round {round}: {other}"),
            };
            *said.entry(kind).or_insert(0) += 1;
            target = match state {
                Unfinished::Whole(target) => {
                    assert!(ranks::held(&target)["w"].iter().all(|&held| held == byte));
                    target
                }
                Unfinished::Invalid(target) => target.reloaded(),
                other => panic!("round {round}: {other:?}"),
            };
            refused += 1;
            if let Ok((source, pool, next)) = next {
                target = refit(target, &[source.publication().unwrap()], byte + 1);
                drop((source, pool, next));
            }
            drop(agent);
        }
        println!("{refused} of {ROUNDS} stale reads were refused: {said:?}");
        assert!(refused > ROUNDS / 2, "the address was hardly ever free");
        canaries.check();
    });
}

fn refit(target: Held, published: &[Publication], byte: u8) -> Held {
    let (target, _) = ranks::refit(target, published);
    assert!(ranks::held(&target)["w"].iter().all(|&held| held == byte));
    target
}

type Held = refit::Target<NixlTransport>;

/// What a pull of what was published says, which must not go well.
fn stale(target: Held, old: &[Publication]) -> (RefitError, Unfinished<NixlTransport>) {
    let prepared = match target.prepare(old) {
        Ok(prepared) => prepared,
        Err(Failed { error, state }) => return (error, Unfinished::Whole(state)),
    };
    match prepared.pull().and_then(|pulling| pulling.wait(ranks::soon())) {
        Ok(_) => panic!("the old publication is read as if nothing had happened"),
        Err(Failed { error, state }) => (error, state),
    }
}
