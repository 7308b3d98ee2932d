//! Where offsets become addresses: a program, the publications of the sources and the target's own memory in; reads
//! per peer out. Nothing before this step knows an address, so a restarted source costs one binding and no plan.
//!
//! A sum that no address space holds becomes its last address, where nothing is registered: the read is refused.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::collections::BTreeMap;
use std::sync::Arc;

use refit_planner::{Destination, Dims, Program, Read, Transform, Wave};
use refit_pool::{Memory, MemoryKind, Region};
use refit_transport::{LocalRange, ReadOp, RemoteRange};

use crate::error::RefitError;
use crate::header;
use crate::publication::{Place, Publication, PublishedRegion};

/// The reads from one source rank in one wave, ready to be prepared.
#[derive(Debug)]
pub(crate) struct Batch {
    /// The source rank.
    pub(crate) rank: u32,
    pub(crate) reads: Vec<ReadOp>,
}

/// Where each wave ends among the batches that [`bind`] makes: one for every rank that the wave reads from.
pub(crate) fn batch_ends(program: &Program) -> Arc<[usize]> {
    let rank = |read: &Read| program.sources()[read.source as usize].rank;
    let mut end = 0_usize;
    let ends = program.waves().map(|wave: Wave<'_>| {
        end = wave
            .reads
            .chunk_by(|a, b| rank(a) == rank(b))
            .fold(end, |end, _| end.saturating_add(1));
        end
    });
    ends.collect()
}

/// Which rank each batch of a program's lease reads: those that [`bind`] makes, and behind them those of
/// [`bind_headers`].
pub(crate) fn batch_ranks(program: &Program) -> Vec<u32> {
    let rank = |read: &Read| program.sources()[read.source as usize].rank;
    let mut all = Vec::new();
    for wave in program.waves() {
        all.extend(wave.reads.chunk_by(|a, b| rank(a) == rank(b)).map(|of_rank| rank(&of_rank[0])));
    }
    all.extend(ranks(program));
    all
}

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
        let left = start.saturating_add(len).checked_sub(address).filter(|&left| left > 0);
        left.filter(|_| k == kind)
    }
}

/// Binds every read of `program`, wave after wave and, in a wave, in the order of the ranks. `live` is in the order of
/// the program's targets; `registered` are the local pieces.
///
/// Reads that continue each other on both sides become one, and reads that cross the border of a registration are
/// cut there.
pub(crate) fn bind(
    program: &Program,
    publications: &[Publication],
    live: &[Memory],
    staging: Option<&Region>,
    registered: &[Region],
) -> Result<Vec<Batch>, RefitError> {
    let local = pieces(registered);
    let remote: BTreeMap<u32, Pieces> = publications
        .iter()
        .map(|publication| (publication.rank(), published_pieces(publication)))
        .collect();
    let places = places(program, publications)?;
    let rank = |read: &Read| program.sources()[read.source as usize].rank;
    let mut batches = Vec::new();
    for wave in program.waves() {
        for of_rank in wave.reads.chunk_by(|a, b| rank(a) == rank(b)) {
            let rank = rank(&of_rank[0]);
            let missing = RefitError::MissingPublication { rank };
            let remote = remote.get(&rank).ok_or(missing)?;
            let mut reads = Vec::with_capacity(of_rank.len());
            for read in of_rank {
                let place = places[read.source as usize];
                reads.push((operation(read, place, live, staging)?, read.gap));
            }
            batches.push(Batch { rank, reads: cut(rank, join(reads), &local, remote)? });
        }
    }
    Ok(batches)
}

/// Bytes of a header, as they are counted here.
const HEADER_BYTES: u64 = header::HEADER_BYTES as u64;

/// The source ranks that a program reads from, ascending.
pub(crate) fn ranks(program: &Program) -> impl Iterator<Item = u32> {
    program.sources().chunk_by(|a, b| a.rank == b.rank).map(|of_rank| of_rank[0].rank)
}

