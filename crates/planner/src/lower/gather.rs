//! Reading neighbours together.
//!
//! Trainers keep parameters side by side in large buffers. Where every read has its price, it is cheaper to read such a
//! stretch in a few large reads into staging and to put its parameters in place locally, as long as that goes on beside the
//! reads and costs no time of its own.

use alloc::vec::Vec;

use super::stage::{self, Form, Piece, Room};
use super::{Group, Links, LowerOptions, STAGING_ALIGN};
use super::{Mode, Policy, Position};
use crate::capabilities::nanoseconds;
use crate::program::{Choice, Method};
use crate::{LowerError, Plan};

/// No gap between neighbours that is larger is read along, whatever another read costs: it takes staging memory.
const MOST_GAP: u64 = 64 << 10;

/// Gaps make up at most this part of what is read together.
const GAPS: u64 = 128;

/// A group that is one range of the source's memory, and that may be read together with its neighbours.
#[derive(Clone, Copy)]
struct Candidate {
    group: usize,
    rank: u32,
    /// Where it starts and ends in its block.
    start: Position,
    end: u64,
}

/// Turns groups whose bytes touch in the source's memory to [`Method::Gathered`] where that saves reads.
pub(super) fn gather(
    plan: &Plan,
    groups: &mut [Group<'_>],
    links: &Links,
    options: &LowerOptions,
    room: &Room,
) -> Result<(), LowerError> {
    // Landing that nothing is read beside costs more than it saves.
    if options.mode == Mode::Staged
        || options.slots < 2
        || links.positions.iter().all(Option::is_none)
    {
        return Ok(());
    }
    let mut candidates: Vec<Candidate> = (0..groups.len())
        .filter_map(|group| candidate(plan, group, &groups[group], links))
        .collect();
    candidates.sort_by_key(|candidate| (candidate.rank, candidate.start));
    let limit = options.wave_limit();
    let (mut chosen, mut saved_ns, mut bytes) = (Vec::new(), 0_u64, 0_u64);
    let mut rest = candidates.as_slice();
    while let Some(first) = rest.first() {
        let most_gap = match options.policy {
            Policy::Cheapest => links.of(groups[first.group].chosen().source).bytes_in_a_read(),
            _ => 0,
        };
        let run;
        (run, rest) = rest.split_at(neighbours(rest, most_gap.min(MOST_GAP)));
        let run_bytes = run[run.len() - 1].end - run[0].start.offset;
        let before = run.iter().fold(0, |reads: u64, candidate| {
            reads.saturating_add(groups[candidate.group].chosen().reads)
        });
        let after = run_bytes.div_ceil(limit.max(1)).max(1);
        let Some(saved) = before.checked_sub(after).filter(|&saved| saved > 0) else { continue };
        let link = links.of(groups[run[0].group].chosen().source);
        saved_ns = saved_ns.saturating_add(saved.saturating_mul(link.ns_per_read));
        bytes = bytes.saturating_add(run_bytes);
        chosen.extend(run.iter().zip(core::iter::once(None).chain(run.iter().map(Some))).map(
            |(candidate, before)| {
                (*candidate, before.map(|before| candidate.start.offset - before.end))
            },
        ));
    }
    // What is landed last has no reads beside it.
    if saved_ns <= nanoseconds(bytes.min(limit), options.landing_bytes_per_us) {
        return Ok(());
    }
    let lanes = chosen.chunk_by(|(a, _), (b, _)| a.rank == b.rank).count() as u64;
    // A fraction of what a wave stages of one rank, so that waves are filled well.
    let mut room = room.with_limit(limit / lanes.max(1) / 4);
    let mut gathered = Vec::with_capacity(chosen.len());
    for (Candidate { group, .. }, neighbour) in chosen {
        let mut pieces = Vec::new();
        match stage::cut(range(&groups[group]), Form::Span, &mut room, &mut pieces) {
            Ok(()) => gathered.push((group, pieces, neighbour)),
            Err(LowerError::TooManyReads { .. }) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    let of_others = groups.iter().map(|group| u128::from(group.chosen().reads)).sum::<u128>();
    let of_these = gathered.iter().map(|(_, pieces, _)| pieces.len() as u128).sum::<u128>();
    if of_others + of_these > u128::from(links.max_reads) {
        return Ok(());
    }
    for (group, pieces, neighbour) in gathered {
        let group = &mut groups[group];
        let link = links.of(group.chosen().source);
        let wire_bytes = pieces.iter().map(|piece| Form::Span.bytes(piece)).sum();
        let gathered = Choice {
            method: Method::Gathered,
            reads: pieces.len() as u64,
            wire_bytes,
            // A share in large reads.
            cost_ns: nanoseconds(wire_bytes, link.bytes_per_us),
            ..group.chosen()
        };
        group.spans = pieces;
        group.neighbour = neighbour;
        group.forms.insert(0, gathered);
    }
    Ok(())
}

/// All of a group's segments, in the order of the source.
fn range(group: &Group<'_>) -> Piece {
    let mut piece: Piece = group.segments.iter().map(|&segment| segment.clone()).collect();
    piece.sort_by_key(|segment| segment.source_offset);
    piece
}

fn candidate(plan: &Plan, group: usize, parts: &Group<'_>, links: &Links) -> Option<Candidate> {
    let chosen = parts.chosen();
    let Position { block, offset } = links.positions[chosen.source as usize]?;
    let (start, end) = stage::range(&range(parts));
    // No byte more crosses the wire than in the form chosen before.
    let whole = end.checked_sub(start).filter(|&bytes| bytes > 0 && bytes <= chosen.wire_bytes)?;
    let start = Position { block, offset: offset.checked_add(start)? };
    let end = start.offset.checked_add(whole)?;
    let rank = plan.sources()[chosen.source as usize].rank;
    Some(Candidate { group, rank, start, end })
}

/// How many of the first candidates are read together.
fn neighbours(candidates: &[Candidate], most_gap: u64) -> usize {
    let (mut needed, mut gaps) = (0_u64, 0_u64);
    let bytes = |candidate: &Candidate| candidate.end - candidate.start.offset;
    for (number, pair) in candidates.windows(2).enumerate() {
        let [before, next] = pair else { unreachable!("windows of two") };
        needed = needed.saturating_add(bytes(before));
        let same = (before.rank, before.start.block) == (next.rank, next.start.block);
        let gap = next.start.offset.checked_sub(before.end).filter(|&gap| same && gap <= most_gap);
        let Some(gap) = gap else { return number + 1 };
        gaps = gaps.saturating_add(gap);
        if gaps.saturating_mul(GAPS) > needed.saturating_add(bytes(next)) {
            return number + 1;
        }
    }
    candidates.len()
}

/// A piece, where it lies in staging, and the gap behind it that is read along.
pub(super) struct Placed {
    pub(super) base: u64,
    pub(super) piece: Piece,
    pub(super) gap: u64,
}

/// A piece of one rank on its way into a wave.
#[derive(Clone)]
struct Loose {
    position: Position,
    piece: Piece,
    /// The gap in front of it, if it is read together with what is before it.
    neighbour: Option<u64>,
}

/// Cuts what is gathered into waves that read from all ranks alike. What are neighbours in the source's memory are
/// neighbours in staging, so that they can be read in one. Gives the waves, and the most bytes of staging that one takes.
pub(super) fn waves(
    plan: &Plan,
    groups: &[Group<'_>],
    links: &Links,
    limit: u64,
) -> Result<(Vec<Vec<Placed>>, u64), LowerError> {
    let lanes = lanes(plan, groups, links);
    let share = limit / (lanes.len() as u64).max(1);
    let mut lanes: Vec<_> = lanes.into_iter().map(|lane| lane.into_iter().peekable()).collect();
    let (mut waves, mut most) = (Vec::new(), 0);
    while lanes.iter_mut().any(|lane| lane.peek().is_some()) {
        let (mut wave, mut taken) = (Vec::<Placed>::new(), 0_u64);
        for lane in &mut lanes {
            let (mut first, mut next) = (None, taken);
            while let Some(loose) = lane.peek() {
                let element = plan.sources()[loose.piece[0].source as usize].dtype.size();
                let joined = loose
                    .neighbour
                    .filter(|_| first.is_some())
                    .and_then(|gap| Some((gap, next.checked_add(gap)?)));
                let joined = joined.filter(|(_, base)| base.is_multiple_of(element));
                let base = match joined {
                    Some((_, base)) => base,
                    None => apart(next, loose.position, element)?,
                };
                let bytes = Form::Span.bytes(&loose.piece);
                let end = base.checked_add(bytes).filter(|end| i64::try_from(*end).is_ok());
                let end = end.ok_or(LowerError::StagingTooLarge)?;
                let full = end > limit || first.is_some_and(|first| end - first > share);
                if full && !wave.is_empty() {
                    break;
                }
                if let (Some((gap, _)), Some(before)) = (joined, wave.last_mut()) {
                    before.gap = gap;
                }
                first = first.or(Some(base));
                next = end;
                wave.extend(lane.next().map(|loose| Placed { base, piece: loose.piece, gap: 0 }));
            }
            taken = next;
        }
        most = most.max(taken);
        waves.push(wave);
    }
    Ok((waves, most))
}

/// The next place for what has no neighbour before it. Elements are aligned as in the source.
fn apart(next: u64, position: Position, element: u64) -> Result<u64, LowerError> {
    let aligned =
        next.checked_next_multiple_of(STAGING_ALIGN).ok_or(LowerError::StagingTooLarge)?;
    let alike = aligned.checked_add(position.offset % STAGING_ALIGN);
    Ok(alike.filter(|base| base.is_multiple_of(element)).unwrap_or(aligned))
}

/// What is gathered from each rank, in the order of its memory.
fn lanes(plan: &Plan, groups: &[Group<'_>], links: &Links) -> Vec<Vec<Loose>> {
    let mut pieces: Vec<(u32, Loose)> = Vec::new();
    for group in groups.iter().filter(|group| group.chosen().method == Method::Gathered) {
        let source = group.chosen().source as usize;
        let Some(Position { block, offset }) = links.positions[source] else { continue };
        let mut neighbour = group.neighbour;
        for piece in &group.spans {
            let position = Position { block, offset: offset + stage::range(piece).0 };
            let loose = Loose { position, piece: piece.clone(), neighbour };
            pieces.push((plan.sources()[source].rank, loose));
            // The parts of one range touch.
            neighbour = Some(0);
        }
    }
    pieces.sort_by_key(|(rank, loose)| (*rank, loose.position));
    let of_rank = pieces.chunk_by(|a, b| a.0 == b.0);
    of_rank.map(|lane| lane.iter().map(|(_, loose)| loose.clone()).collect()).collect()
}
