//! Sharing out copies in host memory among threads, where there is enough to do.

use std::num::NonZero;
use std::thread;

use crate::error::RefitError;

/// Below this many bytes a thread costs more than it saves.
const BYTES_WORTH_A_THREAD: u64 = 8 << 20;

/// A single core does not fill the memory bus; a few do, and the engine has work for the rest.
const MOST_THREADS: usize = 4;

/// Carries out all of `work`, neighbours on one thread.
pub(crate) fn share<W: Send>(
    work: &mut [W],
    bytes: impl Fn(&W) -> u64,
    carry_out: impl Fn(&mut [W]) -> Result<(), RefitError> + Sync,
) -> Result<(), RefitError> {
    let total: u64 = work.iter().map(&bytes).sum();
    let threads = usize::try_from(total / BYTES_WORTH_A_THREAD)
        .unwrap_or(MOST_THREADS)
        .min(MOST_THREADS)
        .min(thread::available_parallelism().map_or(1, NonZero::get));
    if threads < 2 {
        return carry_out(work);
    }
    let share = total / threads as u64 + 1;
    let carry_out = &carry_out;
    thread::scope(|scope| {
        let mut rest = work;
        let mut running = Vec::with_capacity(threads);
        while !rest.is_empty() {
            let mut shared = 0;
            let until = rest.iter().position(|work| {
                shared += bytes(work);
                shared >= share
            });
            let (part, after) = rest.split_at_mut(until.map_or(rest.len(), |last| last + 1));
            rest = after;
            running.push(scope.spawn(move || carry_out(part)));
        }
        // Every thread is joined, whatever the others did; a panic in one goes on here.
        let results: Vec<_> = running
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect();
        results.into_iter().collect()
    })
}
