//! The slow, obviously right resharder: element by element, no segments, no runs, no arithmetic worth the name.
//!
//! A logical element has a *tag*, a function of its tensor, row and column. The oracle writes tags into buffers by
//! walking a rank's bands one element at a time. Whatever moves a source rank's buffers to a target rank must produce
//! what the oracle writes for the target directly.
//!
//! Where a side maps elements, the tag is what the source stores, and the target wants its image.

use std::collections::{BTreeMap, BTreeSet};

use refit::planner::{Dtype, ElementMap, Param, RankLayout, Transform};

use crate::floats;

/// Every parameter's bytes, by name.
pub type Buffers = BTreeMap<String, Vec<u8>>;

/// What unwritten bytes hold.
pub const POISON: u8 = 0xA5;

/// 16 bits that say which logical element this is. Never a NaN when read as bf16 or as the upper half of an f32, so
/// that casts keep it.
#[must_use]
pub fn tag(tensor: &str, row: u64, col: u64) -> u16 {
    let mut hash = tensor.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    for word in [row, col] {
        hash = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 29;
    }
    // The sign and a mantissa of 7 bits stay random; the exponent keeps below all-ones.
    let bits = u16::try_from(hash & 0xffff).unwrap();
    if bits & 0x7f80 == 0x7f80 { bits & !0x4000 } else { bits }
}

/// The element with this tag, in a type's bytes.
#[must_use]
pub fn element(dtype: Dtype, tag: u16) -> Vec<u8> {
    match dtype {
        Dtype::Bf16 | Dtype::F16 => tag.to_le_bytes().to_vec(),
        Dtype::F32 => (u32::from(tag) << 16).to_le_bytes().to_vec(),
        Dtype::U8 | Dtype::F8E4m3 => vec![tag.to_le_bytes()[0]],
        other => panic!("no tags for {other}"),
    }
}

/// What a rank must hold: tags where bands lie, zeros where fills lie, poison elsewhere.
#[must_use]
pub fn buffers(layout: &RankLayout) -> Buffers {
    filled(layout, |param, _, tag| element(param.dtype(), tag))
}

/// What a target rank must hold after these sources, if either side maps: like [`buffers`], but images of tags.
///
/// All source parameters that hold some of a mapped tensor must have the same type and map.
#[must_use]
pub fn wanted(target: &RankLayout, sources: &[RankLayout]) -> Buffers {
    let mut stored = BTreeMap::<&str, BTreeSet<(ElementMap, Dtype)>>::new();
    for (param, tensor, _) in sources.iter().flat_map(RankLayout::bands) {
        stored.entry(&tensor.name).or_default().insert((param.element_map(), param.dtype()));
    }
    filled(target, |param, tensor, tag| {
        let stored = &stored[tensor];
        let to = param.dtype();
        if param.element_map() == ElementMap::Identity
            && stored.iter().all(|(map, _)| *map == ElementMap::Identity)
        {
            return element(to, tag);
        }
        assert_eq!(stored.len(), 1, "what `{tensor}` maps to depends on the copy that is read");
        let (source_map, from) = *stored.first().unwrap();
        let map = match (source_map, param.element_map()) {
            (map, ElementMap::Identity) | (ElementMap::Identity, map) => map,
            (source, target) => panic!("{source} meets {target}"),
        };
        floats::transformed(Transform::Map { map, from, to }, &element(from, tag))
    })
}

/// A rank's buffers, with the bytes that `value` gives for a parameter, a tensor and a tag.
fn filled(layout: &RankLayout, value: impl Fn(&Param, &str, u16) -> Vec<u8>) -> Buffers {
    let mut buffers: Buffers =
        layout.params().iter().map(|param| (param.name().to_string(), poisoned(param))).collect();
    for (param, tensor, band) in layout.bands() {
        let buffer = buffers.get_mut(param.name().as_ref()).unwrap();
        for row in band.logical_rows() {
            for col in band.logical_cols() {
                let (at_row, at_col) = band.origin();
                let local_row = at_row + (row - band.logical_rows().start) * band.step();
                let local_col = at_col + (col - band.logical_cols().start);
                put(
                    buffer,
                    param,
                    local_row,
                    local_col,
                    &value(param, &tensor.name, tag(&tensor.name, row, col)),
                );
            }
        }
    }
    for param in layout.params() {
        let buffer = buffers.get_mut(param.name().as_ref()).unwrap();
        for (rows, cols) in param.fill_boxes() {
            for row in rows {
                for col in cols.clone() {
                    put(
                        buffer,
                        param,
                        row,
                        col,
                        &vec![0; usize::try_from(param.dtype().size()).unwrap()],
                    );
                }
            }
        }
    }
    buffers
}

/// A buffer of the parameter's size that nobody has written.
#[must_use]
pub fn poisoned(param: &Param) -> Vec<u8> {
    vec![POISON; usize::try_from(param.bytes()).unwrap()]
}

fn put(buffer: &mut [u8], param: &Param, row: u64, col: u64, element: &[u8]) {
    let at = usize::try_from((row * param.cols() + col) * param.dtype().size()).unwrap();
    buffer[at..at + element.len()].copy_from_slice(element);
}
