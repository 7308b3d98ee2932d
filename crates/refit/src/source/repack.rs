//! Filling slots: strided copies within a rank's own memory.

use refit_planner::{Landing, PackSlot, RankLayout, Transform};
use refit_pool::{Memory, MemoryKind};

use crate::error::RefitError;
use crate::land::{host, threads};

/// A slot, what it is copied from, and its bytes.
struct Work<'a> {
    slot: &'a PackSlot,
    from: &'a [u8],
    into: &'a mut [u8],
}

/// Refuses parameters that could not be copied: better before slots are allocated for them.
pub(super) fn check(
    copied: impl IntoIterator<Item = usize>,
    layout: &RankLayout,
    params: &[Memory],
) -> Result<(), RefitError> {
    match copied.into_iter().find(|&param| params[param].kind() != MemoryKind::Host) {
        None => Ok(()),
        Some(param) => Err(not_host(layout.params()[param].name())),
    }
}

/// Fills the slots, which begin at these offsets of `arena`, from the parameters of the layout that was packed.
pub(super) fn repack(
    slots: &[PackSlot],
    offsets: &[u64],
    layout: &RankLayout,
    params: &[Memory],
    arena: &mut Memory,
) -> Result<(), RefitError> {
    let mut work = Vec::with_capacity(slots.len());
    let mut rest = arena.host_bytes_mut().ok_or_else(|| not_host("the slots"))?;
    let mut at = 0;
    for (slot, &offset) in slots.iter().zip(offsets) {
        let param = &params[slot.source];
        let missing = || not_host(layout.params()[slot.source].name());
        let from = param.host_bytes().ok_or_else(missing)?;
        // The arena was made for these slots, so all of them fit in memory.
        let (_, tail) = rest.split_at_mut(index(offset - at));
        let (into, tail) = tail.split_at_mut(index(slot.bytes));
        work.push(Work { slot, from, into });
        (rest, at) = (tail, offset + slot.bytes);
    }
    threads::share(&mut work, |work| work.slot.bytes, |work| work.iter_mut().try_for_each(fill))
}

fn fill(work: &mut Work<'_>) -> Result<(), RefitError> {
    let PackSlot { source_offset, run, dims, .. } = work.slot;
    let landing = Landing {
        staging_offset: *source_offset,
        target: 0,
        offset: 0,
        run: *run,
        dims: dims.clone(),
        transform: Transform::Copy,
    };
    Ok(host::copy(&landing, work.from, work.into)?)
}

fn not_host(param: &str) -> RefitError {
    RefitError::NotHost { param: param.to_owned() }
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
