//! Landing: a wave's copies from staging to their place in the live parameters, and fills. By the processor where it can
//! reach them, by a device's kernel where not.

#[cfg(feature = "cuda")]
mod device;
pub(crate) mod host;
pub(crate) mod threads;

use std::ops::Range;

use refit_planner::Program;
use refit_pool::{Memory, MemoryKind};

use crate::error::RefitError;

#[cfg(feature = "cuda")]
use refit_kernels::Pace;

#[cfg(feature = "cuda")]
pub use self::device::DeviceLander;

/// A build without devices has none that could land.
#[cfg(not(feature = "cuda"))]
#[derive(Clone, Copy, Debug)]
pub(crate) enum DeviceLander {}

/// How the waves of a program are landed.
#[derive(Debug)]
pub(crate) enum Landings {
    /// By the processor, while it is asked to.
    Host,
    /// By a kernel, which is started and goes on.
    #[cfg(feature = "cuda")]
    Device(Box<device::Landings>),
}

impl Landings {
    /// What lands this program in these parameters.
    pub(crate) fn new(
        program: &Program,
        device: Option<&DeviceLander>,
        live: &[Memory],
    ) -> Result<Self, RefitError> {
        match device {
            #[cfg(feature = "cuda")]
            Some(lander) if live.iter().any(|memory| memory.kind() != MemoryKind::Host) => {
                Ok(Self::Device(Box::new(device::Landings::new(lander, live))))
            }
            _ => {
                // Better now than after the bytes have moved.
                let landed = program.landings().iter().map(|landing| landing.target);
                let mut landed = landed.chain(program.fills().iter().map(|fill| fill.target));
                let far = landed.find(|&target| live[target as usize].kind() != MemoryKind::Host);
                match far {
                    None => Ok(Self::Host),
                    Some(target) => {
                        let param = program.targets()[target as usize].name.to_string();
                        Err(RefitError::NotHost { param })
                    }
                }
            }
        }
    }

    /// Prepares what takes a while, at a time when reads are under way.
    pub(crate) fn make_ready(&mut self, program: &Program) -> Result<(), RefitError> {
        match self {
            Self::Host => {
                let _ = program;
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Self::Device(landings) => landings.make_ready(program),
        }
    }

    /// Lands what a wave has staged, or begins to.
    pub(crate) fn land(
        &mut self,
        program: &Program,
        wave: usize,
        staging: Option<&Memory>,
        live: &mut [Memory],
    ) -> Result<(), RefitError> {
        match self {
            Self::Host => {
                let staging = staging.map_or(Some(&[][..]), Memory::host_bytes);
                let staging =
                    staging.ok_or_else(|| RefitError::NotHost { param: "staging".to_owned() })?;
                host::land(program.wave(wave).landings, staging, program.targets(), live)
            }
            #[cfg(feature = "cuda")]
            Self::Device(landings) => {
                // Of the last wave all has arrived, and none comes behind it.
                let last = wave + 1 == program.waves().len();
                let pace = if last { Pace::Alone } else { Pace::BesideCopies };
                landings.start(program, wave, pace, staging)
            }
        }
    }

    /// Whether landing goes on while reads do.
    pub(crate) fn are_beside_reads(&self) -> bool {
        !matches!(self, Self::Host)
    }

    /// Whether what was begun of a wave has ended.
    pub(crate) fn has_landed(&mut self, wave: usize) -> Result<bool, RefitError> {
        match self {
            Self::Host => {
                let _ = wave;
                Ok(true)
            }
            #[cfg(feature = "cuda")]
            Self::Device(landings) => landings.has_landed(wave),
        }
    }

    /// Waits until these waves have landed.
    pub(crate) fn wait(&mut self, waves: Range<usize>) -> Result<(), RefitError> {
        match self {
            // The processor landed them when it was asked to.
            Self::Host => debug_assert!(waves.start <= waves.end),
            #[cfg(feature = "cuda")]
            Self::Device(landings) => landings.wait(waves)?,
        }
        Ok(())
    }

    /// Writes the fills, and waits for them and for every wave.
    pub(crate) fn fill(
        &mut self,
        program: &Program,
        live: &mut [Memory],
    ) -> Result<(), RefitError> {
        match self {
            Self::Host => host::fill(program.fills(), program.targets(), live),
            #[cfg(feature = "cuda")]
            Self::Device(landings) => landings.fill(program),
        }
    }
}
