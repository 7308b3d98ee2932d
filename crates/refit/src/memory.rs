//! Pairing a layout's parameters with the memory that holds them.

use std::collections::BTreeMap;

use refit_planner::RankLayout;
use refit_pool::{Allocator, ArenaPlan, Memory};

use crate::error::RefitError;
use crate::land::DeviceLander;

/// How bytes of small things get to and from memory of any kind: by the processor, or by the driver of its device.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    /// The device, where it had to be looked up: it keeps what it copies with.
    #[cfg(feature = "cuda")]
    device: std::sync::OnceLock<refit_pool::cuda::Device>,
}

impl Reach {
    /// Copies bytes to the start of memory, and waits for that. `name` is what errors call it.
    pub(crate) fn write(
        &self,
        memory: &mut Memory,
        bytes: &[u8],
        lander: Option<&DeviceLander>,
        name: &str,
    ) -> Result<(), RefitError> {
        #[cfg(feature = "cuda")]
        if let refit_pool::MemoryKind::Cuda(ordinal) = memory.kind() {
            let device = self.device(lander, ordinal)?;
            return refit_pool::cuda::upload(device, memory, 0, bytes).map_err(RefitError::device);
        }
        let _ = lander;
        let into = memory.host_bytes_mut().and_then(|held| held.get_mut(..bytes.len()));
        into.ok_or_else(|| not_host(name))?.copy_from_slice(bytes);
        Ok(())
    }

    /// Copies bytes from memory, and waits for that. `name` is what errors call it.
    pub(crate) fn read(
        &self,
        memory: &Memory,
        offset: usize,
        into: &mut [u8],
        lander: Option<&DeviceLander>,
        name: &str,
    ) -> Result<(), RefitError> {
        #[cfg(feature = "cuda")]
        if let refit_pool::MemoryKind::Cuda(ordinal) = memory.kind() {
            let device = self.device(lander, ordinal)?;
            return refit_pool::cuda::download(device, memory, offset, into)
                .map_err(RefitError::device);
        }
        let _ = lander;
        let from = memory.host_bytes().and_then(|held| held.get(offset..)?.get(..into.len()));
        into.copy_from_slice(from.ok_or_else(|| not_host(name))?);
        Ok(())
    }

    /// The lander's device if that is the one, or the one that was looked up.
    #[cfg(feature = "cuda")]
    fn device<'a>(
        &'a self,
        lander: Option<&'a DeviceLander>,
        ordinal: u32,
    ) -> Result<&'a refit_pool::cuda::Device, RefitError> {
        use refit_pool::cuda::{Device, Driver};
        let known = lander.map(|lander| lander.parts().1.device()).or_else(|| self.device.get());
        if let Some(device) = known.filter(|device| device.ordinal() == ordinal) {
            return Ok(device);
        }
        let found = Driver::load().and_then(|driver| Device::primary(driver, ordinal));
        // All of a rank's memory is one device's.
        Ok(self.device.get_or_init({
            let device = found.map_err(RefitError::device)?;
            || device
        }))
    }
}

fn not_host(name: &str) -> RefitError {
    RefitError::NotHost { param: name.to_owned() }
}

/// The memory of each parameter, in the order of the layout.
pub(crate) fn in_layout_order(
    layout: &RankLayout,
    memory: impl IntoIterator<Item = (String, Memory)>,
) -> Result<Vec<Memory>, RefitError> {
    let rank = layout.rank();
    let mut by_name = BTreeMap::new();
    for (param, memory) in memory {
        if by_name.contains_key(&param) {
            return Err(RefitError::StrayMemory { rank, param });
        }
        by_name.insert(param, memory);
    }
    let mut ordered = Vec::with_capacity(layout.params().len());
    for param in layout.params() {
        let name = || param.name().to_string();
        let memory = by_name
            .remove(param.name().as_ref())
            .ok_or_else(|| RefitError::NoMemory { rank, param: name() })?;
        if memory.len() as u64 != param.bytes() {
            let (memory, layout) = (memory.len() as u64, param.bytes());
            return Err(RefitError::Size { rank, param: name(), memory, layout });
        }
        ordered.push(memory);
    }
    match by_name.into_keys().next() {
        Some(param) => Err(RefitError::StrayMemory { rank, param }),
        None => Ok(ordered),
    }
}

/// Parameters start at multiples of this, as CUDA's own allocations do.
pub(crate) const PARAM_ALIGN: u64 = 256;

/// Memory for every parameter of a layout, carved from one allocation so that one registration serves all of them.
///
/// # Errors
/// [`RefitError::Pool`] with what the allocator says.
pub fn allocate(
    layout: &RankLayout,
    allocator: &dyn Allocator,
) -> Result<Vec<(String, Memory)>, RefitError> {
    let mut arena = ArenaPlan::new();
    let parts: Vec<(u64, u64)> = layout
        .params()
        .iter()
        .map(|param| (arena.push(param.bytes(), PARAM_ALIGN), param.bytes()))
        .collect();
    let bytes = usize::try_from(arena.bytes()).unwrap_or(usize::MAX);
    let memory = allocator.allocate(bytes).map_err(refit_pool::PoolError::from)?;
    let carved = memory.carve(&parts)?;
    Ok(layout.params().iter().map(|param| param.name().to_string()).zip(carved).collect())
}
