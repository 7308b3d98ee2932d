use std::ptr::NonNull;

use parking_lot::Mutex;

use super::*;
use crate::{Memory, MemoryKind};

/// A region that is only ever looked at.
fn region(kind: MemoryKind, addresses: std::ops::Range<usize>, owner: &Arc<()>) -> Region {
    let start = NonNull::without_provenance(addresses.start.try_into().unwrap());
    // SAFETY: nobody reads or writes through it.
    let memory = unsafe { Memory::adopt(start, addresses.len(), kind, Arc::<()>::clone(owner)) };
    memory.allocation().clone()
}

fn host(addresses: std::ops::Range<usize>) -> Region {
    region(MemoryKind::Host, addresses, &Arc::default())
}

fn ranges(regions: &[Region]) -> Vec<(u64, u64)> {
    regions.iter().map(|region| (region.address(), region.end())).collect()
}

#[test]
fn overlapping_regions_merge_and_touching_ones_do_not() {
    let regions = [
        host(300..400),
        host(100..200),
        host(150..250),
        host(120..130),
        host(400..500),
        host(100..200),
    ];
    assert_eq!(ranges(&merged(regions)), [(100, 250), (300, 400), (400, 500)]);
    assert!(merged([host(100..100)]).is_empty());
}

#[test]
fn kinds_never_merge() {
    let owner = Arc::default();
    let regions = [
        region(MemoryKind::Cuda(1), 100..200, &owner),
        region(MemoryKind::Host, 100..200, &owner),
        region(MemoryKind::Cuda(0), 150..250, &owner),
    ];
    let merged = merged(regions);
    assert_eq!(ranges(&merged), [(100, 200), (150, 250), (100, 200)]);
    let host = [host(0x10..0x1000)];
    assert_eq!(unregistered(merged, &host).len(), 2, "an address means nothing without its kind");
}

#[test]
fn a_merged_region_keeps_every_owner_alive() {
    let owners = [Arc::new(()), Arc::new(())];
    let merged = merged([
        region(MemoryKind::Host, 100..200, &owners[0]),
        region(MemoryKind::Host, 150..250, &owners[1]),
    ]);
    assert_eq!(owners.each_ref().map(Arc::strong_count), [2, 2]);
    drop(merged);
    assert_eq!(owners.each_ref().map(Arc::strong_count), [1, 1]);
}

/// A part of a larger allocation, as one parameter in a block of torch's.
fn part(addresses: std::ops::Range<usize>, block: std::ops::Range<u64>, owner: &Arc<()>) -> Memory {
    let start = NonNull::without_provenance(addresses.start.try_into().unwrap());
    let owner = Arc::<()>::clone(owner);
    // SAFETY: nobody reads or writes through it.
    unsafe { Memory::adopt_within(start, addresses.len(), MemoryKind::Cuda(0), block, owner) }
}

#[test]
fn parts_of_one_allocation_are_registered_once_and_keep_every_owner() {
    const BLOCK: std::ops::Range<u64> = 0x10_0000..0x20_0000;
    let owners = [(); 3].map(|()| Arc::new(()));
    let parts = [
        part(0x10_0200..0x10_0300, BLOCK, &owners[0]),
        part(0x10_0000..0x10_0100, BLOCK, &owners[1]),
        part(0x1f_ff00..0x20_0000, BLOCK, &owners[2]),
    ];
    assert_eq!((parts[0].address(), parts[0].len()), (0x10_0200, 0x100));
    let other = part(0x20_0000..0x20_0010, 0x20_0000..0x20_0100, &owners[0]);
    let registrar = Recorder::default();
    let core = Arc::new(Core {
        registrar,
        max_registration: None,
        ledger: Arc::new(Ledger::new(u64::MAX)),
    });
    let mut registrations = Registrations::new(Arc::clone(&core));
    let all = parts.iter().chain([&other]).map(|memory| memory.allocation().clone());
    registrations.add(all.collect::<Vec<_>>()).unwrap();
    assert_eq!(ranges(registrations.regions()), [(0x10_0000, 0x20_0000), (0x20_0000, 0x20_0100)]);
    assert_eq!(core.registrar.seen.lock().1, [0x10_0000, 0x20_0000]);
    // Another part of the same allocation, adopted later, is registered already.
    let later = part(0x11_0000..0x11_0001, BLOCK, &owners[0]);
    registrations.add([later.allocation().clone()]).unwrap();
    assert_eq!(registrations.regions().len(), 2);
    drop((parts, other, later));
    assert_eq!(owners.each_ref().map(Arc::strong_count), [3, 2, 2]);
    drop(registrations);
    assert_eq!(owners.each_ref().map(Arc::strong_count), [1, 1, 1]);
}

