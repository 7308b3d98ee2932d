//! What bench parameters hold: a function of the logical element and the cycle, written by sources and recomputed by
//! targets. Neither side asks the planner: each walks the bands of its own layout.

use std::collections::BTreeMap;

use refit::planner::{Band, Param, RankLayout, Tensor};
use refit::pool::Memory;

use crate::error::CliError;

/// Spreads neighbouring columns over all 16 bits (2^32 / golden ratio).
const STEP: u32 = 0x9e37_79b9;

/// What a target holds before its first refit.
pub(crate) const POISON: u8 = 0xa5;

/// Writes the values of `cycle` into every parameter.
pub(crate) fn fill<'a>(
    layout: &RankLayout,
    params: impl Iterator<Item = (&'a str, &'a mut Memory)>,
    cycle: u64,
) -> Result<(), CliError> {
    let mut buffers = BTreeMap::new();
    for (name, memory) in params {
        buffers.insert(name, memory.host_bytes_mut().ok_or_else(not_host)?);
    }
    for (param, tensor, band) in layout.bands() {
        check(param)?;
        let buffer = buffers.get_mut(param.name().as_ref()).ok_or_else(not_host)?;
        for (row, at) in rows(param, band) {
            let (seed, width) = (seed(tensor, row, cycle), width(band));
            for (two, value) in buffer[at..at + width].chunks_exact_mut(2).zip(values(seed, band)) {
                two.copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    Ok(())
}

/// Compares every byte of every parameter with the values of `cycle`, and fills with zeros.
pub(crate) fn verify<'a>(
    layout: &RankLayout,
    params: impl Iterator<Item = (&'a str, &'a Memory)>,
    cycle: u64,
) -> Result<u64, CliError> {
    let mut buffers = BTreeMap::new();
    for (name, memory) in params {
        buffers.insert(name, memory.host_bytes().ok_or_else(not_host)?);
    }
    let mut verified = 0;
    for (param, tensor, band) in layout.bands() {
        check(param)?;
        let buffer = buffers.get(param.name().as_ref()).ok_or_else(not_host)?;
        for (row, at) in rows(param, band) {
            let (seed, width) = (seed(tensor, row, cycle), width(band));
            let held = &buffer[at..at + width];
            let wrong =
                held.chunks_exact(2).zip(values(seed, band)).fold(0, |wrong, (two, value)| {
                    wrong | (u16::from_le_bytes([two[0], two[1]]) ^ value)
                });
            if wrong != 0 {
                let places = held.chunks_exact(2).zip(values(seed, band));
                let first = places.take_while(|(two, value)| **two == value.to_le_bytes()).count();
                return Err(mismatch(param, at + 2 * first, cycle));
            }
            verified += width as u64;
        }
    }
    for param in layout.params() {
        let buffer = buffers.get(param.name().as_ref()).ok_or_else(not_host)?;
        for (rows, cols) in param.fill_boxes() {
            for row in rows {
                let (from, to) = (index(param, row, cols.start), index(param, row, cols.end));
                if let Some(first) = buffer[from..to].iter().position(|&byte| byte != 0) {
                    return Err(mismatch(param, from + first, cycle));
                }
                verified += (to - from) as u64;
            }
        }
    }
    if verified != layout.bytes() {
        let bytes = layout.bytes();
        return Err(CliError::Mismatch(format!(
            "only {verified} of {bytes} bytes could be verified"
        )));
    }
    Ok(verified)
}

fn check(param: &Param) -> Result<(), CliError> {
    if param.dtype().size() == 2 {
        return Ok(());
    }
    let reason = format!("`{}` is {}; a bench needs a 16-bit model", param.name(), param.dtype());
    Err(CliError::Usage(reason))
}

/// The band's logical rows, and the byte at which each starts in the parameter.
fn rows<'a>(param: &'a Param, band: &'a Band) -> impl Iterator<Item = (u64, usize)> + 'a {
    let (at_row, at_col) = band.origin();
    let first = band.logical_rows().start;
    band.logical_rows()
        .map(move |row| (row, index(param, at_row + (row - first) * band.step(), at_col)))
}

/// Byte index of a local element. Fits: the parameter is in memory.
fn index(param: &Param, row: u64, col: u64) -> usize {
    usize::try_from((row * param.cols() + col) * param.dtype().size()).unwrap_or(usize::MAX)
}

fn width(band: &Band) -> usize {
    let cols = band.logical_cols();
    usize::try_from((cols.end - cols.start) * 2).unwrap_or(usize::MAX)
}

/// The values of a row, from the band's first column on: the upper halves of an arithmetic progression, which a
/// compiler turns into vector additions.
#[allow(clippy::cast_possible_truncation, reason = "columns wrap around on purpose")]
fn values(seed: u32, band: &Band) -> impl Iterator<Item = u16> {
    let start = band.logical_cols().start as u32;
    let from = seed.wrapping_add(start.wrapping_mul(STEP));
    (0u32..).map(move |col| (from.wrapping_add(col.wrapping_mul(STEP)) >> 16) as u16)
}

/// A row's own starting point, from its tensor, number and cycle (splitmix64).
fn seed(tensor: &Tensor, row: u64, cycle: u64) -> u32 {
    let name = tensor
        .name
        .bytes()
        .fold(cycle, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let mut hash = name ^ row.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    u32::try_from(hash >> 32).unwrap_or_default()
}

fn not_host() -> CliError {
    CliError::Usage("a bench over host memory found a parameter that is not in it".to_owned())
}

fn mismatch(param: &Param, byte: usize, cycle: u64) -> CliError {
    CliError::Mismatch(format!("cycle {cycle}: `{}` is wrong from byte {byte} on", param.name()))
}
