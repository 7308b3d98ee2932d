//! Where offsets become addresses: a program, the publications of the sources and the target's own memory in; reads
//! per peer out. Nothing before this step knows an address, so a restarted source costs one binding and no plan.

use std::collections::BTreeMap;

use refit_planner::{Destination, Dims, Program};
use refit_pool::{Memory, MemoryKind, Region};
use refit_transport::{LocalRange, ReadOp, RemoteRange};

use crate::error::RefitError;
use crate::publication::{Publication, PublishedRegion};

/// A program's reads, by source rank, ready to be prepared.
pub(crate) type Batches = BTreeMap<u32, Vec<ReadOp>>;

/// Registered ranges on one side, to keep every read inside one of them.
struct Pieces(Vec<(MemoryKind, u64, u64)>);

impl Pieces {
    fn new(pieces: impl Iterator<Item = (MemoryKind, u64, u64)>) -> Self {
        let mut pieces: Vec<_> = pieces.collect();
        pieces.sort_unstable();
        Self(pieces)
    }

    /// Bytes from `address` to the end of the piece it lies in.
    fn left(&self, kind: MemoryKind, address: u64) -> Option<u64> {
        let after = self.0.partition_point(|&(k, start, _)| (k, start) <= (kind, address));
        let &(k, start, len) = self.0.get(after.checked_sub(1)?)?;
        (k == kind).then(|| (start + len).checked_sub(address)).flatten().filter(|&left| left > 0)
    }
}

/// Binds every read of `program`. `live` is in the order of the program's targets; `registered` are the local pieces.
///
/// Reads that continue each other on both sides become one, and reads that cross the border of a registration are
/// cut there.
pub(crate) fn bind(
    program: &Program,
    publications: &[Publication],
    live: &[Memory],
    staging: Option<&Region>,
    registered: &[Region],
) -> Result<Batches, RefitError> {
    let local = Pieces::new(
        registered.iter().map(|region| (region.kind(), region.address(), region.len())),
    );
    let mut batches = Batches::new();
    for of_source in program.reads().chunk_by(|a, b| a.source == b.source) {
        let source = &program.sources()[of_source[0].source as usize];
        let publication = publications
            .iter()
            .find(|publication| publication.rank() == source.rank)
            .ok_or(RefitError::MissingPublication { rank: source.rank })?;
        let unknown =
            || RefitError::UnknownSourceParam { rank: source.rank, param: source.name.to_string() };
        let place = publication.place(&source.name).ok_or_else(unknown)?;
        let reads = batches.entry(source.rank).or_default();
        for read in of_source {
            let (address, kind) = match read.destination {
                Destination::Live { target, offset } => {
                    let memory = &live[target as usize];
                    (memory.address() + offset, memory.kind())
                }
                Destination::Staging { offset } => {
                    let arena = staging.ok_or(RefitError::NoStaging)?;
                    (arena.address() + offset, arena.kind())
                }
                _ => {
                    return Err(RefitError::Unsupported {
                        what: "a read destination that this release does not know",
                    });
                }
            };
            reads.push(ReadOp {
                from: RemoteRange {
                    address: place.address + read.offset,
                    len: read.dims.source_extent(read.run),
                    kind: place.kind(),
                },
                into: LocalRange { address, len: read.dims.target_extent(read.run), kind },
                run: read.run,
                dims: read.dims.clone(),
            });
        }
    }
    for (rank, reads) in &mut batches {
        let publication = publications.iter().find(|publication| publication.rank() == *rank);
        let regions = publication.map_or(&[][..], Publication::regions);
        let remote =
            Pieces::new(regions.iter().map(|region| (kind(region), region.address, region.len)));
        join(reads);
        *reads = cut(std::mem::take(reads), &local, &remote)?;
    }
    Ok(batches)
}

fn kind(region: &PublishedRegion) -> MemoryKind {
    region.cuda.map_or(MemoryKind::Host, MemoryKind::Cuda)
}

/// Unites reads that continue each other on both sides.
fn join(reads: &mut Vec<ReadOp>) {
    reads.sort_by_key(|read| (read.into.kind, read.into.address));
    reads.dedup_by(|next, last| {
        let continues = last.dims.is_none()
            && next.dims.is_none()
            && last.from.kind == next.from.kind
            && last.into.kind == next.into.kind
            && last.from.address + last.from.len == next.from.address
            && last.into.address + last.into.len == next.into.address;
        if continues {
            last.run += next.run;
            last.from.len += next.run;
            last.into.len += next.run;
        }
        continues
    });
}

/// Cuts reads at the borders of registrations. A strided read that crosses one becomes its runs first.
fn cut(reads: Vec<ReadOp>, local: &Pieces, remote: &Pieces) -> Result<Vec<ReadOp>, RefitError> {
    let mut whole = Vec::with_capacity(reads.len());
    for read in reads {
        let (near, far) = room(&read, local, remote)?;
        if read.into.len <= near && read.from.len <= far {
            whole.push(read);
            continue;
        }
        for (from, into) in read.dims.offsets() {
            let mut done = 0;
            while done < read.run {
                let mut part = ReadOp {
                    from: RemoteRange { address: read.from.address + from + done, ..read.from },
                    into: LocalRange { address: read.into.address + into + done, ..read.into },
                    run: 0,
                    dims: Dims::none(),
                };
                let (near, far) = room(&part, local, remote)?;
                part.run = (read.run - done).min(near).min(far);
                (part.from.len, part.into.len) = (part.run, part.run);
                done += part.run;
                whole.push(part);
            }
        }
    }
    Ok(whole)
}

fn room(read: &ReadOp, local: &Pieces, remote: &Pieces) -> Result<(u64, u64), RefitError> {
    let near = local
        .left(read.into.kind, read.into.address)
        .ok_or(RefitError::NotRegistered { side: "target" })?;
    let far = remote
        .left(read.from.kind, read.from.address)
        .ok_or(RefitError::NotRegistered { side: "source" })?;
    Ok((near, far))
}
