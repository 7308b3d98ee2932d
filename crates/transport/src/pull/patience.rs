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
    /// For so long it does not sleep.
    awake: Duration,
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
        Self { since: Instant::now(), awake: YIELD }
    }

    /// Goes on waiting for a peer that has kept somebody waiting for long: sleeps from the first pause on, so that a silent
    /// peer takes no time from the reads of others.
    #[must_use]
    pub fn for_the_silent() -> Self {
        Self { since: Instant::now(), awake: Duration::ZERO }
    }

    /// Waits a little, and says whether there is time left.
    pub fn pause(&mut self, deadline: Instant) -> bool {
        let now = Instant::now();
        let Some(left) = deadline.checked_duration_since(now).filter(|left| !left.is_zero()) else {
            return false;
        };
        match now.saturating_duration_since(self.since) {
            waited if waited < SPIN.min(self.awake) => hint::spin_loop(),
            waited if waited < self.awake => thread::yield_now(),
            _ => thread::sleep(SLEEP.min(left)),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often it is polled in `long`.
    fn polls(mut patience: Patience, long: Duration) -> u128 {
        let deadline = Instant::now() + long;
        let mut polls = 0;
        while patience.pause(deadline) {
            polls += 1;
        }
        polls
    }

    /// No sleep is shorter than it was asked to be, so this is a bound on every machine.
    #[test]
    fn silent_peers_are_polled_seldom() {
        let long = Duration::from_millis(100);
        // The last sleep may be cut short by the deadline.
        let most = long.as_micros() / SLEEP.as_micros() + 1;
        assert!(polls(Patience::for_the_silent(), long) <= most);
        let mut blocked = Patience::new();
        blocked.since = Instant::now().checked_sub(YIELD).unwrap();
        assert!(polls(blocked, long) <= most);
        assert!(polls(Patience::for_the_silent(), Duration::ZERO) == 0);
    }
}
