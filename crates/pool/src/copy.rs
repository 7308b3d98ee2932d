//! Copying many runs within host memory, past the processor's caches.
//!
//! An ordinary store first reads the line it writes. Where the bytes written are not read again soon, as parameters
//! are not, that is half of the memory traffic for nothing. Streaming stores skip it: on a Zen 4 core, rows of 2 KiB
//! from a cached buffer are copied at 24 instead of 8 GB/s (`cargo xtask criterion --bench pool`).

/// Below this many bytes a run is copied by ordinary stores: most of it would be the ends of lines.
const WORTH_STREAMING: usize = 512;

/// Copies runs of `run` bytes from `from` into `into`. `drive` is given a function to call with the offset of each run
/// on either side, and what it returns is returned. The bytes are visible to other threads and devices afterwards.
///
/// # Panics
/// When a run leaves either slice, as slices do.
pub fn copy_runs<R>(
    from: &[u8],
    into: &mut [u8],
    run: usize,
    drive: impl FnOnce(&mut dyn FnMut(usize, usize)) -> R,
) -> R {
    if run < WORTH_STREAMING {
        return drive(&mut |source, target| {
            into[target..target + run].copy_from_slice(&from[source..source + run]);
        });
    }
    // Dropped behind the last store, also when `drive` unwinds.
    let _fence = Fence;
    drive(&mut |source, target| {
        stream(&from[source..source + run], &mut into[target..target + run]);
    })
}

/// Puts streaming stores before everything that follows: they are not ordered by anything weaker.
struct Fence;

impl Drop for Fence {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every x86-64 processor has SSE, which is all it asks for.
        unsafe {
            std::arch::x86_64::_mm_sfence();
        }
    }
}

/// Copies whole lines of `into` by streaming stores, what comes before and behind them by ordinary ones. A [`Fence`]
/// has to follow. Both are of one length.
#[cfg(target_arch = "x86_64")]
fn stream(from: &[u8], into: &mut [u8]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};

    /// One cache line.
    #[repr(align(64))]
    struct Line(#[allow(dead_code, reason = "only its size and alignment count")] [u8; 64]);

    // SAFETY: any bytes are a `Line`, and a `Line` is nothing but bytes.
    let (head, lines, tail) = unsafe { into.align_to_mut::<Line>() };
    let (from_head, rest) = from.split_at(head.len());
    let (from_lines, from_tail) = rest.split_at(size_of_val(lines));
    head.copy_from_slice(from_head);
    tail.copy_from_slice(from_tail);
    for (line, from) in lines.iter_mut().zip(from_lines.chunks_exact(size_of::<Line>())) {
        let line: *mut __m128i = std::ptr::from_mut(line).cast();
        let from: *const __m128i = from.as_ptr().cast();
        for quarter in 0..4 {
            // SAFETY: the chunk has four times 16 bytes.
            let from = unsafe { from.add(quarter) };
            // SAFETY: so has the line.
            let line = unsafe { line.add(quarter) };
            // SAFETY: 16 readable bytes of any alignment.
            let bytes = unsafe { _mm_loadu_si128(from) };
            // SAFETY: 16 writable bytes, aligned, that nobody else accesses before the fence: `copy_runs` holds the
            // slice exclusively until then.
            unsafe { _mm_stream_si128(line, bytes) };
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn stream(from: &[u8], into: &mut [u8]) {
    into.copy_from_slice(from);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_alignment_and_length_is_copied_and_nothing_beside_it() {
        let from: Vec<u8> = (0..4096_u32).map(|index| (index % 251) as u8).collect();
        for run in [0, 1, 63, 511, 512, 513, 640, 1000, 2048] {
            for (source, target) in [(0, 0), (1, 0), (0, 1), (7, 63), (65, 130), (1024, 1500)] {
                let mut into = vec![0xa5; 4096];
                copy_runs(&from, &mut into, run, |copy| copy(source, target));
                assert_eq!(into[target..target + run], from[source..source + run]);
                let beside = into[..target].iter().chain(&into[target + run..]);
                assert!(beside.into_iter().all(|&byte| byte == 0xa5), "{run} at {target}");
            }
        }
    }

    #[test]
    fn a_run_that_leaves_a_slice_panics_and_writes_nothing() {
        for (source, target) in [(1, 0), (0, 1)] {
            let (from, mut into) = (vec![1; 1024], vec![0; 1024]);
            let run = std::panic::AssertUnwindSafe(|| {
                copy_runs(&from, &mut into, 1024, |copy| copy(source, target));
            });
            assert!(std::panic::catch_unwind(run).is_err());
            assert!(into.iter().all(|&byte| byte == 0));
        }
    }
}
