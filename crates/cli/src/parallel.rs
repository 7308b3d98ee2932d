//! Work shared out among threads.

use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::error::CliError;

/// Does `work` on every item, in order but on up to `threads` threads at a time, and adds up what it returns. Each
/// thread brings a `scratch` of its own.
///
/// # Errors
/// That of the earliest item that failed. Items behind it may not have been worked on.
pub(crate) fn sum<I: Send, S>(
    threads: usize,
    items: Vec<I>,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, I) -> Result<u64, CliError> + Sync,
) -> Result<u64, CliError> {
    let threads = threads.clamp(1, items.len().max(1));
    let (items, failed) = (Mutex::new(items.into_iter().enumerate()), Mutex::new(None));
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    let fail = |index: usize, error| {
        let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.as_ref().is_none_or(|(earlier, _)| index < *earlier) {
            *failed = Some((index, error));
        }
        // Nothing is left for anybody else to take.
        let mut items = items.lock().unwrap_or_else(PoisonError::into_inner);
        items.by_ref().for_each(drop);
    };
    let worker = || {
        let (mut scratch, mut sum) = (scratch(), 0);
        while let Some((index, item)) = next() {
            match work(&mut scratch, item) {
                Ok(more) => sum += more,
                Err(error) => fail(index, error),
            }
        }
        sum
    };
    let sum = if threads == 1 {
        worker()
    } else {
        thread::scope(|scope| {
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
            // Every thread is joined, whatever the others did; a panic in one goes on here.
            let join = |thread: thread::ScopedJoinHandle<'_, u64>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            running.into_iter().map(join).sum()
        })
    };
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    failed.map_or(Ok(sum), |(_, error)| Err(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_worked_on_once_by_any_number_of_threads() {
        for threads in [0, 1, 2, 7, 1000] {
            for items in [0_u64, 1, 5, 200] {
                let sum = sum(threads, (0..items).collect(), || (), |(), item| Ok(item)).unwrap();
                assert_eq!(sum, (0..items).sum::<u64>());
            }
        }
    }

    #[test]
    fn the_earliest_failure_is_the_one_that_is_told() {
        for threads in [1, 3, 8] {
            let fail = |(): &mut (), item| match item {
                10.. => Err(CliError::Usage(format!("{item}"))),
                _ => Ok(1),
            };
            let error = sum(threads, (0..100).collect(), || (), fail).unwrap_err();
            assert_eq!(error.to_string(), "10");
        }
    }
}