#[test]
fn a_part_that_is_split_keeps_its_whole_allocation() {
    let memory = part(0x1100..0x1200, 0x1000..0x2000, &Arc::default());
    let (head, tail) = memory.split_at(0x40);
    assert_eq!((head.address(), head.len()), (0x1100, 0x40));
    assert_eq!((tail.address(), tail.len()), (0x1140, 0xc0));
    for part in [head, tail] {
        assert_eq!(ranges(&[part.allocation().clone()]), [(0x1000, 0x2000)]);
    }
}

/// On a thread's stack of 2 MiB, which a chain of this many owners would overflow when it goes.
#[test]
fn a_model_of_many_parameters_in_one_allocation_goes_without_recursion() {
    let memory: Vec<_> = (0..200_000)
        .map(|index| part(0x1000 + index..0x1001 + index, 0x1000..0x10_0000, &Arc::default()))
        .collect();
    let merged = merged(memory.iter().map(|memory| memory.allocation().clone()));
    assert_eq!(ranges(&merged), [(0x1000, 0x10_0000)]);
    drop((memory, merged));
}

#[test]
fn only_what_is_missing_gets_registered() {
    let registered = [host(100..200), host(300..400)];
    let missing = |wanted| ranges(&unregistered(vec![host(wanted)], &registered));
    assert_eq!(missing(120..180), []);
    assert_eq!(missing(100..200), []);
    assert_eq!(missing(50..450), [(50, 100), (200, 300), (400, 450)]);
    assert_eq!(missing(150..350), [(200, 300)]);
    assert_eq!(missing(200..300), [(200, 300)]);
    assert_eq!(missing(10..20), [(10, 20)]);
}

#[test]
fn pieces_cover_the_region_in_whole_pages() {
    let of =
        |len: usize, max| ranges(&pieces(&host(0x1000..0x1000 + len), max).collect::<Vec<_>>());
    assert_eq!(of(10_000, None), [(0x1000, 0x1000 + 10_000)]);
    assert_eq!(of(10_000, Some(0)), of(10_000, None));
    assert_eq!(of(8192, Some(8192)), [(0x1000, 0x3000)]);
    assert_eq!(
        of(10_000, Some(5000)),
        [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x1000 + 10_000)]
    );
    assert_eq!(of(25, Some(10)), [(0x1000, 0x100a), (0x100a, 0x1014), (0x1014, 0x1019)]);
}

/// Refuses the `refused`-th registration, and says what is registered.
#[derive(Debug, Default)]
struct Recorder {
    refused: usize,
    seen: Mutex<(usize, Vec<u64>)>,
}

impl Registrar for Recorder {
    type Registration = u64;
    type Error = std::io::Error;

    fn register(&self, region: &Region) -> Result<u64, std::io::Error> {
        let mut seen = self.seen.lock();
        seen.0 += 1;
        if seen.0 == self.refused {
            return Err(std::io::Error::other("no"));
        }
        seen.1.push(region.address());
        Ok(region.address())
    }

    fn deregister(&self, registration: u64) -> Result<(), std::io::Error> {
        self.seen.lock().1.retain(|&address| address != registration);
        Ok(())
    }
}

#[test]
fn a_refusal_undoes_its_call_and_no_other() {
    let registrar = Recorder { refused: 4, ..Recorder::default() };
    let core = Arc::new(Core {
        registrar,
        max_registration: Some(4096),
        ledger: Arc::new(Ledger::new(u64::MAX)),
    });
    let mut registrations = Registrations::new(Arc::clone(&core));
    registrations.add([host(0x8000..0x9000)]).unwrap();
    let refused = registrations.add([host(0x1000..0x7000)]).unwrap_err();
    assert!(matches!(refused, PoolError::Register { bytes: 4096, kind: MemoryKind::Host, .. }));
    assert_eq!(ranges(registrations.regions()), [(0x8000, 0x9000)]);
    assert_eq!(core.registrar.seen.lock().1, [0x8000]);
    registrations.add([host(0x1000..0x2000)]).unwrap();
    assert_eq!(ranges(registrations.regions()), [(0x1000, 0x2000), (0x8000, 0x9000)]);
    drop(registrations);
    assert!(core.registrar.seen.lock().1.is_empty());
    let books = core.ledger.books();
    assert_eq!((books.registrations, books.deregistrations), (4, 4));
}
