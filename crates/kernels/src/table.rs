//! Moves as the kernel reads them.

use refit_planner::Dim;

use crate::divide::{Divisor, LIMIT};
use crate::error::KernelError;
use crate::moves::{Move, Pattern};
use crate::raw::{self, DIMS, Entry};

/// Tiles that a table is cut into where it is large enough: several for every group of threads of a large GPU, so that
/// all end at nearly the same time.
const TILES_WANTED: u64 = 8192;

/// Units of a tile: enough for every thread of a group to have several loads in flight, and few enough that no group
/// is busy with one when the others are done. 4096 units of 16 bytes are 64 KiB.
const UNITS: (u64, u64) = (256, 4096);

/// What a table may take, whatever it is made of: half a GiB of entries, and an eighth of owners. So many tiles of the
/// largest size and unit are 2 TiB.
const MOST_ENTRIES: u64 = 1 << 22;
const MOST_TILES: u64 = (1 << 25) - 1;

// Callers rely on it: tables that fit into one launch by their number do so by their tiles.
const _: () = assert!(MOST_TILES * (raw::MOST_TABLES as u64) < LIMIT as u64);

/// Runs from here on are cut to let most of their bytes move in the largest unit, and the rest in small ones.
const WORTH_CUTTING: u64 = 1024;

/// Elements that casts convert at once.
const CAST: u64 = 4;

/// Moves in the form that the kernel reads. Pure: making one needs no device.
#[derive(Clone, Debug, Default)]
pub struct Table {
    entries: Vec<Entry>,
    owners: Vec<u32>,
    bytes: u64,
}

/// A part of a pattern that is one entry but for its tiles.
struct Part {
    source: u64,
    target: u64,
    /// Innermost first; absent ones have a count of 1.
    dims: [Dim; DIMS],
    /// Units of a run.
    run: u64,
    op: u32,
    code: u32,
}

impl Table {
    /// Encodes moves, in any number. They may be carried out in any order.
    ///
    /// # Errors
    /// [`KernelError::Empty`], [`KernelError::Ragged`], [`KernelError::Unsupported`], [`KernelError::Wraps`],
    /// [`KernelError::TooMany`]; each names the move.
    pub fn new(moves: &[Move]) -> Result<Self, KernelError> {
        let mut parts = Vec::with_capacity(moves.len());
        let mut bytes: u64 = 0;
        for (index, one) in moves.iter().enumerate() {
            let pattern = one.check(index)?;
            let runs = pattern.dims.iter().fold(1, |runs: u64, dim| runs.saturating_mul(dim.count));
            bytes = bytes.saturating_add(pattern.target_run.saturating_mul(runs));
            for (skip, run, op, code) in cut(&pattern) {
                spread(index, &pattern, skip, &mut parts, |source, target, dims| Part {
                    source,
                    target,
                    dims,
                    run,
                    op,
                    code,
                })?;
            }
        }
        let units = parts.iter().fold(0, |units: u64, (_, part)| {
            units.saturating_add(part.run.saturating_mul(u64::from(part.runs())))
        });
        let wanted = (units / TILES_WANTED).clamp(UNITS.0, UNITS.1);
        // The power of two below, so that whole batches of loads fill a tile.
        let tile = 1 << wanted.ilog2();
        let mut table = Self { entries: Vec::with_capacity(parts.len()), owners: vec![], bytes };
        for (index, part) in parts {
            table.push(index, &part, tile)?;
        }
        Ok(table)
    }

    /// Bytes written by carrying it out; saturated.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries, in the order of the moves.
    #[doc(hidden)]
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entry of every tile.
    #[doc(hidden)]
    #[must_use]
    pub fn owners(&self) -> &[u32] {
        &self.owners
    }

    /// Adds one entry, cut into tiles of `tile` units.
    fn push(&mut self, index: usize, part: &Part, tile: u64) -> Result<(), KernelError> {
        let runs = part.runs();
        let (piece, pieces, rows) = if part.run > tile {
            (tile, part.run.div_ceil(tile), 1)
        } else {
            (part.run, 1, (tile / part.run).min(u64::from(runs)))
        };
        // Of these two, one is 1.
        let tiles = u64::from(runs).div_ceil(rows).saturating_mul(pieces);
        let first = self.owners.len() as u64;
        let needed = first.saturating_add(tiles);
        if needed > MOST_TILES {
            return Err(KernelError::TooMany { index, what: "tiles", needed, most: MOST_TILES });
        }
        let [inner, middle, outer] = part.dims;
        let count = |dim: &Dim| u32::try_from(dim.count).unwrap_or(LIMIT);
        // At most `tile`, the runs, or all tiles.
        let small = |number: u64| u32::try_from(number).unwrap_or(LIMIT);
        let (by_piece, by_inner, by_middle) =
            (Divisor::new(small(piece)), Divisor::new(count(&inner)), Divisor::new(count(&middle)));
        let owner = u32::try_from(self.entries.len()).unwrap_or(u32::MAX);
        self.entries.push(Entry {
            source: part.source,
            target: part.target,
            source_stride: [inner.source_stride, middle.source_stride, outer.source_stride],
            target_stride: [inner.target_stride, middle.target_stride, outer.target_stride],
            run: part.run,
            piece: small(piece),
            pieces: small(pieces),
            rows: small(rows),
            runs,
            first: small(first),
            op: part.op,
            code: part.code,
            inner: count(&inner),
            middle: count(&middle),
            by_piece: by_piece.factor,
            by_inner: by_inner.factor,
            by_middle: by_middle.factor,
            shifts: by_piece.shift | by_inner.shift << 8 | by_middle.shift << 16,
            reserved: 0,
        });
        self.owners.extend((0..tiles).map(|_| owner));
        Ok(())
    }
}

