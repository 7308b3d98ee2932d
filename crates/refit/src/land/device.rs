//! Landing in the memory of a GPU: one table of moves for every wave, on the device from the first refit of a program on.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use refit_kernels::{Effect, Landing, Move, Mover, Pace};
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

/// The landings of a program. They are brought to the device when they are first needed, or before that by
/// [`make_ready`](Self::make_ready): while the first reads are under way there is time for it.
pub(crate) struct Landings {
    lander: DeviceLander,
    /// The live parameters.
    regions: Vec<Region>,
    ready: Option<Ready>,
}

/// What is on the device.
struct Ready {
    /// One for each wave; none where it lands nothing.
    waves: Vec<Option<Landing>>,
    fills: Option<Landing>,
}

impl Landings {
    pub(super) fn new(lander: &DeviceLander, live: &[Memory]) -> Self {
        let regions = live.iter().map(Memory::region).collect();
        Self { lander: lander.clone(), regions, ready: None }
    }

    /// Brings everything to the device that is not there yet.
    pub(super) fn make_ready(&mut self, program: &Program) -> Result<(), RefitError> {
        self.ready(program).map(drop)
    }

    fn ready(&mut self, program: &Program) -> Result<&mut Ready, RefitError> {
        let ready = match self.ready.take() {
            Some(ready) => ready,
            None => Ready::new(program, &self.lander, &self.regions)?,
        };
        Ok(self.ready.insert(ready))
    }

    /// Begins to land a wave.
    pub(super) fn start(
        &mut self,
        program: &Program,
        wave: usize,
        pace: Pace,
        staging: Option<&Memory>,
    ) -> Result<(), RefitError> {
        let Some(landing) = &mut self.ready(program)?.waves[wave] else { return Ok(()) };
        let staging = staging.ok_or(RefitError::NoStaging)?;
        landing.start_at(pace, Some(staging)).map_err(RefitError::device)
    }

    /// Whether what was begun of a wave has ended.
    pub(super) fn has_landed(&mut self, wave: usize) -> Result<bool, RefitError> {
        let landing = self.ready.as_mut().and_then(|ready| ready.waves[wave].as_mut());
        landing.map_or(Ok(true), |landing| landing.poll().map_err(RefitError::device))
    }

    /// Waits until these waves have landed, as far as they were begun.
    pub(super) fn wait(&mut self, waves: Range<usize>) -> Result<(), RefitError> {
        let Some(ready) = &mut self.ready else { return Ok(()) };
        for landing in ready.waves[waves].iter_mut().flatten() {
            landing.wait().map_err(RefitError::device)?;
        }
        Ok(())
    }

    /// Writes the fills, and waits for everything.
    pub(super) fn fill(&mut self, program: &Program) -> Result<(), RefitError> {
        let Ready { waves, fills } = self.ready(program)?;
        if let Some(fills) = fills {
            fills.start(None).map_err(RefitError::device)?;
        }
        for landing in waves.iter_mut().chain([fills]).flatten() {
            landing.wait().map_err(RefitError::device)?;
        }
        Ok(())
    }
}

impl Ready {
    fn new(
        program: &Program,
        lander: &DeviceLander,
        regions: &[Region],
    ) -> Result<Self, RefitError> {
        let place = |target: u32, offset: u64| regions[target as usize].address() + offset;
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
            let landings = Landing::series(mover, stream, &full, staged, regions);
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
}

impl fmt::Debug for Landings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Landings").field("ready", &self.ready.is_some()).finish_non_exhaustive()
    }
}
