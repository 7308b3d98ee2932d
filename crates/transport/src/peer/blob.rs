//! What a peer agent publishes beside its ranges: where it lives, and how its allocations can be mapped elsewhere.
//!
//! Nothing here reaches the driver before it was checked: the counts size nothing, every allocation lies behind the
//! one before, and every published range lies in them.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use refit_pool::MemoryKind;

use super::process::Process;
use crate::Cause;
use crate::envelope::Reader;
use crate::registry::Ranges;

const VERSION: u8 = 1;

/// How the driver names an allocation to other processes.
pub(super) type Handle = [u8; 64];

/// A whole allocation, as the driver made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Allocation {
    pub(super) handle: Handle,
    /// Its first address in the process that owns it.
    pub(super) base: u64,
    pub(super) len: u64,
}

/// Which device an agent serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeviceId {
    /// Its number in the process of the agent.
    pub(super) ordinal: u32,
    /// Its name everywhere.
    pub(super) uuid: [u8; 16],
}

/// What an agent says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Blob {
    pub(super) process: Process,
    /// Tells the agent from others of its process.
    pub(super) incarnation: [u8; 16],
    pub(super) device: DeviceId,
    /// Sorted by address, disjoint.
    pub(super) allocations: Vec<Allocation>,
}

impl Blob {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.push(VERSION);
        out.extend_from_slice(&self.process.host);
        out.extend_from_slice(&self.process.namespace.to_le_bytes());
        out.extend_from_slice(&self.process.token);
        out.extend_from_slice(&self.process.pid.to_le_bytes());
        out.extend_from_slice(&self.process.started.to_le_bytes());
        out.extend_from_slice(&self.incarnation);
        out.extend_from_slice(&self.device.ordinal.to_le_bytes());
        out.extend_from_slice(&self.device.uuid);
        out.extend_from_slice(&(self.allocations.len() as u64).to_le_bytes());
        for allocation in &self.allocations {
            out.extend_from_slice(&allocation.handle);
            out.extend_from_slice(&allocation.base.to_le_bytes());
            out.extend_from_slice(&allocation.len.to_le_bytes());
        }
        out
    }

    /// Reads a blob, and refuses it unless its allocations hold all of `ranges`.
    pub(super) fn decode(bytes: &[u8], ranges: &Ranges) -> Result<Self, Cause> {
        let mut reader = Reader::new(bytes);
        if reader.array("blob version")? != [VERSION] {
            return Err(Cause::Metadata { part: "blob version" });
        }
        let process = Process {
            host: reader.array("process")?,
            namespace: u64::from_le_bytes(reader.array("process")?),
            token: reader.array("process")?,
            pid: u32::from_le_bytes(reader.array("process")?),
            started: u64::from_le_bytes(reader.array("process")?),
        };
        let incarnation = reader.array("incarnation")?;
        let device = DeviceId {
            ordinal: u32::from_le_bytes(reader.array("device")?),
            uuid: reader.array("device")?,
        };
        let kind = MemoryKind::Cuda(device.ordinal);
        let mut allocations = Vec::new();
        let mut inside = Ranges::default();
        // The count sizes nothing: an allocation that is not there ends the loop.
        for _ in 0..u64::from_le_bytes(reader.array("allocations")?) {
            let allocation = Allocation {
                handle: reader.array("allocations")?,
                base: u64::from_le_bytes(reader.array("allocations")?),
                len: u64::from_le_bytes(reader.array("allocations")?),
            };
            inside
                .push(kind, allocation.base, allocation.len)
                .ok_or(Cause::Metadata { part: "allocations" })?;
            allocations.push(allocation);
        }
        if !reader.is_empty() {
            return Err(Cause::Metadata { part: "blob length" });
        }
        // The kind of a range on another device, or on the host, is that of no allocation.
        if !ranges.iter().all(|(kind, address, len)| inside.cover(kind, address, len, |_| {})) {
            return Err(Cause::Metadata { part: "a range outside every allocation" });
        }
        Ok(Self { process, incarnation, device, allocations })
    }

    /// The allocations that hold bytes of `ranges`, which were decoded with this. The others need no mapping.
    pub(super) fn holding(&self, ranges: &Ranges) -> Vec<Allocation> {
        let mut ranges = ranges.iter().peekable();
        let end = |start: u64, len: u64| start.saturating_add(len);
        let holds = |allocation: &&Allocation| {
            // Both are sorted, disjoint, and of one kind.
            while ranges.next_if(|(_, start, len)| end(*start, *len) <= allocation.base).is_some() {
            }
            let behind = end(allocation.base, allocation.len);
            ranges.peek().is_some_and(|(_, start, _)| *start < behind)
        };
        self.allocations.iter().filter(holds).copied().collect()
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "invented bytes may be any")]
mod tests {
    use super::*;

