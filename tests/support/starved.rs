//! Time in which a busy machine runs none of us.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const NAP: Duration = Duration::from_millis(2);

/// Ends the naps, however the work ends.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Runs something, and says how long the machine ran none of us meanwhile: a second thread that only sleeps sees that.
pub fn while_running<R>(run: impl FnOnce() -> R) -> (R, Duration) {
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let naps = scope.spawn(|| {
            let mut starved = Duration::ZERO;
            while !ended.load(Ordering::Acquire) {
                let slept = Instant::now();
                thread::sleep(NAP);
                starved += slept.elapsed().saturating_sub(2 * NAP);
            }
            starved
        });
        let ends = Ends(&ended);
        let result = run();
        drop(ends);
        (result, naps.join().unwrap())
    })
}
