//! An allocator that counts, for test binaries that promise something about memory:
//! `#[global_allocator] static GLOBAL: Counting = Counting;`

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// A single allocation larger than this fails: a test that asks for it would take the machine down with it.
const MOST: usize = 4 << 30;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, counting what each thread asks of it.
#[derive(Debug)]
pub struct Counting;

/// Allocations of this thread so far.
#[must_use]
pub fn count() -> u64 {
    COUNT.get()
}

/// The most bytes that were allocated at once on this thread while `work` ran, beyond those before it.
///
/// # Panics
/// When [`Counting`] is not the allocator.
pub fn peak<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = COUNT.get();
    drop(std::hint::black_box(Box::new(0_u8)));
    assert!(COUNT.get() > before, "allocations are not counted");
    let start = LIVE.get();
    PEAK.set(start);
    let result = work();
    (result, usize::try_from(PEAK.get() - start).unwrap_or(0))
}

fn allocated(size: usize) {
    // A thread that is ending has no counters left, and nothing to count. No allocation is larger than `isize::MAX`.
    let size = isize::try_from(size).unwrap_or(isize::MAX);
    let _ = COUNT.try_with(|count| count.set(count.get() + 1));
    let live = LIVE.try_with(|live| {
        live.set(live.get() + size);
        live.get()
    });
    let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.unwrap_or(0))));
}

fn freed(size: usize) {
    let size = isize::try_from(size).unwrap_or(isize::MAX);
    let _ = LIVE.try_with(|live| live.set(live.get() - size));
}

// SAFETY: everything is passed on to the system allocator unchanged, or refused with a null pointer, as an allocator
// may; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > MOST {
            return std::ptr::null_mut();
        }
        allocated(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() > MOST {
            return std::ptr::null_mut();
        }
        allocated(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if size > MOST {
            return std::ptr::null_mut();
        }
        // For a moment there may be both.
        allocated(size);
        freed(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(start, layout, size) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        freed(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(start, layout) }
    }
}
