//! A contiguous piece of memory that transfers may write, whoever allocated it.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Where memory lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum MemoryKind {
    /// Ordinary host memory.
    Host,
    /// Memory of a CUDA device, by the ordinal it has in this process.
    Cuda(u32),
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host memory"),
            Self::Cuda(ordinal) => write!(f, "memory of CUDA device {ordinal}"),
        }
    }
}

/// Exclusive access to a contiguous piece of memory. Not `Clone`: whoever holds it may read and write it.
///
/// The memory lives as long as its owner, an opaque reference-counted object: our own mapping, or whatever an engine
/// holds its parameters by. [`Region::keep_alive`] shares that lifetime without sharing access.
pub struct Memory {
    start: NonNull<u8>,
    len: usize,
    /// The whole allocation this is a part of: what gets registered.
    allocation: Region,
}

/// A range of memory and a share in its lifetime, without access to its bytes: what a registration is made of.
#[derive(Clone, Debug)]
pub struct Region {
    address: u64,
    len: u64,
    kind: MemoryKind,
    /// Held, never read: dropping the last share frees the memory.
    keep_alive: KeepAlive,
}

impl Region {
    /// First address, as transports name it.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it lives.
    #[must_use]
    pub fn kind(&self) -> MemoryKind {
        self.kind
    }

    /// The share in the memory's lifetime.
    #[must_use]
    pub fn keep_alive(&self) -> &KeepAlive {
        &self.keep_alive
    }

    /// One past the last address.
    pub(crate) fn end(&self) -> u64 {
        self.address.saturating_add(self.len)
    }

    /// The addresses from `start` to `end` of this region, with a share in its lifetime.
    pub(crate) fn part(&self, start: u64, end: u64) -> Self {
        debug_assert!(self.address <= start && start <= end && end <= self.end());
        Self {
            address: start,
            len: end - start,
            kind: self.kind,
            keep_alive: self.keep_alive.clone(),
        }
    }

    /// The smallest region that covers all of these, which share bytes, and shares all their lifetimes.
    pub(crate) fn join(regions: Vec<Self>) -> Option<Self> {
        let first = regions.first()?;
        let address = regions.iter().map(Self::address).min()?;
        let len = regions.iter().map(Self::end).max()? - address;
        let kind = first.kind;
        let keep_alive = KeepAlive::join(regions.into_iter().map(|region| region.keep_alive));
        Some(Self { address, len, kind, keep_alive })
    }
}

/// Keeps memory allocated without giving access to it: what a registration holds.
#[derive(Clone)]
pub struct KeepAlive(Arc<dyn Any + Send + Sync>);

impl KeepAlive {
    /// Keeps alive what all of them keep alive. Side by side and not one within the other: a hundred thousand
    /// parameters of one allocation would overflow the stack when they go.
    fn join(all: impl Iterator<Item = Self>) -> Self {
        let mut all = all.collect::<Vec<_>>();
        all.sort_unstable_by_key(|one| Arc::as_ptr(&one.0).cast::<()>());
        all.dedup_by(|one, other| Arc::ptr_eq(&one.0, &other.0));
        match <[Self; 1]>::try_from(all) {
            Ok([one]) => one,
            Err(all) => Self(Arc::new(all)),
        }
    }
}

// SAFETY: `Memory` is a unique handle to plain bytes; the owner that frees them is itself `Send + Sync`.
unsafe impl Send for Memory {}
// SAFETY: `&Memory` gives shared reads only.
unsafe impl Sync for Memory {}

impl Memory {
    /// Adopts memory that someone else allocated.
    ///
    /// # Safety
    /// - `start..start + len` is valid for reads and writes of `kind` for as long as `owner` lives.
    /// - While the returned value exists, nobody reads or writes those bytes except through it, through a transfer
    ///   that it was lent to, or at times when its holder is known not to use it (an engine that is running).
    /// - No other `Memory` covers any of those bytes.
    #[must_use]
    pub unsafe fn adopt(
        start: NonNull<u8>,
        len: usize,
        kind: MemoryKind,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        // Exposed, because transports make pointers of addresses again.
        let address = start.as_ptr().expose_provenance() as u64;
        let allocation = Region { address, len: len as u64, kind, keep_alive: KeepAlive(owner) };
        Self { start, len, allocation }
    }

