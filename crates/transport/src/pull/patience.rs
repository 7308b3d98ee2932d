use std::hint;
use std::thread;
use std::time::{Duration, Instant};

const SPIN: Duration = Duration::from_micros(100);
const YIELD: Duration = Duration::from_millis(30);
const SLEEP: Duration = Duration::from_micros(50);

/// How to wait between polls: shortly at first, when little work is likely to be left.
///
/// Back to back for a tenth of a millisecond, then letting other threads run, and after 30 milliseconds, which move some
/// gigabytes between GPUs, sleeping 50 us at a time.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    since: Instant,
}

impl Default for Patience {
    fn default() -> Self {
        Self::new()
    }
}

impl Patience {
    /// Begins to wait.
    #[must_use]
    pub fn new() -> Self {
        Self { since: Instant::now() }
    }

    /// Waits a little, and says whether there is time left.
    pub fn pause(&mut self, deadline: Instant) -> bool {
        let now = Instant::now();
        let Some(left) = deadline.checked_duration_since(now).filter(|left| !left.is_zero()) else {
            return false;
        };
        match now.saturating_duration_since(self.since) {
            waited if waited < SPIN => hint::spin_loop(),
            waited if waited < YIELD => thread::yield_now(),
            _ => thread::sleep(SLEEP.min(left)),
        }
        true
    }
}
