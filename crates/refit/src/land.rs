//! Landing in host memory: every parameter's copies and fills, parameters shared out among threads.

use std::num::NonZero;
use std::thread;

use refit_planner::{Fill, Landing, Program};
use refit_pool::Memory;
use refit_translate::host;

use crate::error::RefitError;

/// Below this many bytes a thread costs more than it saves.
const BYTES_WORTH_A_THREAD: u64 = 8 << 20;

/// A single core does not fill the memory bus; a few do, and the engine has work for the rest.
const MOST_THREADS: usize = 4;

/// What one parameter gets.
struct Work<'a> {
    name: &'a str,
    landings: &'a [Landing],
    fills: &'a [Fill],
    memory: &'a mut Memory,
    bytes: u64,
}

/// Carries out all landing copies and fills of `program`. `live` is in the order of its targets.
pub(crate) fn land(
    program: &Program,
    staging: &[u8],
    live: &mut [Memory],
) -> Result<(), RefitError> {
    let mut work = work(program, live)?;
    let total: u64 = work.iter().map(|work| work.bytes).sum();
    let threads = usize::try_from(total / BYTES_WORTH_A_THREAD)
        .unwrap_or(MOST_THREADS)
        .min(MOST_THREADS)
        .min(thread::available_parallelism().map_or(1, NonZero::get));
    if threads < 2 {
        return carry_out(&mut work, staging);
    }
    let share = total / threads as u64 + 1;
    thread::scope(|scope| {
        let mut rest = work.as_mut_slice();
        let mut running = Vec::with_capacity(threads);
        while !rest.is_empty() {
            let mut bytes = 0;
            let until = rest.iter().position(|work| {
                bytes += work.bytes;
                bytes >= share
            });
            let (part, after) = rest.split_at_mut(until.map_or(rest.len(), |last| last + 1));
            rest = after;
            running.push(scope.spawn(|| carry_out(part, staging)));
        }
        // Every thread is joined, whatever the others did; a panic in one goes on here.
        let results: Vec<_> = running
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect();
        results.into_iter().collect()
    })
}

fn work<'a>(program: &'a Program, live: &'a mut [Memory]) -> Result<Vec<Work<'a>>, RefitError> {
    let (mut landings, mut fills) = (program.landings(), program.fills());
    let mut work = Vec::new();
    for (target, memory) in live.iter_mut().enumerate() {
        let of_this = |other: u32| other as usize == target;
        let (mine, rest) = landings
            .split_at(landings.iter().take_while(|landing| of_this(landing.target)).count());
        landings = rest;
        let (filled, rest) =
            fills.split_at(fills.iter().take_while(|fill| of_this(fill.target)).count());
        fills = rest;
        if mine.is_empty() && filled.is_empty() {
            continue;
        }
        let landed = mine.iter().map(|landing| landing.run.saturating_mul(landing.dims.runs()));
        let bytes = landed.chain(filled.iter().map(Fill::bytes)).sum();
        let name = &program.targets()[target].name;
        work.push(Work { name, landings: mine, fills: filled, memory, bytes });
    }
    if landings.is_empty() && fills.is_empty() {
        return Ok(work);
    }
    Err(RefitError::Unsupported {
        what: "a program whose landing copies are not in the order of its targets",
    })
}

fn carry_out(work: &mut [Work<'_>], staging: &[u8]) -> Result<(), RefitError> {
    for Work { name, landings, fills, memory, .. } in work {
        let param = memory
            .host_bytes_mut()
            .ok_or_else(|| RefitError::NotHost { param: (*name).to_owned() })?;
        for landing in *landings {
            host::land(landing, staging, param)?;
        }
        for fill in *fills {
            host::fill(fill, param)?;
        }
    }
    Ok(())
}