/// Where the headers begin in the arena of a program, behind what its waves stage, and where they end.
pub(crate) fn headers(program: &Program) -> (u64, u64) {
    let headers = HEADER_BYTES.saturating_mul(ranks(program).count() as u64);
    // What does not fit is refused where it would be allocated.
    let start = program.staging_bytes().checked_next_multiple_of(HEADER_BYTES).unwrap_or(u64::MAX);
    if headers == 0 { (0, program.staging_bytes()) } else { (start, start.saturating_add(headers)) }
}

/// Binds a read of the header of every rank in [`ranks`], each to its place among [`headers`].
pub(crate) fn bind_headers(
    program: &Program,
    publications: &[Publication],
    staging: Option<&Region>,
    registered: &[Region],
) -> Result<Vec<Batch>, RefitError> {
    let local = pieces(registered);
    let (mut at, _) = headers(program);
    let mut batches = Vec::new();
    for rank in ranks(program) {
        let arena = staging.ok_or(RefitError::NoStaging)?;
        let publication = publications.iter().find(|publication| publication.rank() == rank);
        let publication = publication.ok_or(RefitError::MissingPublication { rank })?;
        let place = publication.header().place;
        let read = ReadOp {
            from: RemoteRange { address: place.address, len: HEADER_BYTES, kind: place.kind() },
            into: LocalRange {
                address: arena.address().saturating_add(at),
                len: HEADER_BYTES,
                kind: arena.kind(),
            },
            run: HEADER_BYTES,
            dims: Dims::none(),
            transform: Transform::Copy,
            bulk: false,
        };
        let reads = cut(rank, vec![read], &local, &published_pieces(publication))?;
        batches.push(Batch { rank, reads });
        at = at.saturating_add(HEADER_BYTES);
    }
    Ok(batches)
}

fn pieces(registered: &[Region]) -> Pieces {
    Pieces::new(registered.iter().map(|region| (region.kind(), region.address(), region.len())))
}

fn published_pieces(publication: &Publication) -> Pieces {
    let regions = publication.regions().iter();
    Pieces::new(regions.map(|region| (kind(region), region.address, region.len)))
}

/// Where each source parameter of the program lies in its rank's memory.
fn places(program: &Program, publications: &[Publication]) -> Result<Vec<Place>, RefitError> {
    let mut places = Vec::with_capacity(program.sources().len());
    for of_rank in program.sources().chunk_by(|a, b| a.rank == b.rank) {
        let rank = of_rank[0].rank;
        let publication = publications.iter().find(|publication| publication.rank() == rank);
        let publication = publication.ok_or(RefitError::MissingPublication { rank })?;
        for source in of_rank {
            let unknown =
                || RefitError::UnknownSourceParam { rank, param: source.name.to_string() };
            places.push(publication.place(&source.name).ok_or_else(unknown)?);
        }
    }
    Ok(places)
}

fn operation(
    read: &Read,
    place: Place,
    live: &[Memory],
    staging: Option<&Region>,
) -> Result<ReadOp, RefitError> {
    let (address, kind) = match read.destination {
        Destination::Live { target, offset } => {
            let memory = &live[target as usize];
            (memory.address().saturating_add(offset), memory.kind())
        }
        Destination::Staging { offset } => {
            let arena = staging.ok_or(RefitError::NoStaging)?;
            (arena.address().saturating_add(offset), arena.kind())
        }
        _ => {
            return Err(RefitError::Unsupported {
                what: "a read destination that this release does not know",
            });
        }
    };
    Ok(ReadOp {
        from: RemoteRange {
            address: place.address.saturating_add(read.offset),
            len: read.dims.source_extent(read.run),
            kind: place.kind(),
        },
        into: LocalRange {
            address,
            len: read.dims.target_extent(read.transform.target_bytes(read.run)),
            kind,
        },
        run: read.run,
        dims: read.dims.clone(),
        transform: read.transform,
        bulk: read.bulk,
    })
}

