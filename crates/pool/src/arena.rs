//! Many parts in one allocation, so that one registration serves them all.

use crate::{CarveError, Memory};

/// Adds up the size of an arena, part by part.
///
/// ```
/// use refit_pool::{Allocator, ArenaPlan, HostAllocator};
///
/// let mut arena = ArenaPlan::new();
/// let parts = [(arena.push(6, 256), 6), (arena.push(10, 256), 10)];
/// let memory = HostAllocator.allocate(usize::try_from(arena.bytes())?)?;
/// let parts = memory.carve(&parts)?;
/// assert_eq!(parts[1].address() - parts[0].address(), 256);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArenaPlan {
    bytes: u64,
}

impl ArenaPlan {
    /// An arena without parts.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Places a part of `bytes` at the next multiple of `align` (0 means 1) and says where it starts.
    ///
    /// Sizes that no memory could have do not wrap: the arena then has [`u64::MAX`] bytes, which no allocator gives.
    pub fn push(&mut self, bytes: u64, align: u64) -> u64 {
        let offset = self.bytes.checked_next_multiple_of(align.max(1)).unwrap_or(u64::MAX);
        self.bytes = offset.saturating_add(bytes);
        offset
    }

    /// Bytes of the whole arena.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Memory {
    /// Cuts out parts, given as offset and length in any order. They come back in the order given, and each keeps
    /// the allocation; bytes between them belong to nobody any more.
    ///
    /// # Errors
    /// [`CarveError`] when a part reaches outside or two parts share a byte.
    pub fn carve(self, parts: &[(u64, u64)]) -> Result<Vec<Self>, CarveError> {
        let available = self.len() as u64;
        let mut order = (0..parts.len()).collect::<Vec<_>>();
        order.sort_unstable_by_key(|&part| parts[part]);

        let mut carved = Vec::with_capacity(parts.len());
        let (mut rest, mut at) = (self, 0_u64);
        let mut previous = 0;
        for part in order {
            let (offset, len) = parts[part];
            if offset < at {
                return Err(CarveError::Overlap { part: previous, other: part, offset });
            }
            if len > available || offset > available - len {
                return Err(CarveError::Outside { part, offset, len, available });
            }
            // Both fit in `usize`, because `available` does.
            let (_, tail) = rest.split_at(usize::try_from(offset - at).unwrap_or(usize::MAX));
            let (taken, tail) = tail.split_at(usize::try_from(len).unwrap_or(usize::MAX));
            carved.push((part, taken));
            (rest, at, previous) = (tail, offset + len, part);
        }
        carved.sort_unstable_by_key(|&(part, _)| part);
        Ok(carved.into_iter().map(|(_, memory)| memory).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Allocator, HostAllocator};

    #[test]
    fn parts_are_aligned_and_sizes_never_wrap() {
        let mut arena = ArenaPlan::new();
        assert_eq!(
            [arena.push(3, 0), arena.push(5, 4), arena.push(0, 7), arena.push(1, 1)],
            [0, 4, 14, 14]
        );
        assert_eq!(arena.bytes(), 15);
        arena.push(u64::MAX - 20, 1);
        assert_eq!((arena.push(1, 256), arena.bytes()), (u64::MAX, u64::MAX));
    }

    #[test]
    fn parts_come_back_in_the_order_asked_for() {
        let memory = HostAllocator.allocate(100).unwrap();
        let base = memory.address();
        let parts = memory.carve(&[(60, 40), (0, 10), (10, 0), (20, 5)]).unwrap();
        let got = parts.iter().map(|part| (part.address() - base, part.len())).collect::<Vec<_>>();
        assert_eq!(got, [(60, 40), (0, 10), (10, 0), (20, 5)]);
        assert!(
            parts
                .iter()
                .all(|part| part.allocation().address() == base && part.allocation().len() == 100)
        );
    }

    #[test]
    fn parts_have_one_holder_and_stay_inside() {
        let carve = |parts: &[(u64, u64)]| {
            HostAllocator.allocate(100).unwrap().carve(parts).map(|_| ()).unwrap_err()
        };
        assert_eq!(
            carve(&[(50, 10), (0, 51)]),
            CarveError::Overlap { part: 1, other: 0, offset: 50 }
        );
        for (offset, len) in
            [(0, 101), (100, 1), (101, 0), (u64::MAX, 1), (1, u64::MAX), (u64::MAX, u64::MAX)]
        {
            assert_eq!(
                carve(&[(offset, len)]),
                CarveError::Outside { part: 0, offset, len, available: 100 }
            );
        }
    }
}
