//! Filling slots in the memory of a GPU: a table of moves for every parameter, on the device since slots were allocated.

use std::fmt;

use refit_kernels::{Effect, Landing, Move};
use refit_planner::{PackSlot, Transform};
use refit_pool::Memory;

use super::Placed;
use crate::error::RefitError;
use crate::land::DeviceLander;

/// The copies into all slots.
pub(in crate::source) struct Copies(Vec<OfParam>);

/// The copies out of one parameter.
struct OfParam {
    /// Its index in the layout that was packed.
    param: usize,
    landing: Landing,
}

impl Copies {
    pub(super) fn new(
        Placed { slots, offsets }: Placed<'_>,
        params: &[Memory],
        arena: &Memory,
        lander: &DeviceLander,
    ) -> Result<Self, RefitError> {
        let (mover, stream) = lander.parts();
        let regions = [arena.allocation().clone()];
        let mut placed: Vec<(&PackSlot, u64)> = slots.iter().zip(offsets.iter().copied()).collect();
        placed.sort_by_key(|(slot, _)| slot.source);
        let mut copies = Vec::new();
        for of_param in placed.chunk_by(|(a, _), (b, _)| a.source == b.source) {
            let moves: Vec<Move> = of_param
                .iter()
                .map(|(slot, offset)| Move {
                    from: slot.source_offset,
                    into: arena.address() + offset,
                    run: slot.run,
                    dims: slot.dims.clone(),
                    effect: Effect::Transform(Transform::Copy),
                })
                .collect();
            let param = of_param[0].0.source;
            let held = params[param].len() as u64;
            let landing = Landing::new(mover, stream, &moves, held, &regions);
            copies.push(OfParam { param, landing: landing.map_err(RefitError::device)? });
        }
        Ok(Self(copies))
    }

    /// Queues all of them behind what the stream has, and waits.
    pub(super) fn run(&mut self, params: &[Memory]) -> Result<(), RefitError> {
        for OfParam { param, landing } in &mut self.0 {
            landing.start(Some(&params[*param])).map_err(RefitError::device)?;
        }
        self.0.iter_mut().try_for_each(|copy| copy.landing.wait().map_err(RefitError::device))
    }
}

impl fmt::Debug for Copies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Copies").field("params", &self.0.len()).finish_non_exhaustive()
    }
}