fn kind(region: &PublishedRegion) -> MemoryKind {
    region.cuda.map_or(MemoryKind::Host, MemoryKind::Cuda)
}

/// Unites copies that continue each other on both sides, behind the gap that each may read along.
fn join(mut reads: Vec<(ReadOp, u64)>) -> Vec<ReadOp> {
    reads.sort_by_key(|(read, _)| (read.into.kind, read.into.address));
    reads.dedup_by(|(next, next_gap), (last, gap)| {
        let plain = |read: &ReadOp| read.dims.is_none() && read.transform == Transform::Copy;
        let continues = plain(last)
            && plain(next)
            && last.from.kind == next.from.kind
            && last.into.kind == next.into.kind
            && behind(last.from.address, last.from.len, *gap) == Some(next.from.address)
            && behind(last.into.address, last.into.len, *gap) == Some(next.into.address);
        if continues {
            let more = gap.saturating_add(next.run);
            last.run = last.run.saturating_add(more);
            last.from.len = last.from.len.saturating_add(more);
            last.into.len = last.into.len.saturating_add(more);
            last.bulk |= next.bulk;
            *gap = *next_gap;
        }
        continues
    });
    reads.into_iter().map(|(read, _)| read).collect()
}

/// The address behind a range and the gap that follows it.
fn behind(address: u64, len: u64, gap: u64) -> Option<u64> {
    address.checked_add(len)?.checked_add(gap)
}

/// Cuts reads from a rank at the borders of registrations. A strided read that crosses one becomes its runs first.
fn cut(
    rank: u32,
    reads: Vec<ReadOp>,
    local: &Pieces,
    remote: &Pieces,
) -> Result<Vec<ReadOp>, RefitError> {
    let mut cut = Vec::with_capacity(reads.len());
    for read in reads {
        let (near, far) = room(rank, &read, local, remote)?;
        if read.into.len <= near && read.from.len <= far {
            cut.push(read);
            continue;
        }
        // Cut between elements. `element`: its bytes on either side.
        let element = match read.transform {
            Transform::Cast { from, to } | Transform::Map { from, to, .. } => {
                (from.size(), to.size())
            }
            _ => (1, 1),
        };
        for (from, into) in read.dims.offsets() {
            let mut done = 0;
            while done < read.run {
                let start = read.transform.target_bytes(done);
                let mut part = ReadOp {
                    from: RemoteRange {
                        address: sum([read.from.address, from, done]),
                        ..read.from
                    },
                    into: LocalRange {
                        address: sum([read.into.address, into, start]),
                        ..read.into
                    },
                    dims: Dims::none(),
                    ..read
                };
                let (near, far) = room(rank, &part, local, remote)?;
                let whole = |bytes: u64, element: u64| bytes.checked_div(element).unwrap_or(0);
                let elements = whole(near, element.1).min(whole(far, element.0));
                part.run = read.run.saturating_sub(done).min(elements.saturating_mul(element.0));
                if part.run == 0 {
                    let what = "an element that lies in two registrations";
                    return Err(RefitError::Unsupported { what });
                }
                (part.from.len, part.into.len) = (part.run, part.written_run());
                done = done.saturating_add(part.run);
                cut.push(part);
            }
        }
    }
    Ok(cut)
}

fn sum(parts: [u64; 3]) -> u64 {
    parts.into_iter().fold(0, u64::saturating_add)
}

fn room(
    rank: u32,
    read: &ReadOp,
    local: &Pieces,
    remote: &Pieces,
) -> Result<(u64, u64), RefitError> {
    let outside = |side, len| RefitError::NotRegistered { rank, len, side };
    let near = local
        .left(read.into.kind, read.into.address)
        .ok_or_else(|| outside("target", read.into.len))?;
    let far = remote
        .left(read.from.kind, read.from.address)
        .ok_or_else(|| outside("source", read.from.len))?;
    Ok((near, far))
}
