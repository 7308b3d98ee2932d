use std::fmt::Debug;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::{AllocateError, Memory, MemoryKind};

/// Where a pool's arenas come from.
pub trait Allocator: Debug + Send + Sync {
    /// What kind of memory this allocates.
    fn kind(&self) -> MemoryKind;

    /// Allocates exactly `bytes` of [`kind`](Self::kind), which the memory's owner frees when its last share goes.
    ///
    /// # Errors
    /// [`AllocateError`] when there is no such memory.
    fn allocate(&self, bytes: usize) -> Result<Memory, AllocateError>;
}

/// Anonymous private mappings: zeroed by the kernel at first touch, returned to it when the last share goes.
///
/// From 2 MiB on, a mapping starts at a multiple of 2 MiB and asks for huge pages: fewer pages to pin and fewer
/// entries in a NIC's translation table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostAllocator;

/// The size of a huge page on the machines that matter, and what large mappings are aligned to.
const HUGE: usize = 2 << 20;

impl Allocator for HostAllocator {
    fn kind(&self) -> MemoryKind {
        MemoryKind::Host
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, AllocateError> {
        if bytes == 0 {
            return Ok(Memory::empty(MemoryKind::Host));
        }
        let failed = |source| {
            AllocateError::new(MemoryKind::Host, bytes as u64, std::io::Error::from(source))
        };
        let mapping = Mapping::new(bytes).map_err(failed)?;
        let start = mapping.start;
        // SAFETY: the mapping covers at least `bytes`, is readable and writable, nobody else knows it, and it stays
        // mapped until `mapping`, which the memory owns, is dropped.
        Ok(unsafe { Memory::adopt(start, bytes, MemoryKind::Host, Arc::new(mapping)) })
    }
}

/// Pages that are ours alone.
struct Mapping {
    start: NonNull<u8>,
    /// A multiple of the page size.
    len: usize,
}

// SAFETY: a mapping is an address range; the kernel lets any thread unmap it.
unsafe impl Send for Mapping {}
// SAFETY: nothing can be done through `&Mapping`.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(bytes: usize) -> rustix::io::Result<Self> {
        let too_large = rustix::io::Errno::NOMEM;
        let len = bytes.checked_next_multiple_of(rustix::param::page_size()).ok_or(too_large)?;
        if len > isize::MAX.unsigned_abs() {
            return Err(too_large);
        }
        if len < HUGE {
            return Self::map(len);
        }
        // The kernel promises page alignment only: map enough to contain an aligned start, then give back the ends.
        let wide = Self::map(len.checked_add(HUGE).ok_or(too_large)?)?;
        let address = wide.start.as_ptr().addr();
        let head = address.next_multiple_of(HUGE) - address;
        let (_, rest) = wide.split(head);
        let (mapping, _) = rest.split(len);
        mapping.advise_huge();
        Ok(mapping)
    }

    fn map(len: usize) -> rustix::io::Result<Self> {
        // SAFETY: without an address and without `FIXED`, the kernel picks pages that nobody uses.
        let start = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { start, len })
    }

    /// Cuts the mapping in two at a multiple of the page size; dropping a part unmaps it, empty parts are no-ops.
    fn split(self, at: usize) -> (Self, Self) {
        let at = at.min(self.len);
        // SAFETY: `at <= len`, so the result stays inside, or one past the end of, the mapping.
        let rest = unsafe { self.start.add(at) };
        let parts = (Self { start: self.start, len: at }, Self { start: rest, len: self.len - at });
        // The parts unmap the pages from here on.
        std::mem::forget(self);
        parts
    }

    /// Best effort: without huge pages everything works, slower.
    fn advise_huge(&self) {
        #[cfg(target_os = "linux")]
        {
            use rustix::mm::{Advice, madvise};
            // SAFETY: the range is ours, and this advice changes neither its contents nor its protection.
            let advised =
                unsafe { madvise(self.start.as_ptr().cast(), self.len, Advice::LinuxHugepage) };
            if let Err(error) = advised {
                tracing::debug!(%error, bytes = self.len, "no huge pages");
            }
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.len == 0 {
            return;
        }
        // SAFETY: these pages are ours, and `Memory` handed out no access that outlives its owner.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
        if let Err(error) = unmapped {
            tracing::warn!(%error, bytes = self.len, "memory leaked: the kernel refused to unmap it");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_mappings_are_trimmed_to_whole_pages_at_a_huge_boundary() {
        let page = rustix::param::page_size();
        for bytes in [HUGE - page + 1, HUGE, HUGE + 1, 3 * HUGE - 1] {
            let mapping = Mapping::new(bytes).unwrap();
            assert_eq!(mapping.start.as_ptr().addr() % HUGE, 0);
            assert_eq!(mapping.len, bytes.next_multiple_of(page));
        }
    }

    #[test]
    fn sizes_that_no_memory_has_are_refused() {
        for bytes in [
            usize::MAX,
            usize::MAX - 4096,
            isize::MAX.unsigned_abs(),
            isize::MAX.unsigned_abs() - HUGE,
        ] {
            let error = HostAllocator.allocate(bytes).unwrap_err();
            assert_eq!((error.bytes(), error.kind()), (bytes as u64, MemoryKind::Host));
        }
    }

    /// A leak of the mappings would show as 1 TiB here, one of what is trimmed as 2 GiB.
    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_dropped_and_what_is_trimmed_goes_back() {
        let mapped_pages = || {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            statm.split(' ').next().unwrap().parse::<usize>().unwrap()
        };
        let before = mapped_pages();
        for _ in 0..1000 {
            drop(HostAllocator.allocate(1 << 30).unwrap());
        }
        let grown = mapped_pages().saturating_sub(before) * rustix::param::page_size();
        assert!(grown < 1 << 30, "{grown} bytes more are mapped");
    }
}