    /// Adopts a part of a larger allocation, which gets registered as a whole: parts of one allocation, adopted one by
    /// one, are registered once.
    ///
    /// # Safety
    /// - As [`adopt`](Self::adopt), of the part.
    /// - The addresses `allocation` include the part, and stay allocated as long as `owner` lives. Peers that read our
    ///   registered memory may read all of them.
    #[must_use]
    pub unsafe fn adopt_within(
        start: NonNull<u8>,
        len: usize,
        kind: MemoryKind,
        allocation: Range<u64>,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        // SAFETY: the caller's promise.
        let part = unsafe { Self::adopt(start, len, kind, owner) };
        debug_assert!(
            allocation.start <= part.address() && part.allocation.end() <= allocation.end
        );
        Self {
            allocation: Region {
                address: allocation.start,
                len: allocation.end.saturating_sub(allocation.start),
                ..part.allocation
            },
            ..part
        }
    }

    /// Memory without bytes.
    #[must_use]
    pub fn empty(kind: MemoryKind) -> Self {
        // SAFETY: a range of no bytes is valid everywhere and overlaps nothing.
        unsafe { Self::adopt(NonNull::dangling(), 0, kind, Arc::new(())) }
    }

    /// First address, as transports name it.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.start.as_ptr().addr() as u64
    }

    /// Size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it lives.
    #[must_use]
    pub fn kind(&self) -> MemoryKind {
        self.allocation.kind
    }

    /// The whole allocation that this memory is a part of. Registering it once serves all its parts.
    #[must_use]
    pub fn allocation(&self) -> &Region {
        &self.allocation
    }

    /// This memory, with a share in its lifetime and without access to its bytes.
    #[must_use]
    pub fn region(&self) -> Region {
        let start = self.address();
        self.allocation.part(start, start.saturating_add(self.len as u64))
    }

    /// Cuts the memory in two; both parts keep the allocation.
    ///
    /// # Panics
    /// If `at` lies behind the end, as slices do.
    #[must_use]
    pub fn split_at(self, at: usize) -> (Self, Self) {
        assert!(at <= self.len, "split at {at} of {} bytes", self.len);
        // SAFETY: `at <= len`, so the result stays inside, or one past the end of, the adopted range.
        let rest = unsafe { self.start.add(at) };
        let tail = Self { start: rest, len: self.len - at, allocation: self.allocation.clone() };
        (Self { start: self.start, len: at, allocation: self.allocation }, tail)
    }

    /// The bytes, if the processor can read them.
    #[must_use]
    pub fn host_bytes(&self) -> Option<&[u8]> {
        // SAFETY: by the contract of `adopt` the range is valid, and `&self` excludes writers.
        (self.kind() == MemoryKind::Host)
            .then(|| unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) })
    }

    /// The bytes, if the processor can write them.
    #[must_use]
    pub fn host_bytes_mut(&mut self) -> Option<&mut [u8]> {
        // SAFETY: by the contract of `adopt` the range is valid, and `&mut self` is the only access to it.
        (self.kind() == MemoryKind::Host)
            .then(|| unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) })
    }

    /// The bytes as words that are stored one by one, if the processor can write them and they are whole, aligned words:
    /// for what peers read while it is written. A peer sees each word as it was before or after, not the words together.
    #[must_use]
    pub fn host_words_mut(&mut self) -> Option<&[AtomicU64]> {
        let words = self.len / size_of::<u64>();
        let start = self.start.cast::<AtomicU64>();
        let whole = self.len.is_multiple_of(size_of::<u64>()) && start.is_aligned();
        // SAFETY: by the contract of `adopt` the range is valid for reads and writes, its start was found aligned, and
        // `&mut self` is the only access to it in this process, so that nothing else than these atomics uses it.
        (self.kind() == MemoryKind::Host && whole)
            .then(|| unsafe { std::slice::from_raw_parts(start.as_ptr(), words) })
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Addresses stay out of logs.
        f.debug_struct("Memory")
            .field("len", &self.len)
            .field("kind", &self.kind())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for KeepAlive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeepAlive")
    }
}
