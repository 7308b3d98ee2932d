//! What the kernel reads, as `move.cu` declares it: entries, tables, and the parameter of a launch.

use refit_planner::{Dtype, ElementMap};

/// Numbers of `move.cu`.
pub(crate) const COPY_16: u32 = 0;
pub(crate) const COPY_8: u32 = 1;
pub(crate) const COPY_4: u32 = 2;
pub(crate) const ZERO_16: u32 = 3;
pub(crate) const F32_TO_BF16: u32 = 4;
pub(crate) const F32_TO_F16: u32 = 5;
pub(crate) const BF16_TO_F32: u32 = 6;
pub(crate) const F16_TO_F32: u32 = 7;
/// A unit is one element, and the code says the rest.
pub(crate) const ELEMENT: u32 = 8;

const TYPE_U8: u32 = 3;
const TYPE_U16: u32 = 4;
const TYPE_U32: u32 = 5;
const MAP_NONE: u32 = 0;
const MAP_ZERO: u32 = 4;

/// Entries take dimensions up to this.
pub(crate) const DIMS: usize = 3;

/// The bytes of the largest unit. What entries may do is decided by what their addresses are multiples of.
pub(crate) const ALIGN: u64 = 16;

/// Tables that one launch takes.
pub const MOST_TABLES: usize = 64;

/// `struct Entry` of `move.cu`, where the fields are explained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs, reason = "move.cu has it")]
pub struct Entry {
    pub source: u64,
    pub target: u64,
    pub source_stride: [u64; DIMS],
    pub target_stride: [u64; DIMS],
    pub run: u64,
    pub piece: u32,
    pub pieces: u32,
    pub rows: u32,
    pub runs: u32,
    pub first: u32,
    pub op: u32,
    pub code: u32,
    pub inner: u32,
    pub middle: u32,
    pub by_piece: u32,
    pub by_inner: u32,
    pub by_middle: u32,
    pub shifts: u32,
    pub reserved: u32,
}

/// `struct Table` of `move.cu`: a table where the kernel finds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Placed {
    /// Address of its entries.
    pub entries: u64,
    /// Address of its tiles' owners.
    pub owners: u64,
    /// Added to every source; a multiple of 16.
    pub base: u64,
    /// Tiles.
    pub tiles: u32,
    /// The first step at which all tables before this one are exhausted.
    pub start: u32,
}

/// `struct Launch` of `move.cu`: the parameter of one launch.
#[derive(Clone, Debug)]
#[repr(C)]
#[allow(missing_docs, reason = "move.cu has it")]
pub struct Launch {
    pub tables: u32,
    pub steps: u32,
    pub lanes: u32,
    pub reserved: u32,
    pub table: [Placed; MOST_TABLES],
}

const _: () = assert!(size_of::<Entry>() == 128, "one line of the cache");

/// An element of 1, 2 or 4 bytes that stays as it is.
pub(crate) fn bits_code(bytes: u64, zero: bool) -> u32 {
    let ty = match bytes {
        1 => TYPE_U8,
        2 => TYPE_U16,
        _ => TYPE_U32,
    };
    code(ty, ty, if zero { MAP_ZERO } else { MAP_NONE }, true)
}

/// An element that is cast or mapped.
pub(crate) fn float_code(map: ElementMap, from: Dtype, to: Dtype, aligned: bool) -> u32 {
    let map = match map {
        ElementMap::AddOne => 2,
        ElementMap::NegExp => 3,
        // A cast. There is no other map that `Move::check` lets pass.
        _ => 1,
    };
    code(float(from), float(to), map, aligned)
}

/// The op for four elements at once, if there is one.
pub(crate) fn cast_op(map: ElementMap, from: Dtype, to: Dtype) -> Option<u32> {
    match (map, from, to) {
        (ElementMap::Identity, Dtype::F32, Dtype::Bf16) => Some(F32_TO_BF16),
        (ElementMap::Identity, Dtype::F32, Dtype::F16) => Some(F32_TO_F16),
        (ElementMap::Identity, Dtype::Bf16, Dtype::F32) => Some(BF16_TO_F32),
        (ElementMap::Identity, Dtype::F16, Dtype::F32) => Some(F16_TO_F32),
        _ => None,
    }
}

fn float(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::Bf16 => 1,
        Dtype::F16 => 2,
        // F32: `Move::check` lets no other type pass.
        _ => 0,
    }
}

fn code(from: u32, into: u32, map: u32, aligned: bool) -> u32 {
    from | into << 4 | map << 8 | u32::from(aligned) << 12
}
