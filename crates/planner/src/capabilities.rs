//! What a transport can do and what it costs, in integers.

use crate::encode::Encoder;
use crate::{Segment, Transform};

/// What a transport can do, in integers so that every host decides alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Capabilities {
    /// It executes strided segments as they are: nothing needs exploding.
    pub strided_reads: bool,
    /// It casts and maps elements on their way: nothing needs staging for that.
    pub transforms: bool,
    /// Bytes it moves per microsecond.
    pub bytes_per_us: u64,
    /// What one more read costs.
    pub ns_per_read: u64,
    /// Most reads one program may have; 2^25 is the most for any transport.
    pub max_reads: u64,
    /// A second way for contiguous reads, if it has one: a copy engine beside a kernel.
    pub bulk: Option<Bulk>,
}

/// A way to read that is faster for every byte and dearer for every read than the ordinary one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Bulk {
    /// Bytes it moves per microsecond.
    pub bytes_per_us: u64,
    /// What one more read costs.
    pub ns_per_read: u64,
}

impl Capabilities {
    /// A transport that reads contiguous ranges and does nothing else, at these costs.
    #[must_use]
    pub const fn plain(bytes_per_us: u64, ns_per_read: u64) -> Self {
        Self {
            strided_reads: false,
            transforms: false,
            bytes_per_us,
            ns_per_read,
            max_reads: u64::MAX,
            bulk: None,
        }
    }

    /// What so many reads of so many bytes together cost, in nanoseconds.
    pub(crate) fn cost(&self, reads: u64, bytes: u64) -> u64 {
        reads.saturating_mul(self.ns_per_read).saturating_add(nanoseconds(bytes, self.bytes_per_us))
    }

    /// How many bytes move in the time that one more read costs.
    pub(crate) fn bytes_in_a_read(&self) -> u64 {
        let bytes = u128::from(self.ns_per_read) * u128::from(self.bytes_per_us) / 1_000;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// What it costs to read these contiguous runs by the second way, if that is cheaper than the ordinary one.
    pub(crate) fn bulk_cost(&self, ordinary: u64, runs: u64, bytes: u64) -> Option<u64> {
        let bulk = self.bulk?;
        let cost = runs
            .saturating_mul(bulk.ns_per_read)
            .saturating_add(nanoseconds(bytes, bulk.bytes_per_us));
        (cost < ordinary).then_some(cost)
    }

    /// How a segment is read to where it ends: the number of reads, what they cost, and whether by the second way.
    pub(crate) fn direct(&self, segment: &Segment) -> Way {
        let (runs, bytes) = (segment.dims.runs(), segment.source_bytes());
        let reads = if self.strided_reads { 1 } else { runs };
        let cost_ns = self.cost(reads, bytes);
        let bulk = (segment.transform == Transform::Copy)
            .then(|| self.bulk_cost(cost_ns, runs, bytes))
            .flatten();
        match bulk {
            Some(cost_ns) => Way { reads: runs, cost_ns, bulk: true },
            None => Way { reads, cost_ns, bulk: false },
        }
    }

    pub(crate) fn encode(&self, encoder: &mut Encoder) {
        let bulk = self.bulk.map_or([0, 0], |bulk| [bulk.bytes_per_us, bulk.ns_per_read]);
        for number in [
            u64::from(self.strided_reads),
            u64::from(self.transforms),
            self.bytes_per_us,
            self.ns_per_read,
            u64::from(self.bulk.is_some()),
            bulk[0],
            bulk[1],
        ] {
            encoder.u64(number);
        }
    }
}

/// How one segment is read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    pub(crate) reads: u64,
    pub(crate) cost_ns: u64,
    pub(crate) bulk: bool,
}

/// Rounded down; a rate of 0 counts as 1.
pub(crate) fn nanoseconds(bytes: u64, bytes_per_us: u64) -> u64 {
    let nanoseconds = u128::from(bytes) * 1_000 / u128::from(bytes_per_us.max(1));
    u64::try_from(nanoseconds).unwrap_or(u64::MAX)
}
