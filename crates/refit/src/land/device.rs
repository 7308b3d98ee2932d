//! Landing in the memory of a GPU: one table of moves for every wave, on the device since the program was lowered.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use refit_kernels::{Effect, Landing, Move, Mover};
use refit_planner::Program;
use refit_pool::cuda::Stream;
use refit_pool::{Memory, Region};

use crate::error::RefitError;

/// What lands in the memory of a GPU: its kernel, and the stream on which that runs.
#[derive(Clone, Debug)]
pub struct DeviceLander {
    mover: Arc<Mover>,
    stream: Arc<Stream>,
}

impl DeviceLander {
    /// A lander that runs on this stream. It loads the kernel, which takes a fraction of a second, once a device.
    ///
    /// # Errors
    /// [`RefitError::Device`] when the device does not take the kernel.
    pub fn new(stream: Arc<Stream>) -> Result<Self, RefitError> {
        let mover = Mover::new(stream.device()).map_err(RefitError::device)?;
        Ok(Self { mover, stream })
    }

    /// A lander of a kernel that is loaded, on this stream of its device.
    #[must_use]
    pub fn with_mover(mover: Arc<Mover>, stream: Arc<Stream>) -> Self {
        Self { mover, stream }
    }

    pub(crate) fn parts(&self) -> (&Arc<Mover>, &Arc<Stream>) {
        (&self.mover, &self.stream)
    }
}

/// The landings of a program.
pub(crate) struct Landings {
    /// One for each wave; none where it lands nothing.
    waves: Vec<Option<Landing>>,
    fills: Option<Landing>,
}

impl Landings {
    pub(super) fn new(
        program: &Program,
        lander: &DeviceLander,
        live: &[Memory],
    ) -> Result<Self, RefitError> {
        let regions: Vec<Region> = live.iter().map(Memory::region).collect();
        let place = |target: u32, offset: u64| live[target as usize].address() + offset;
        let mut lists = Vec::with_capacity(program.waves().len());
        for wave in program.waves() {
            let moves: Vec<Move> = wave
                .landings
                .iter()
                .map(|landing| Move {
                    from: landing.staging_offset,
                    into: place(landing.target, landing.offset),
                    run: landing.run,
                    dims: landing.dims.clone(),
                    effect: Effect::Transform(landing.transform),
                })
                .collect();
            lists.push(moves);
        }
        let series = |lists: &[Vec<Move>], staged| {
            let DeviceLander { mover, stream } = lander;
            let full: Vec<&Vec<Move>> = lists.iter().filter(|moves| !moves.is_empty()).collect();
            let landings = Landing::series(mover, stream, &full, staged, &regions);
            let mut landings = landings.map_err(RefitError::device)?.into_iter();
            let of = |moves: &Vec<Move>| if moves.is_empty() { None } else { landings.next() };
            Ok::<_, RefitError>(lists.iter().map(of).collect::<Vec<_>>())
        };
        let waves = series(&lists, program.staging_bytes())?;
        let fills: Vec<Move> = program
            .fills()
            .iter()
            .map(|fill| Move {
                from: 0,
                into: place(fill.target, fill.offset),
                run: fill.run,
                dims: fill.dims.clone(),
                effect: Effect::Zero,
            })
            .collect();
        let fills = series(&[fills], 0)?.pop().flatten();
        Ok(Self { waves, fills })
    }

    /// Begins to land a wave.
    pub(super) fn start(
        &mut self,
        wave: usize,
        staging: Option<&Memory>,
    ) -> Result<(), RefitError> {
        let Some(landing) = &mut self.waves[wave] else { return Ok(()) };
        let staging = staging.ok_or(RefitError::NoStaging)?;
        landing.start(Some(staging)).map_err(RefitError::device)
    }

    /// Whether what was begun of a wave has ended.
    pub(super) fn has_landed(&mut self, wave: usize) -> Result<bool, RefitError> {
        let landing = self.waves[wave].as_mut();
        landing.map_or(Ok(true), |landing| landing.poll().map_err(RefitError::device))
    }

    /// Waits until these waves have landed.
    pub(super) fn wait(&mut self, waves: Range<usize>) -> Result<(), RefitError> {
        for landing in self.waves[waves].iter_mut().flatten() {
            landing.wait().map_err(RefitError::device)?;
        }
        Ok(())
    }

    /// Writes the fills, and waits for everything.
    pub(super) fn fill(&mut self) -> Result<(), RefitError> {
        if let Some(fills) = &mut self.fills {
            fills.start(None).map_err(RefitError::device)?;
        }
        self.wait(0..self.waves.len())?;
        self.fills.iter_mut().try_for_each(|fills| fills.wait().map_err(RefitError::device))
    }
}

impl fmt::Debug for Landings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Landings").field("waves", &self.waves.len()).finish_non_exhaustive()
    }
}
