//! What a target has landed, compared with what its sources say of it.

use refit_planner::{Plan, Transform};
use refit_pool::Memory;

use super::hash::of_zeros;
use super::request::order;
use super::{DigestRequest, Digests, Held, Work, hash_all};
use crate::error::RefitError;
use crate::header::Stamp;
use crate::land::DeviceLander;
use crate::memory::Reach;

/// What is known of a source rank whose bytes have landed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Landed {
    pub(crate) rank: u32,
    pub(crate) incarnation: u128,
    pub(crate) stamp: Option<Stamp>,
}

/// Compares everything that a plan writes: segments with the answers, and zeros with what is there.
pub(crate) fn verify(
    plan: &Plan,
    landed: &[Landed],
    answers: &[Digests],
    live: &[Memory],
    device: Option<&DeviceLander>,
    reach: &Reach,
) -> Result<(), RefitError> {
    let request = DigestRequest::new(plan);
    let mut wanted = Vec::with_capacity(plan.segments().len());
    for (rank, asked) in request.ranks() {
        let answer = answers.iter().find(|answer| answer.rank == rank);
        let answer = answer.ok_or(RefitError::NoDigests { rank })?;
        let known = landed.iter().find(|landed| landed.rank == rank);
        if let Some(Landed { incarnation, stamp: expected, .. }) = known {
            if *incarnation != answer.incarnation {
                let (expected, found) = ((*incarnation).into(), answer.incarnation.into());
                return Err(RefitError::StaleIncarnation { rank, expected, found });
            }
            if *expected != Some(answer.stamp) {
                return Err(RefitError::Torn { rank, expected: *expected, found: answer.stamp });
            }
        }
        if answer.request != *request.digest() || answer.values.len() != asked {
            return Err(RefitError::OtherDigests { rank });
        }
        wanted.extend_from_slice(&answer.values);
    }

    let order = order(plan);
    let held = |target: u32| {
        let (memory, target) = (&live[target as usize], &plan.targets()[target as usize]);
        Held { memory, offset: 0, bytes: target.bytes, name: &target.name }
    };
    let mut work: Vec<Work<'_>> = order
        .iter()
        .map(|&(_, index)| {
            let segment = &plan.segments()[index];
            Work {
                held: held(segment.target),
                offset: segment.target_offset,
                run: segment.target_run(),
                dims: &segment.dims,
                stride: |dim| dim.target_stride,
                transform: Transform::Copy,
                value: 0,
            }
        })
        .collect();
    hash_all(&mut work, device, reach)?;
    for ((&(source, _), work), wanted) in order.iter().zip(&work).zip(wanted) {
        if work.value != wanted {
            let rank = Some(plan.sources()[source as usize].rank);
            return Err(corrupt(rank, work));
        }
    }
    zeros(plan, held, device, reach)
}

/// Checks that fills are zero: by the hash of as many zeros, so that every memory is read in one way.
fn zeros<'a>(
    plan: &'a Plan,
    held: impl Fn(u32) -> Held<'a>,
    device: Option<&DeviceLander>,
    reach: &Reach,
) -> Result<(), RefitError> {
    let mut work: Vec<Work<'_>> = Vec::with_capacity(plan.fills().len());
    for fill in plan.fills() {
        work.push(Work {
            held: held(fill.target),
            offset: fill.offset,
            run: fill.run,
            dims: &fill.dims,
            stride: |dim| dim.target_stride,
            transform: Transform::Copy,
            value: 0,
        });
    }
    hash_all(&mut work, device, reach)?;
    let mut known: Option<(u64, u64)> = None;
    for work in &work {
        let bytes = work.run.saturating_mul(work.dims.runs());
        let zero = match known {
            Some((len, hash)) if len == bytes => hash,
            _ => of_zeros(bytes),
        };
        known = Some((bytes, zero));
        if work.value != zero {
            return Err(corrupt(None, work));
        }
    }
    Ok(())
}

/// Names what differs, by the bytes from the first to the last of the pattern.
fn corrupt(rank: Option<u32>, work: &Work<'_>) -> RefitError {
    let extent = work.dims.target_extent(work.run);
    let (param, start) = (work.held.name.to_owned(), work.offset);
    RefitError::Corrupt { rank, param, start, end: start.saturating_add(extent) }
}