    const KIND: MemoryKind = MemoryKind::Cuda(3);

    fn allocation(base: u64, len: u64) -> Allocation {
        let handle = std::array::from_fn(|at| (base as u8) ^ (at as u8));
        Allocation { handle, base, len }
    }

    fn blob(allocations: &[(u64, u64)]) -> Blob {
        Blob {
            process: Process {
                host: [1; 16],
                namespace: 0x0102_0304_0506_0708,
                token: [2; 16],
                pid: 4711,
                started: 99,
            },
            incarnation: [3; 16],
            device: DeviceId { ordinal: 3, uuid: [4; 16] },
            allocations: allocations.iter().map(|&(base, len)| allocation(base, len)).collect(),
        }
    }

    fn ranges(list: &[(MemoryKind, u64, u64)]) -> Ranges {
        let mut ranges = Ranges::default();
        for &(kind, address, len) in list {
            ranges.push(kind, address, len).unwrap();
        }
        ranges
    }

    /// What surrounds a blob keeps damage away from it; here every byte has to hold by itself.
    fn count_at() -> usize {
        blob(&[]).encode().len() - 8
    }

    #[test]
    fn what_goes_in_comes_out() {
        let there = blob(&[(0x1000, 0x1000), (0x2000, 0x800), (0x9000, 1)]);
        let ranges = ranges(&[(KIND, 0x1010, 0x10), (KIND, 0x1800, 0x1000), (KIND, 0x9000, 1)]);
        assert_eq!(Blob::decode(&there.encode(), &ranges).unwrap(), there);
        assert_eq!(Blob::decode(&blob(&[]).encode(), &Ranges::default()).unwrap(), blob(&[]));
    }

    #[test]
    fn every_truncation_and_every_addition_is_refused() {
        let bytes = blob(&[(0x1000, 0x1000), (0x4000, 0x1000)]).encode();
        for len in 0..bytes.len() {
            let refused = Blob::decode(&bytes[..len], &Ranges::default()).unwrap_err();
            assert!(matches!(refused, Cause::Metadata { .. }), "{len} bytes: {refused:?}");
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(Blob::decode(&longer, &Ranges::default()).is_err());
    }

    #[test]
    fn every_flipped_bit_is_refused_or_is_another_legal_blob() {
        let there = blob(&[(0x1000, 0x1000), (0x4000, 0x1000)]);
        let bytes = there.encode();
        let published = ranges(&[(KIND, 0x1100, 0x100), (KIND, 0x4000, 0x1000)]);
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let Ok(found) = Blob::decode(&damaged, &published) else { continue };
            assert_ne!(found, there, "bit {bit} says nothing");
            assert_eq!(found.encode(), damaged, "bit {bit} is read in two ways");
            let holds = |address: u64, len: u64| {
                found.allocations.iter().any(|allocation| {
                    allocation.base <= address && address + len <= allocation.base + allocation.len
                })
            };
            assert!(holds(0x1100, 0x100) && holds(0x4000, 0x1000), "bit {bit} moved memory");
            assert_eq!(found.device.ordinal, 3, "bit {bit} moved the device");
        }
    }

