//! Where tables lie on a device: side by side in a few chunks of memory that stay as long as the kernel does.
//!
//! Allocating and freeing device memory empties the device's translation caches, and the gather that follows pays for
//! filling them again: a millisecond for a few gigabytes of peer memory. So a table that goes leaves its place to the
//! next one.

use std::fmt;
use std::sync::Arc;

use offset_allocator::ext::min_allocator_size;
use offset_allocator::{Allocation, Allocator as Offsets};
use parking_lot::Mutex;
use refit_pool::cuda::{CudaAllocator, Device, upload};
use refit_pool::{Allocator, Memory};

use crate::error::KernelError;

/// Bytes of a chunk, unless one table is larger.
const CHUNK: usize = 4 << 20;

/// Places start at multiples of this, and take whole ones.
const UNIT: usize = 256;

/// Most places in a chunk.
const PLACES: u32 = 1 << 14;

const _: () = assert!(PLACES as usize == CHUNK / UNIT);

/// Memory for tables.
pub(crate) struct Shelf {
    device: Device,
    chunks: Mutex<Vec<Chunk>>,
}

struct Chunk {
    memory: Memory,
    free: Offsets,
}

/// A table's place, which is free again when this goes.
pub(crate) struct Place {
    shelf: Arc<Shelf>,
    chunk: usize,
    allocation: Allocation,
    pub(crate) address: u64,
}

impl Shelf {
    pub(crate) fn new(device: Device) -> Arc<Self> {
        Arc::new(Self { device, chunks: Mutex::default() })
    }

    /// A chunk that a table of so many units fits into.
    fn chunk(&self, units: usize) -> Result<(Memory, Offsets), KernelError> {
        let room = room_for(units);
        let bytes = room as usize * UNIT;
        let memory = CudaAllocator::new(self.device.clone()).allocate(bytes)?;
        Ok((memory, Offsets::with_max_allocs(room, PLACES)))
    }

    /// Finds a place for these bytes and brings them there.
    pub(crate) fn put(self: &Arc<Self>, image: &[u8]) -> Result<Place, KernelError> {
        let units = image.len().max(1).div_ceil(UNIT);
        let mut chunks = self.chunks.lock();
        let found = u32::try_from(units).ok().and_then(|units| {
            let mut numbered = chunks.iter_mut().enumerate();
            numbered.find_map(|(chunk, place)| Some((chunk, place.free.allocate(units)?)))
        });
        let (chunk, allocation) = match found {
            Some(found) => found,
            None => {
                let (memory, mut free) = self.chunk(units)?;
                let whole = u32::try_from(units).unwrap_or(u32::MAX);
                let Some(allocation) = free.allocate(whole) else {
                    unreachable!("a chunk holds what it was made for");
                };
                chunks.push(Chunk { memory, free });
                (chunks.len() - 1, allocation)
            }
        };
        let address = chunks[chunk].memory.address() + u64::from(allocation.offset) * UNIT as u64;
        // From here on dropping it frees the place again.
        let place = Place { shelf: Arc::clone(self), chunk, allocation, address };
        let at = allocation.offset as usize * UNIT;
        let result = upload(&self.device, &mut chunks[chunk].memory, at, image);
        // Dropping a place takes the lock.
        drop(chunks);
        result?;
        Ok(place)
    }
}

/// Units of a chunk whose first table takes so many: what `Offsets` needs to find it room, as it tells sizes apart by
/// their four highest bits only.
fn room_for(units: usize) -> u32 {
    // What a `Table` may have takes less than 2^22 units.
    let units = u32::try_from(units).unwrap_or(u32::MAX);
    min_allocator_size(units).max(PLACES)
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shelf.chunks.lock()[self.chunk].free.free(self.allocation);
    }
}

impl fmt::Debug for Shelf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shelf").field("device", &self.device).finish_non_exhaustive()
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Addresses stay out of logs.
        f.debug_struct("Place").field("chunk", &self.chunk).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_holds_what_it_was_made_for() {
        let around = (0..=22).flat_map(|power| [(1 << power) - 1, 1 << power, (1 << power) + 1]);
        for units in around.chain((1..1 << 22).step_by(4999)).filter(|units| *units > 0) {
            let mut free: Offsets = Offsets::with_max_allocs(room_for(units), PLACES);
            let asked = u32::try_from(units).unwrap();
            assert!(free.allocate(asked).is_some(), "{units} units");
        }
    }
}