impl Part {
    /// Below [`LIMIT`]: [`spread`] sees to it.
    fn runs(&self) -> u32 {
        let runs: u64 = self.dims.iter().map(|dim| dim.count).product();
        u32::try_from(runs).unwrap_or(LIMIT)
    }
}

/// What one element of a pattern takes on either side.
fn sizes(pattern: &Pattern) -> (u64, u64) {
    (pattern.from.size(), pattern.to.size())
}

/// Cuts the runs of a pattern into what moves in one kind of unit each: elements to skip, units, op, code.
fn cut(pattern: &Pattern) -> Vec<(u64, u64, u32, u32)> {
    let (source, target) = sizes(pattern);
    if (source, target) == (1, 1) {
        return cut_bytes(pattern);
    }
    let elements = pattern.source_run / source;
    let multiples = |n: u64| {
        alignment_of_source(pattern).is_multiple_of(n * source)
            && alignment_of_target(pattern).is_multiple_of(n * target)
    };
    let code = raw::float_code(pattern.map, pattern.from, pattern.to, multiples(1));
    let vectors = raw::cast_op(pattern.map, pattern.from, pattern.to).filter(|_| multiples(CAST));
    let whole = match vectors {
        Some(_) if elements.is_multiple_of(CAST) || pattern.source_run >= WORTH_CUTTING => {
            elements / CAST
        }
        _ => 0,
    };
    let rest = elements - whole * CAST;
    let mut parts = Vec::with_capacity(2);
    if let Some(op) = vectors.filter(|_| whole > 0) {
        parts.push((0, whole, op, 0));
    }
    if rest > 0 {
        parts.push((whole * CAST, rest, raw::ELEMENT, code));
    }
    parts
}

/// As [`cut`], where bytes are copied or zeroed.
fn cut_bytes(pattern: &Pattern) -> Vec<(u64, u64, u32, u32)> {
    let run = pattern.source_run;
    // What units could be at some byte of a run, and what they can be at its first.
    let best =
        lowest_bit(strides(pattern) | pattern.source_start.wrapping_sub(pattern.target_start));
    let at_start = lowest_bit(best | pattern.source_start);
    let whole = lowest_bit(at_start | run);
    if whole == best || run < WORTH_CUTTING {
        return vec![unit(pattern, 0, run, whole)];
    }
    let head = pattern.source_start.wrapping_neg() % best;
    let body = (run - head) / best * best;
    let tail = run - head - body;
    let mut parts = vec![unit(pattern, head, body, best)];
    if head > 0 {
        parts.push(unit(pattern, 0, head, lowest_bit(at_start | head)));
    }
    if tail > 0 {
        parts.push(unit(pattern, head + body, tail, lowest_bit(best | tail)));
    }
    parts
}

/// A part of a run in units of `bytes`, or of what the kernel has for them.
fn unit(pattern: &Pattern, skip: u64, run: u64, bytes: u64) -> (u64, u64, u32, u32) {
    let (bytes, op, code) = match (bytes, pattern.zero) {
        (16, false) => (16, raw::COPY_16, 0),
        (8, false) => (8, raw::COPY_8, 0),
        (4, false) => (4, raw::COPY_4, 0),
        (16, true) => (16, raw::ZERO_16, 0),
        (bytes, zero) => (bytes.min(4), raw::ELEMENT, raw::bits_code(bytes.min(4), zero)),
    };
    (skip, run / bytes, op, code)
}

/// All strides of both sides, or-ed: their low bits tell what divides all of them.
fn strides(pattern: &Pattern) -> u64 {
    pattern.dims.iter().fold(0, |bits, dim| bits | dim.source_stride | dim.target_stride)
}

/// The largest of 16, 8, 4, 2 and 1 that divides the addresses of all runs in the source.
fn alignment_of_source(pattern: &Pattern) -> u64 {
    let strides = pattern.dims.iter().fold(0, |bits, dim| bits | dim.source_stride);
    lowest_bit(strides | pattern.source_start)
}

