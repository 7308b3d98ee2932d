//! Work shared out among threads.

use std::sync::Mutex;
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
    let queue = Queue { items: Mutex::new(items.into_iter().enumerate()) };
    let worker = || -> Result<u64, (usize, Box<CliError>)> {
        let (mut scratch, mut sum) = (scratch(), 0);
        while let Some((index, item)) = queue.next() {
            match work(&mut scratch, item) {
                Ok(more) => sum += more,
                Err(error) => {
                    queue.clear();
                    return Err((index, Box::new(error)));
                }
            }
        }
        Ok(sum)
    };
    if threads == 1 {
        return worker().map_err(|(_, error)| *error);
    }
    let results: Vec<_> = thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        // Every thread is joined, whatever the others did; a panic in one goes on here.
        let join = |thread: thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        running.into_iter().map(join).collect()
    });
    let (mut sum, mut first) = (0, None::<(usize, Box<CliError>)>);
    for result in results {
        match result {
            Ok(more) => sum += more,
            Err((index, _)) if first.as_ref().is_some_and(|(earlier, _)| *earlier < index) => {}
            Err(failed) => first = Some(failed),
        }
    }
    first.map_or(Ok(sum), |(_, error)| Err(*error))
}

struct Queue<I> {
    items: Mutex<I>,
}

impl<I: Iterator> Queue<I> {
    fn next(&self) -> Option<I::Item> {
        self.items.lock().ok()?.next()
    }

    /// Leaves nothing to do.
    fn clear(&self) {
        if let Ok(mut items) = self.items.lock() {
            while items.next().is_some() {}
        }
    }
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
