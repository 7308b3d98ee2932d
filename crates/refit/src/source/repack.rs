//! Filling slots: strided copies within a rank's own memory, by the processor where it can reach it, by a device's kernel
//! where not.

#[cfg(feature = "cuda")]
mod device;

use refit_planner::{Landing, PackSlot, RankLayout, Transform};
use refit_pool::{Memory, MemoryKind};

use crate::error::RefitError;
use crate::land::{DeviceLander, host, threads};

/// A slot, what it is copied from, and its bytes.
struct Work<'a> {
    slot: &'a PackSlot,
    from: &'a [u8],
    into: &'a mut [u8],
}

/// Slots and where each begins in their arena, in ascending order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed<'a> {
    pub(super) slots: &'a [PackSlot],
    pub(super) offsets: &'a [u64],
}

/// How the slots of a rank are filled.
#[derive(Debug)]
pub(super) enum Copies {
    /// By the processor.
    Host,
    /// By a kernel.
    #[cfg(feature = "cuda")]
    Device(device::Copies),
}

impl Copies {
    /// What fills these slots, which are placed in `arena`, from the parameters of the layout that was packed.
    pub(super) fn new(
        placed: Placed<'_>,
        layout: &RankLayout,
        params: &[Memory],
        arena: &Memory,
        device: Option<&DeviceLander>,
    ) -> Result<Self, RefitError> {
        match device {
            #[cfg(feature = "cuda")]
            Some(lander) if arena.kind() != MemoryKind::Host => {
                Ok(Self::Device(device::Copies::new(placed, params, arena, lander)?))
            }
            _ => {
                check(placed.slots, layout, params, None)?;
                let reached = arena.kind() == MemoryKind::Host;
                if reached { Ok(Self::Host) } else { Err(not_host("the slots")) }
            }
        }
    }

    /// Fills all slots, and waits for that.
    pub(super) fn run(
        &mut self,
        placed: Placed<'_>,
        params: &[Memory],
        arena: &mut Memory,
    ) -> Result<(), RefitError> {
        match self {
            Self::Host => on_host(placed, params, arena),
            #[cfg(feature = "cuda")]
            Self::Device(copies) => copies.run(params),
        }
    }
}

/// Refuses parameters that nobody could copy: better before slots are allocated for them.
pub(super) fn check(
    slots: &[PackSlot],
    layout: &RankLayout,
    params: &[Memory],
    device: Option<&DeviceLander>,
) -> Result<(), RefitError> {
    let far = |slot: &&PackSlot| params[slot.source].kind() != MemoryKind::Host;
    match slots.iter().find(far) {
        Some(slot) if device.is_none() => Err(not_host(layout.params()[slot.source].name())),
        _ => Ok(()),
    }
}

fn on_host(placed: Placed<'_>, params: &[Memory], arena: &mut Memory) -> Result<(), RefitError> {
    let Placed { slots, offsets } = placed;
    let mut work = Vec::with_capacity(slots.len());
    let mut rest = arena.host_bytes_mut().ok_or_else(|| not_host("the slots"))?;
    let mut at = 0;
    for (slot, &offset) in slots.iter().zip(offsets) {
        let from = params[slot.source].host_bytes().ok_or_else(|| not_host(&slot.name))?;
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
