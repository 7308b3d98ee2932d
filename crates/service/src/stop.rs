use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How soon who waits notices that the process is to end.
const LOOK: Duration = Duration::from_millis(20);

/// Has a process that was told to end come out of what it waits for. Clones are the same.
///
/// Given to a [`Seat`](crate::Seat::with_stop) and to targets ([`Shadow`](crate::rank::Shadow::with_stop),
/// [`Direct`](crate::rank::Direct::with_stop)), it brings their deadlines forward. From when it is [told](Self::tell), who waits
/// for others, or would, does what it does at its deadline: a bound rank decides its round, a version that was closed is
/// offered again, nothing new is read. Reads that are under way may write for as long as their peers like, and a connection
/// that is cut may take the peer down; so they are waited for, under their lease, for a while longer.
///
/// Leaving is not cut: what is given back then is waited for until the deadline of whoever leaves.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<Mutex<Option<Told>>>);

#[derive(Clone, Copy, Debug)]
struct Told {
    at: Instant,
    reads_until: Instant,
}

impl Stop {
    /// From now on nobody waits for others, and for reads that are under way until then. Only the first call counts.
    pub fn tell(&self, reads_until: Instant) {
        self.0.lock().get_or_insert(Told { at: Instant::now(), reads_until });
    }

    /// Whether it was told.
    #[must_use]
    pub fn is_told(&self) -> bool {
        self.0.lock().is_some()
    }

    /// The deadline of who waits for others.
    pub(crate) fn waits_until(&self, deadline: Instant) -> Instant {
        self.0.lock().map_or(deadline, |told| deadline.min(told.at))
    }

    /// The deadline of who waits for reads.
    pub(crate) fn reads_until(&self, deadline: Instant) -> Instant {
        self.0.lock().map_or(deadline, |told| deadline.min(told.reads_until))
    }
}

/// Waits for what comes, at most until the deadline, which `stop` brings forward as that of those who wait for others or for
/// reads.
pub(crate) fn receive<T>(
    from: &Receiver<T>,
    deadline: Instant,
    stop: Option<&Stop>,
    forward: impl Fn(&Stop, Instant) -> Instant,
) -> Result<T, RecvTimeoutError> {
    loop {
        let until = stop.map_or(deadline, |stop| forward(stop, deadline));
        let left = until.saturating_duration_since(Instant::now());
        let wait = if stop.is_some() { left.min(LOOK) } else { left };
        match from.recv_timeout(wait) {
            Err(RecvTimeoutError::Timeout) if wait < left => {}
            received => return received,
        }
    }
}
