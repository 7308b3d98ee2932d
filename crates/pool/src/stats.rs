/// A pool's counters and gauges at one moment.
///
/// Counters only grow. Registrations that still exist are `registrations - deregistrations`, quarantined ones
/// included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct PoolStats {
    /// Counter: arenas allocated.
    pub allocations: u64,
    /// Counter: pieces of memory registered.
    pub registrations: u64,
    /// Counter: registrations undone, those that failed to be included.
    pub deregistrations: u64,
    /// Counter: registrations that could not be undone cleanly.
    pub failed_deregistrations: u64,
    /// Counter: leases of an entry that was there.
    pub hits: u64,
    /// Counter: leases that had to build their entry, whether that worked or not.
    pub misses: u64,
    /// Counter: idle entries dropped, to make room or because the caller asked.
    pub evictions: u64,
    /// Counter: entries quarantined.
    pub quarantines: u64,
    /// Counter: quarantined entries that were released because nothing writes them any more.
    pub releases: u64,
    /// Gauge: arena bytes allocated and not freed, quarantined ones included. Never more than the budget. Adopted
    /// memory is not counted.
    pub bytes: u64,
    /// Gauge, part of `bytes`: those of leased entries.
    pub leased_bytes: u64,
    /// Gauge, part of `bytes`: those that are not lent or freed, because a transfer may still write them.
    pub quarantined_bytes: u64,
    /// Gauge: entries that these are in.
    pub quarantined_entries: u64,
    /// Gauge: entries in the pool, idle, leased or being built. Quarantined ones are no longer among them.
    pub entries: u64,
}
