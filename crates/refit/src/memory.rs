//! Pairing a layout's parameters with the memory that holds them.

use std::collections::BTreeMap;

use refit_planner::RankLayout;
use refit_pool::{Allocator, ArenaPlan, Memory};

use crate::error::RefitError;

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
