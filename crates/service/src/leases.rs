//! Which readers are alive, by our own clock.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::message::{Message, ReaderLease};
use crate::rendezvous::{Key, Snapshot};

/// What is known of the leases of a group: when each was first seen, and when it ends.
///
/// Clocks of other machines play no part. A lease counts from when *we* first see it, so one whose reader died while its
/// session still looks alive is over after its own length, and nobody waits longer.
#[derive(Clone, Debug, Default)]
pub(crate) struct LeaseBook {
    /// When it ends, or that it has been seen to end.
    ends: BTreeMap<Key, Instant>,
}

impl LeaseBook {
    /// Takes note of the leases there are, and forgets those that are gone. `most` bounds the length of every lease, and is
    /// the length of one that cannot be read: whoever wrote it may be reading.
    pub(crate) fn observe(
        &mut self,
        readers: &Key,
        snapshot: &Snapshot,
        most: Duration,
        now: Instant,
    ) {
        let leases = snapshot.entries.iter().filter(|(key, _)| key.is_under(readers));
        let ends = leases.map(|(key, value)| {
            let life = ReaderLease::decode(value).map_or(most, |lease| lease.life().min(most));
            (key.clone(), self.ends.get(key).copied().unwrap_or(now + life))
        });
        self.ends = ends.collect();
    }

    /// Leases that are not over.
    pub(crate) fn live(&self, now: Instant) -> impl Iterator<Item = &Key> {
        self.ends.iter().filter(move |(_, end)| **end > now).map(|(key, _)| key)
    }

    /// When the next lease is over by itself.
    pub(crate) fn next_end(&self, now: Instant) -> Option<Instant> {
        self.ends.values().copied().filter(|end| *end > now).min()
    }
}
