//! Runs a program with the host's own landing copies and fills, the reads being plain copies.

use refit::planner::{Destination, Program};
use refit_translate::host;

use crate::execute::{Sources, transformed};
use crate::oracle::{Buffers, POISON};

/// Executes a program; bytes that it does not write stay [`POISON`].
#[must_use]
pub fn program(program: &Program, sources: &Sources) -> Buffers {
    let poisoned = |bytes: u64| vec![POISON; usize::try_from(bytes).unwrap()];
    let mut staging = poisoned(program.staging_bytes());
    let mut params: Vec<Vec<u8>> =
        program.targets().iter().map(|target| poisoned(target.bytes)).collect();
    for wave in program.waves() {
        for read in wave.reads {
            let source = &program.sources()[read.source as usize];
            let bytes = &sources[&source.rank][source.name.as_ref()];
            let (into, base) = match read.destination {
                Destination::Live { target, offset } => (&mut params[target as usize], offset),
                Destination::Staging { offset } => (&mut staging, offset),
                other => panic!("unknown destination {other:?}"),
            };
            let run = usize::try_from(read.run).unwrap();
            for (from, to) in read.dims.offsets() {
                let from = usize::try_from(read.offset + from).unwrap();
                let to = usize::try_from(base + to).unwrap();
                let arrived = transformed(read.transform, &bytes[from..from + run]);
                into[to..to + arrived.len()].copy_from_slice(&arrived);
            }
        }
        for landing in wave.landings {
            host::land(landing, &staging, &mut params[landing.target as usize]).unwrap();
        }
    }
    for fill in program.fills() {
        host::fill(fill, &mut params[fill.target as usize]).unwrap();
    }
    program.targets().iter().map(|target| target.name.to_string()).zip(params).collect()
}