    /// As it is published: there, nothing is another legal one.
    #[test]
    fn published_it_is_refused_with_any_bit_flipped_or_byte_missing() {
        use crate::envelope;
        let there = blob(&[(0x1000, 0x1000), (0x4000, 0x1000)]);
        let published = ranges(&[(KIND, 0x1100, 0x100), (KIND, 0x4000, 0x1000)]);
        let bytes = envelope::encode("peer", "a", &published, &there.encode());
        let refused = |bytes: &[u8]| envelope::decode("peer", "a", bytes, 1 << 20).is_err();
        assert!(!refused(&bytes));
        for len in 0..bytes.len() {
            assert!(refused(&bytes[..len]), "{len} bytes");
        }
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(refused(&damaged), "bit {bit}");
        }
    }

    #[test]
    fn counts_that_lie_cost_nothing() {
        for count in [1, 3, 1 << 40, u64::MAX] {
            let mut bytes = blob(&[(0x1000, 0x1000), (0x4000, 0x1000)]).encode();
            bytes[count_at()..count_at() + 8].copy_from_slice(&u64::to_le_bytes(count));
            let refused = Blob::decode(&bytes, &Ranges::default()).unwrap_err();
            let part = if count == 1 { "blob length" } else { "allocations" };
            assert_eq!(refused, Cause::Metadata { part }, "{count}");
        }
    }

    #[test]
    fn ranges_outside_allocations_are_refused() {
        let bytes = blob(&[(0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x1000)]).encode();
        for (kind, address, len) in [
            (KIND, 0xFFF, 2),
            (KIND, 0x2FFF, 2),
            (KIND, 0x1000, 0x2001),
            (KIND, 0x3000, 1),
            (KIND, 0x2000, 0x7000),
            (KIND, 0x8FFF, 2),
            (KIND, 0x9000, u64::MAX - 0x9000),
            (MemoryKind::Cuda(2), 0x1000, 1),
            (MemoryKind::Host, 0x1000, 1),
        ] {
            let refused = Blob::decode(&bytes, &ranges(&[(kind, address, len)])).unwrap_err();
            let part = "a range outside every allocation";
            assert_eq!(refused, Cause::Metadata { part }, "{kind} {address:#x} {len:#x}");
        }
    }

    #[test]
    fn allocations_without_published_bytes_need_no_mapping() {
        let there = blob(&[(0x1000, 0x100), (0x2000, 0x100), (0x2100, 0x100), (0x3000, 0x100)]);
        let holding = |list: &[(u64, u64)]| -> Vec<u64> {
            let list: Vec<_> = list.iter().map(|&(start, len)| (KIND, start, len)).collect();
            there.holding(&ranges(&list)).iter().map(|allocation| allocation.base).collect()
        };
        assert_eq!(holding(&[]), []);
        assert_eq!(holding(&[(0x1000, 1), (0x10FF, 1)]), [0x1000]);
        assert_eq!(holding(&[(0x20FF, 2), (0x3080, 0x80)]), [0x2000, 0x2100, 0x3000]);
        assert_eq!(holding(&[(0x2100, 0x100)]), [0x2100]);
    }

    #[test]
    fn allocations_that_overlap_wrap_or_are_empty_are_refused() {
        for list in [
            [(0x1000, 0x1001), (0x2000, 0x1000)],
            [(0x2000, 0x1000), (0x1000, 0x1000)],
            [(0x1000, 0x1000), (0x1000, 0x1000)],
            [(0x1000, 0), (0x2000, 0x1000)],
            [(0x1000, 0x1000), (u64::MAX, 2)],
        ] {
            let refused = Blob::decode(&blob(&list).encode(), &Ranges::default()).unwrap_err();
            assert_eq!(refused, Cause::Metadata { part: "allocations" }, "{list:x?}");
        }
    }

    /// Bytes nobody encoded: whatever is taken is what was given, whatever is not is named.
    #[test]
    fn invented_bytes_are_refused_or_read_exactly() {
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        let mut next = || {
            state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
            state >> 33
        };
        let seed = blob(&[(0x1000, 0x1000), (0x4000, 0x1000), (0x6000, 7)]).encode();
        let published = ranges(&[(KIND, 0x1100, 0x100)]);
        for _ in 0..20_000 {
            let mut bytes = seed.clone();
            for _ in 0..=next() % 4 {
                match next() % 4 {
                    0 => bytes.truncate(next() as usize % (bytes.len() + 1)),
                    1 => bytes.push(next() as u8),
                    _ if bytes.is_empty() => {}
                    2 => {
                        let at = next() as usize % bytes.len();
                        bytes[at] = next() as u8;
                    }
                    _ => {
                        let at = next() as usize % bytes.len();
                        let end = bytes.len().min(at + 8);
                        bytes[at..end].fill(if next() % 2 == 0 { 0xFF } else { 0 });
                    }
                }
            }
            match Blob::decode(&bytes, &published) {
                Ok(found) => assert_eq!(found.encode(), bytes),
                Err(Cause::Metadata { .. }) => {}
                Err(other) => panic!("{other:?}"),
            }
        }
    }
}
