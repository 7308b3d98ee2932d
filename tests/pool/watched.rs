//! An allocator and a registrar that watch each other: memory that is freed while registered, undone twice or over
//! budget is a violation, whatever the pool's own counters say.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use refit_pool::{
    AllocateError, Allocator, HostAllocator, KeepAlive, Key, Memory, MemoryKind, Pool, PoolOptions,
    Region, Registrar,
};

pub(crate) fn key(name: u8) -> Key {
    Key::from([name; 32])
}

/// What really happened.
#[derive(Debug, Default)]
pub(crate) struct World {
    /// Start and length of what is allocated.
    pub(crate) allocated: BTreeMap<u64, u64>,
    /// Start and length of what is registered, and how often: entries may adopt the same memory.
    pub(crate) registered: BTreeMap<(u64, u64), u64>,
    /// Prepared works that exist.
    pub(crate) prepared: u64,
    pub(crate) budget: Option<u64>,
    /// Registrations until one is refused.
    pub(crate) refuse_after: Option<u64>,
    /// Deregistrations that will fail.
    pub(crate) complaints: u64,
    pub(crate) violations: Vec<String>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Shared(pub(crate) Arc<Mutex<World>>);

impl Shared {
    pub(crate) fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock()
    }

    #[track_caller]
    pub(crate) fn assert_no_violations(&self) {
        let violations = std::mem::take(&mut self.world().violations);
        assert!(violations.is_empty(), "{violations:#?}");
    }
}

impl World {
    pub(crate) fn check(&mut self, right: bool, wrong: impl FnOnce() -> String) {
        if !right {
            self.violations.push(wrong());
        }
    }

    /// Whether some registration shares bytes with a range.
    pub(crate) fn is_registered(&self, address: u64, len: u64) -> bool {
        let last = self.registered.range(..(address + len, 0)).next_back();
        last.is_some_and(|((start, len), _)| start + len > address)
    }
}

#[derive(Debug)]
pub(crate) struct WatchedAllocator(pub(crate) Shared);

/// The owner of watched memory: notes when the last share goes, then lets the real memory go.
pub(crate) struct Watched {
    pub(crate) shared: Shared,
    pub(crate) address: u64,
    pub(crate) len: u64,
    pub(crate) _real: KeepAlive,
}

impl Drop for Watched {
    fn drop(&mut self) {
        let Self { address, len, .. } = *self;
        let mut world = self.shared.world();
        let registered = world.is_registered(address, len);
        world.check(!registered, || format!("{len} bytes freed while registered"));
        let known = world.allocated.remove(&address) == Some(len);
        world.check(known, || format!("{len} bytes freed twice"));
    }
}

impl Allocator for WatchedAllocator {
    fn kind(&self) -> MemoryKind {
        MemoryKind::Host
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, AllocateError> {
        let mut memory = HostAllocator.allocate(bytes)?;
        let start = NonNull::from(memory.host_bytes_mut().unwrap()).cast::<u8>();
        let (address, len) = (memory.address(), bytes as u64);
        let owner = Watched {
            shared: self.0.clone(),
            address,
            len,
            _real: memory.allocation().keep_alive().clone(),
        };
        drop(memory);
        let mut world = self.0.world();
        world.allocated.insert(address, len);
        let total = world.allocated.values().sum::<u64>();
        let within = world.budget.is_none_or(|budget| total <= budget);
        world.check(within, || format!("{total} bytes are allocated, over the budget"));
        // SAFETY: the owner holds the mapping, the first `Memory` of it is gone, and this is the only other one.
        Ok(unsafe { Memory::adopt(start, bytes, MemoryKind::Host, Arc::new(owner)) })
    }
}

#[derive(Debug)]
pub(crate) struct WatchedRegistrar(pub(crate) Shared);

#[derive(Debug, thiserror::Error)]
#[error("scripted")]
pub(crate) struct Scripted;

impl Registrar for WatchedRegistrar {
    type Registration = (u64, u64);
    type Error = Scripted;

    fn register(&self, region: &Region) -> Result<(u64, u64), Scripted> {
        let mut world = self.0.world();
        if let Some(left) = world.refuse_after {
            world.refuse_after = left.checked_sub(1);
            if left == 0 {
                return Err(Scripted);
            }
        }
        let (address, len) = (region.address(), region.len());
        *world.registered.entry((address, len)).or_default() += 1;
        Ok((address, len))
    }

    fn deregister(&self, (address, len): (u64, u64)) -> Result<(), Scripted> {
        let mut world = self.0.world();
        let times = world.registered.remove(&(address, len));
        world.check(times.is_some(), || format!("{len} bytes deregistered too often"));
        if let Some(left @ 1..) = times.and_then(|times| times.checked_sub(1)) {
            world.registered.insert((address, len), left);
        }
        match world.complaints.checked_sub(1) {
            Some(left) => {
                world.complaints = left;
                Err(Scripted)
            }
            None => Ok(()),
        }
    }
}

/// Prepared work that refers to registrations, and must go before them.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) shared: Shared,
    pub(crate) refers_to: Vec<(u64, u64)>,
    /// What the last holder wrote over the arenas.
    pub(crate) canary: u8,
}

impl Prepared {
    pub(crate) fn new(shared: &Shared, registered: &[Region]) -> Self {
        shared.world().prepared += 1;
        let refers_to = registered.iter().map(|region| (region.address(), region.len())).collect();
        Self { shared: shared.clone(), refers_to, canary: 0 }
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        let mut world = self.shared.world();
        world.prepared -= 1;
        let intact = self.refers_to.iter().all(|piece| world.registered.contains_key(piece));
        world.check(intact, || "a registration went before the prepared work".to_owned());
    }
}

pub(crate) type TestPool = Pool<WatchedRegistrar, Prepared>;

pub(crate) fn test_pool_with(options: PoolOptions) -> (TestPool, Shared) {
    let shared = Shared::default();
    shared.world().budget = Some(options.budget_bytes);
    (Pool::new(WatchedAllocator(shared.clone()), WatchedRegistrar(shared.clone()), options), shared)
}
