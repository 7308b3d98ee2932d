//! Landing in host memory: a wave's copies, and fills.

use refit_planner::{Fill, Landing, TargetParam, Transform};
use refit_pool::{Memory, copy_runs};
use refit_translate::host::{self, LandError};

use super::threads;
use crate::error::RefitError;

/// What one parameter gets.
struct Work<'a> {
    name: &'a str,
    landings: &'a [Landing],
    memory: &'a mut Memory,
    bytes: u64,
}

/// Carries out the landing copies of a wave. `live` is in the order of `targets`.
pub(super) fn land(
    landings: &[Landing],
    staging: &[u8],
    targets: &[TargetParam],
    live: &mut [Memory],
) -> Result<(), RefitError> {
    let mut work = work(landings, targets, live)?;
    threads::share(&mut work, |work| work.bytes, |work| carry_out(work, staging))
}

/// Writes the zeros. `live` is in the order of `targets`.
pub(super) fn fill(
    fills: &[Fill],
    targets: &[TargetParam],
    live: &mut [Memory],
) -> Result<(), RefitError> {
    for fill in fills {
        let target = fill.target as usize;
        host::fill(fill, host_bytes(&mut live[target], &targets[target].name)?)?;
    }
    Ok(())
}

fn work<'a>(
    landings: &'a [Landing],
    targets: &'a [TargetParam],
    live: &'a mut [Memory],
) -> Result<Vec<Work<'a>>, RefitError> {
    let mut work = Vec::new();
    let mut rest = live.iter_mut().enumerate();
    for landings in landings.chunk_by(|a, b| a.target == b.target) {
        let target = landings[0].target as usize;
        let (_, memory) =
            rest.find(|(index, _)| *index == target).ok_or(RefitError::Unsupported {
                what: "a program whose landing copies are not in the order of its targets",
            })?;
        let landed = landings.iter().map(|landing| landing.run.saturating_mul(landing.dims.runs()));
        let (name, bytes) = (&targets[target].name, landed.sum());
        work.push(Work { name, landings, memory, bytes });
    }
    Ok(work)
}

fn carry_out(work: &mut [Work<'_>], staging: &[u8]) -> Result<(), RefitError> {
    for Work { name, landings, memory, .. } in work {
        let param = host_bytes(memory, name)?;
        for landing in *landings {
            match landing.transform {
                Transform::Copy => copy(landing, staging, param)?,
                _ => host::land(landing, staging, param)?,
            }
        }
    }
    Ok(())
}

/// A landing copy that converts nothing, past the caches: the engine reads its parameters later, and all of them.
pub(crate) fn copy(landing: &Landing, staging: &[u8], param: &mut [u8]) -> Result<(), LandError> {
    let (staged, held) = (staging.len() as u64, param.len() as u64);
    // A run of more bytes than there are addresses is outside of either, and refused before it is copied.
    let run = usize::try_from(landing.run).unwrap_or(usize::MAX);
    copy_runs(staging, param, run, |copy| host::each_run(landing, staged, held, copy))
}

fn host_bytes<'m>(memory: &'m mut Memory, param: &str) -> Result<&'m mut [u8], RefitError> {
    memory.host_bytes_mut().ok_or_else(|| RefitError::NotHost { param: param.to_owned() })
}
