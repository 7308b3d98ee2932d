use std::ptr;

use refit_planner::Dims;
use refit_pool::{MemoryKind, Region};

use crate::registry::Registry;
use crate::{Cause, ReadOp, Status};

/// How far a batch has been copied.
#[derive(Debug, Default)]
pub(super) struct Cursor {
    read: usize,
    /// Runs of the read that are done.
    run: u64,
    /// Bytes of the run that are done.
    byte: u64,
}

impl Cursor {
    /// Copies up to `budget` bytes, at least one.
    ///
    /// # Safety
    /// - Every read's `into` lies in host memory that is valid for writes until this returns.
    /// - Nobody else accesses the bytes that the reads write until this returns.
    pub(super) unsafe fn copy(
        &mut self,
        reads: &[ReadOp],
        peer: &Registry<()>,
        budget: u64,
    ) -> Result<Status, Cause> {
        let mut budget = budget.max(1);
        // Held while its bytes are copied: the owner may deregister and free, the memory stays.
        let mut around: Vec<Region> = Vec::new();
        while let Some(op) = reads.get(self.read) {
            if !covers(&around, op) {
                around = peer
                    .share(op.from.kind, op.from.address, op.from.len)
                    .ok_or(Cause::Deregistered { read: self.read })?;
            }
            let runs = op.dims.runs();
            while self.run < runs {
                if budget == 0 {
                    return Ok(Status::Pending);
                }
                let (from, into) = offsets(&op.dims, self.run);
                let bytes = (op.run - self.byte).min(budget);
                let source = host_pointer(op.from.address + from + self.byte).cast_const();
                let target = host_pointer(op.into.address + into + self.byte);
                // The budget keeps this small where an address space is.
                let len = usize::try_from(bytes).unwrap_or(usize::MAX);
                // SAFETY: the run lies in the read's two ranges (`check_shapes`: its extents are their lengths). The
                // source range is registered and `around` keeps it allocated; the target is the caller's promise.
                // `copy`, not `copy_nonoverlapping`: both agents may have registered the same memory. Whether the
                // source's owner writes meanwhile is nobody's to know here; see the module's head.
                unsafe { ptr::copy(source, target, len) };
                budget -= bytes;
                self.byte += bytes;
                if self.byte == op.run {
                    (self.run, self.byte) = (self.run + 1, 0);
                }
            }
            (self.read, self.run) = (self.read + 1, 0);
        }
        Ok(Status::Done)
    }
}

/// The offsets of one run on either side. They lie inside the extents, which did not overflow.
fn offsets(dims: &Dims, mut run: u64) -> (u64, u64) {
    let mut offsets = (0, 0);
    for dim in dims.as_slice().iter().rev() {
        let step = run % dim.count;
        run /= dim.count;
        offsets = (offsets.0 + step * dim.source_stride, offsets.1 + step * dim.target_stride);
    }
    offsets
}

/// Whether the read's source lies in one region that is already held.
fn covers(around: &[Region], op: &ReadOp) -> bool {
    debug_assert_eq!(op.from.kind, MemoryKind::Host, "only host memory is registered");
    let [region] = around else { return false };
    region.address() <= op.from.address
        && op.from.address + op.from.len <= region.address() + region.len()
        && region.kind() == op.from.kind
}

fn host_pointer(address: u64) -> *mut u8 {
    // Host addresses came from pointers of this process, so they fit.
    ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap_or(usize::MAX))
}
