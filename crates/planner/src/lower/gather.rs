//! Reading neighbours together.
//!
//! Trainers keep parameters side by side in large buffers. Where every read has its price, it is cheaper to read such a
//! stretch in a few large reads into staging and to put its parameters in place locally, as long as that goes on beside the
//! reads and costs no time of its own.

use alloc::vec::Vec;

use super::stage::{self, Form, Piece, Room};
use super::{Group, Links, LowerOptions, STAGING_ALIGN};
use super::{Mode, Position};
use crate::capabilities::nanoseconds;
use crate::program::{Choice, Method};
use crate::{LowerError, Plan};

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
    let touch = |a: &Candidate, b: &Candidate| {
        (a.rank, a.start.block, a.end) == (b.rank, b.start.block, b.start.offset)
    };
    let limit = options.wave_limit();
    let (mut chosen, mut saved_ns, mut bytes) = (Vec::new(), 0_u64, 0_u64);
    for run in candidates.chunk_by(touch) {
        let run_bytes = run[run.len() - 1].end - run[0].start.offset;
        let before = run.iter().fold(0, |reads: u64, candidate| {
            reads.saturating_add(groups[candidate.group].chosen().reads)
        });
        let after = run_bytes.div_ceil(limit.max(1)).max(1);
        let Some(saved) = before.checked_sub(after).filter(|&saved| saved > 0) else { continue };
        let link = links.of(groups[run[0].group].chosen().source);
        saved_ns = saved_ns.saturating_add(saved.saturating_mul(link.ns_per_read));
        bytes = bytes.saturating_add(run_bytes);
        chosen.extend_from_slice(run);
    }
    // What is landed last has no reads beside it.
    if saved_ns <= nanoseconds(bytes.min(limit), options.landing_bytes_per_us) {
        return Ok(());
    }
    let lanes = chosen.chunk_by(|a, b| a.rank == b.rank).count() as u64;
    // A fraction of what a wave stages of one rank, so that waves are filled well.
    let mut room = room.with_limit(limit / lanes.max(1) / 4);
    let mut gathered = Vec::with_capacity(chosen.len());
    for Candidate { group, .. } in chosen {
        let mut pieces = Vec::new();
        match stage::cut(range(&groups[group]), Form::Span, &mut room, &mut pieces) {
            Ok(()) => gathered.push((group, pieces)),
            Err(LowerError::TooManyReads { .. }) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    let of_others = groups.iter().map(|group| u128::from(group.chosen().reads)).sum::<u128>();
    let of_these = gathered.iter().map(|(_, pieces)| pieces.len() as u128).sum::<u128>();
    if of_others + of_these > u128::from(links.max_reads) {
        return Ok(());
    }
    for (group, pieces) in gathered {
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

/// What is gathered from one rank, in the order of its memory.
type Lane = Vec<(Position, Piece)>;

/// Pieces of one wave, and where each lies in staging.
pub(super) type Wave = Vec<(u64, Piece)>;

/// Cuts what is gathered into waves that read from all ranks alike. Pieces that touch in the source's memory touch in
/// staging, so that they can be read in one. Gives the waves, and the most bytes of staging that one takes.
pub(super) fn waves(
    plan: &Plan,
    groups: &[Group<'_>],
    links: &Links,
    limit: u64,
) -> Result<(Vec<Wave>, u64), LowerError> {
    let lanes = lanes(plan, groups, links);
    let share = limit / (lanes.len() as u64).max(1);
    let mut lanes: Vec<_> = lanes.into_iter().map(|lane| lane.into_iter().peekable()).collect();
    let (mut waves, mut most) = (Vec::new(), 0);
    while lanes.iter_mut().any(|lane| lane.peek().is_some()) {
        let (mut wave, mut taken) = (Wave::new(), 0_u64);
        for lane in &mut lanes {
            let mut before: Option<Position> = None;
            let (mut first, mut next) = (None, taken);
            while let Some((position, piece)) = lane.peek() {
                let bytes = Form::Span.bytes(piece);
                let element = plan.sources()[piece[0].source as usize].dtype.size();
                let base = match before {
                    Some(end) if end == *position && next.is_multiple_of(element) => Some(next),
                    // Elements are aligned as in the source.
                    _ => next
                        .checked_next_multiple_of(STAGING_ALIGN)
                        .and_then(|base| base.checked_add(position.offset % STAGING_ALIGN))
                        .filter(|base| base.is_multiple_of(element))
                        .or_else(|| next.checked_next_multiple_of(STAGING_ALIGN)),
                };
                let base = base.ok_or(LowerError::StagingTooLarge)?;
                let end = base.checked_add(bytes).filter(|end| i64::try_from(*end).is_ok());
                let end = end.ok_or(LowerError::StagingTooLarge)?;
                let full = end > limit || first.is_some_and(|first| end - first > share);
                if full && !wave.is_empty() {
                    break;
                }
                before = Some(Position { offset: position.offset + bytes, ..*position });
                first = first.or(Some(base));
                next = end;
                wave.extend(lane.next().map(|(_, piece)| (base, piece)));
            }
            taken = next;
        }
        most = most.max(taken);
        waves.push(wave);
    }
    Ok((waves, most))
}

fn lanes(plan: &Plan, groups: &[Group<'_>], links: &Links) -> Vec<Lane> {
    let mut pieces: Vec<(u32, Position, Piece)> = Vec::new();
    for group in groups.iter().filter(|group| group.chosen().method == Method::Gathered) {
        let source = group.chosen().source as usize;
        let Some(Position { block, offset }) = links.positions[source] else { continue };
        for piece in &group.spans {
            let position = Position { block, offset: offset + stage::range(piece).0 };
            pieces.push((plan.sources()[source].rank, position, piece.clone()));
        }
    }
    pieces.sort_by_key(|(rank, position, _)| (*rank, *position));
    let of_rank = pieces.chunk_by(|a, b| a.0 == b.0);
    of_rank.map(|lane| lane.iter().map(|(_, at, piece)| (*at, piece.clone())).collect()).collect()
}
