//! Interpreters of plans and programs over plain buffers. They check what a buffer cannot show: that every byte of a
//! target is written exactly once, and that nothing is read outside a source parameter.

use std::collections::BTreeMap;

use refit::planner::{Destination, Fill, Plan, Program, Transform};

use crate::floats;
use crate::oracle::{Buffers, POISON};

/// The buffers of every source rank.
pub type Sources = BTreeMap<u32, Buffers>;

/// Executes a plan as it stands: segments and fills straight into the targets.
#[must_use]
pub fn plan(plan: &Plan, sources: &Sources) -> Buffers {
    let mut targets =
        Targets::new(plan.targets().iter().map(|target| (target.name.to_string(), target.bytes)));
    for segment in plan.segments() {
        let source = &plan.sources()[segment.source as usize];
        let bytes = &sources[&source.rank][source.name.as_ref()];
        for (from, into) in segment.dims.offsets() {
            let run = slice(bytes, segment.source_offset + from, segment.run);
            targets.write(
                segment.target,
                segment.target_offset + into,
                &transformed(segment.transform, run),
            );
        }
    }
    targets.fill(plan.fills());
    targets.finish()
}

/// Executes a program as a transport and a landing would: wave after wave of reads and landing copies, then fills.
///
/// Before each wave staging is poisoned, for nothing may land what another wave has brought; and no wave may stage where
/// one of the `slots - 1` before it did, for those may be landing still.
#[must_use]
pub fn program(program: &Program, sources: &Sources) -> Buffers {
    let mut targets = Targets::new(
        program.targets().iter().map(|target| (target.name.to_string(), target.bytes)),
    );
    let staging_bytes = usize::try_from(program.staging_bytes()).unwrap();
    let mut wire = 0;
    let mut earlier: Vec<Vec<bool>> = Vec::new();
    let last = program.waves().len() - 1;
    for (number, wave) in program.waves().enumerate() {
        let mut staging = vec![POISON; staging_bytes];
        let mut staged = vec![false; staging.len()];
        for read in wave.reads {
            let source = &program.sources()[read.source as usize];
            let bytes = &sources[&source.rank][source.name.as_ref()];
            for (from, into) in read.dims.offsets() {
                let run = slice(bytes, read.offset + from, read.run);
                wire += read.run;
                match read.destination {
                    Destination::Live { target, offset } => {
                        assert_eq!(number, last, "only the last wave writes live parameters");
                        assert!(wave.landings.is_empty(), "it lands nothing");
                        targets.write(target, offset + into, &transformed(read.transform, run));
                    }
                    Destination::Staging { offset } => {
                        assert_eq!(read.transform, Transform::Copy, "landing transforms");
                        let at = usize::try_from(offset + into).unwrap();
                        staging[at..at + run.len()].copy_from_slice(run);
                        for seen in &mut staged[at..at + run.len()] {
                            assert!(
                                !std::mem::replace(seen, true),
                                "two reads of a wave write the same staging byte"
                            );
                        }
                    }
                    other => panic!("unknown destination {other:?}"),
                }
            }
            wire += read.gap;
            if let (Destination::Staging { offset }, gap @ 1..) = (read.destination, read.gap) {
                // What lies in the gap is anything, and nobody else's.
                let at = usize::try_from(offset + read.run).unwrap();
                for seen in &mut staged[at..at + usize::try_from(gap).unwrap()] {
                    assert!(!std::mem::replace(seen, true), "a gap is written by two reads");
                }
            }
        }
        for landing in wave.landings {
            for (from, into) in landing.dims.offsets() {
                let from = landing.staging_offset + from;
                let at = usize::try_from(from).unwrap();
                let run = slice(&staging, from, landing.run);
                let arrived = staged[at..at + run.len()].iter().all(|&staged| staged);
                assert!(arrived, "a landing copies bytes that its wave has not brought");
                targets.write(
                    landing.target,
                    landing.offset + into,
                    &transformed(landing.transform, run),
                );
            }
        }
        let mut busy = earlier
            .iter()
            .rev()
            .take(program.slots() - 1)
            .flat_map(|wave| wave.iter().zip(&staged));
        assert!(
            !busy.any(|(&before, &now)| before && now),
            "a wave stages where one before it may be landing"
        );
        earlier.push(staged);
    }
    assert_eq!(wire, program.wire_bytes(), "the program miscounts its wire bytes");
    targets.fill(program.fills());
    targets.finish()
}

struct Targets {
    names: Vec<String>,
    bytes: Vec<Vec<u8>>,
    written: Vec<Vec<bool>>,
}

impl Targets {
    fn new(params: impl Iterator<Item = (String, u64)>) -> Self {
        let (names, bytes): (Vec<_>, Vec<_>) = params
            .map(|(name, bytes)| (name, vec![POISON; usize::try_from(bytes).unwrap()]))
            .unzip();
        let written = bytes.iter().map(|bytes| vec![false; bytes.len()]).collect();
        Self { names, bytes, written }
    }

    fn write(&mut self, target: u32, offset: u64, run: &[u8]) {
        let (target, at) = (target as usize, usize::try_from(offset).unwrap());
        self.bytes[target][at..at + run.len()].copy_from_slice(run);
        for (place, seen) in self.written[target][at..at + run.len()].iter_mut().enumerate() {
            assert!(
                !std::mem::replace(seen, true),
                "byte {} of {} is written twice",
                at + place,
                self.names[target]
            );
        }
    }

    fn fill(&mut self, fills: &[Fill]) {
        for fill in fills {
            let zeros = vec![0; usize::try_from(fill.run).unwrap()];
            for (_, into) in fill.dims.offsets() {
                self.write(fill.target, fill.offset + into, &zeros);
            }
        }
    }

    fn finish(self) -> Buffers {
        for (name, written) in self.names.iter().zip(&self.written) {
            let missing = written.iter().position(|seen| !seen);
            assert_eq!(missing, None, "a byte of {name} is never written");
        }
        self.names.into_iter().zip(self.bytes).collect()
    }
}

fn slice(bytes: &[u8], offset: u64, len: u64) -> &[u8] {
    let at = usize::try_from(offset).unwrap();
    &bytes[at..at + usize::try_from(len).unwrap()]
}

/// The independent, one-element-at-a-time version of a transform.
#[must_use]
pub fn transformed(transform: Transform, run: &[u8]) -> Vec<u8> {
    let size = match transform {
        Transform::Copy => return run.to_vec(),
        Transform::Cast { from, .. } | Transform::Map { from, .. } => from.size(),
        other => panic!("no reference for {other:?}"),
    };
    let elements = run.chunks_exact(usize::try_from(size).unwrap());
    elements.flat_map(|element| floats::transformed(transform, element)).collect()
}