/// The same of the target.
fn alignment_of_target(pattern: &Pattern) -> u64 {
    let strides = pattern.dims.iter().fold(0, |bits, dim| bits | dim.target_stride);
    lowest_bit(strides | pattern.target_start)
}

/// The largest power of two up to [`raw::ALIGN`] that divides a number whose bits, among others, are these.
fn lowest_bit(bits: u64) -> u64 {
    1 << (bits | raw::ALIGN).trailing_zeros()
}

/// Makes parts of the pattern's repetitions: as many dimensions as an entry takes stay, and the others are written out.
/// `skip` elements of every run are left out.
fn spread(
    index: usize,
    pattern: &Pattern,
    skip: u64,
    parts: &mut Vec<(usize, Part)>,
    part: impl Fn(u64, u64, [Dim; DIMS]) -> Part,
) -> Result<(), KernelError> {
    let (source, target) = sizes(pattern);
    let start = (pattern.source_start + skip * source, pattern.target_start + skip * target);
    let runs = pattern.dims.iter().fold(1, |runs: u64, dim| runs.saturating_mul(dim.count));
    let too_many =
        |needed| KernelError::TooMany { index, what: "entries", needed, most: MOST_ENTRIES };
    if runs / u64::from(LIMIT) >= MOST_ENTRIES {
        // It also bounds what `grids` does: at most one count is as large as to be cut.
        return Err(too_many(runs / u64::from(LIMIT)));
    }
    let grids = grids(&pattern.dims);
    let needed = grids.iter().fold(parts.len() as u64, |needed, grid| {
        let written_out = grid.out.iter().fold(1, |n: u64, dim| n.saturating_mul(dim.count));
        needed.saturating_add(written_out)
    });
    if needed > MOST_ENTRIES {
        return Err(too_many(needed));
    }
    for grid in grids {
        let out: refit_planner::Dims = grid.out.into_iter().collect();
        for (source, target) in out.offsets() {
            // Inside the extents, which do not wrap.
            let source = start.0.wrapping_add(grid.source).wrapping_add(source);
            let target = start.1.wrapping_add(grid.target).wrapping_add(target);
            parts.push((index, part(source, target, grid.kept)));
        }
    }
    Ok(())
}

/// Repetitions, some of which an entry takes.
#[derive(Debug, PartialEq, Eq)]
struct Grid {
    /// Offset of its first run.
    source: u64,
    target: u64,
    /// What an entry takes, innermost first; fewer than [`LIMIT`] runs.
    kept: [Dim; DIMS],
    /// What is written out.
    out: Vec<Dim>,
}

/// The dimensions of a pattern as grids: one, but for counts that an entry cannot hold.
fn grids(dims: &[Dim]) -> Vec<Grid> {
    const ONE: Dim = Dim { count: 1, source_stride: 0, target_stride: 0 };
    /// Larger counts become two dimensions, and a rest.
    const MOST: u64 = 1 << 30;
    if let Some(at) = dims.iter().position(|dim| dim.count > MOST) {
        let Dim { count, source_stride, target_stride } = dims[at];
        let (times, rest) = (count / MOST, count % MOST);
        let whole = Dim {
            count: times,
            // Below the extent where there are two of them, and otherwise never used.
            source_stride: source_stride.wrapping_mul(MOST),
            target_stride: target_stride.wrapping_mul(MOST),
        };
        let with = |parts: &[Dim]| [&dims[..at], parts, &dims[at + 1..]].concat();
        let inner = Dim { count: MOST, source_stride, target_stride };
        let mut all = grids(&with(&[whole, inner]));
        if rest > 0 {
            for mut grid in grids(&with(&[Dim { count: rest, source_stride, target_stride }])) {
                // Behind the whole ones, so inside the extent.
                grid.source = grid.source.wrapping_add(whole.source_stride.wrapping_mul(times));
                grid.target = grid.target.wrapping_add(whole.target_stride.wrapping_mul(times));
                all.push(grid);
            }
        }
        return all;
    }
    // The largest counts stay, so that few entries are made; in their order, so that neighbours stay neighbours.
    let mut by_count: Vec<usize> = (0..dims.len()).collect();
    by_count.sort_by_key(|at| std::cmp::Reverse(dims[*at].count));
    let mut runs = 1;
    let mut stay = vec![false; dims.len()];
    let mut left = DIMS;
    for at in by_count {
        // Both factors are at most 2^31.
        let more = runs * dims[at].count;
        if left > 0 && more < u64::from(LIMIT) {
            (runs, left, stay[at]) = (more, left - 1, true);
        }
    }
    let mut kept = [ONE; DIMS];
    let inner = dims.iter().zip(&stay).filter(|(_, stay)| **stay).map(|(dim, _)| *dim).rev();
    for (place, dim) in kept.iter_mut().zip(inner) {
        *place = dim;
    }
    let out = dims.iter().zip(&stay).filter(|(_, stay)| !**stay).map(|(dim, _)| *dim).collect();
    vec![Grid { source: 0, target: 0, kept, out }]
}
