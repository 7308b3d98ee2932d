//! What a caller asks for, and its check.

use refit_planner::{Dim, Dims, Dtype, ElementMap, Transform};

use crate::error::{KernelError, Side};

/// What becomes of the bytes of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Effect {
    /// They are brought from the source to the target, copied, cast or mapped.
    Transform(Transform),
    /// The target's bytes are set to zero. There is no source: `from` and the source strides mean nothing.
    Zero,
}

/// A strided move: equal runs of bytes at places that repeat on both sides.
///
/// Addresses are those by which the device that executes the move reaches the memory. Runs that overlap in the target
/// get the bytes of any of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    /// Address of the first byte that is read.
    pub from: u64,
    /// Address of the first byte that is written.
    pub into: u64,
    /// Bytes read of a run; bytes written for [`Effect::Zero`].
    pub run: u64,
    /// Where the runs are, relative to the first.
    pub dims: Dims,
    /// What becomes of the bytes.
    pub effect: Effect,
}

/// A first address and one past a last one.
pub(crate) type Extent = (u64, u64);

impl Move {
    /// The elements that an effect turns into each other, of one byte where it does not look at them.
    fn elements(&self, index: usize) -> Result<(ElementMap, Dtype, Dtype), KernelError> {
        let transform = match self.effect {
            Effect::Zero | Effect::Transform(Transform::Copy) => {
                return Ok((ElementMap::Identity, Dtype::U8, Dtype::U8));
            }
            Effect::Transform(transform) => transform,
        };
        let unsupported = KernelError::Unsupported { index, transform };
        let (map, from, to) = match transform {
            Transform::Cast { from, to } => (ElementMap::Identity, from, to),
            Transform::Map { map, from, to } => (map, from, to),
            _ => return Err(unsupported),
        };
        let floats = [Dtype::F32, Dtype::Bf16, Dtype::F16];
        let known = Transform::mapping(map, from, to) == Some(transform)
            && matches!(map, ElementMap::Identity | ElementMap::AddOne | ElementMap::NegExp)
            && floats.contains(&from)
            && floats.contains(&to);
        if known { Ok((map, from, to)) } else { Err(unsupported) }
    }

    /// Checks a move and brings it into its simplest form. `index` is for errors.
    pub(crate) fn check(&self, index: usize) -> Result<Pattern, KernelError> {
        let (map, from, to) = self.elements(index)?;
        if self.run == 0 || self.dims.as_slice().iter().any(|dim| dim.count == 0) {
            return Err(KernelError::Empty { index });
        }
        if !self.run.is_multiple_of(from.size()) {
            return Err(KernelError::Ragged { index, run: self.run, from });
        }
        let wraps = |side| KernelError::Wraps { index, side };
        let written = (self.run / from.size()).checked_mul(to.size());
        let written = written.ok_or_else(|| wraps(Side::Target))?;
        let dims = self.dims.as_slice();
        let target = extent(self.into, written, dims, |dim| dim.target_stride);
        let target = target.ok_or_else(|| wraps(Side::Target))?;
        let mut pattern = Pattern {
            source_start: self.from,
            target_start: self.into,
            source_run: self.run,
            target_run: written,
            dims: dims.iter().filter(|dim| dim.count > 1).copied().collect(),
            map,
            from,
            to,
            zero: self.effect == Effect::Zero,
            source: None,
            target,
        };
        if pattern.zero {
            // As if the target were copied onto itself, so that the source restricts nothing.
            pattern.source_start = self.into;
            for dim in &mut pattern.dims {
                dim.source_stride = dim.target_stride;
            }
        } else {
            let source = extent(self.from, self.run, dims, |dim| dim.source_stride);
            pattern.source = Some(source.ok_or_else(|| wraps(Side::Source))?);
        }
        pattern.simplify();
        Ok(pattern)
    }
}

/// A move that was found to be possible: no count is 0 or 1, no sum of what follows wraps.
#[derive(Clone, Debug)]
pub(crate) struct Pattern {
    pub(crate) source_start: u64,
    pub(crate) target_start: u64,
    pub(crate) source_run: u64,
    pub(crate) target_run: u64,
    /// Outermost first.
    pub(crate) dims: Vec<Dim>,
    pub(crate) map: ElementMap,
    /// Both types are [`Dtype::U8`] where bytes are copied or zeroed.
    pub(crate) from: Dtype,
    pub(crate) to: Dtype,
    pub(crate) zero: bool,
    /// The bytes that are read, if any are, and what lies between them.
    pub(crate) source: Option<Extent>,
    /// The bytes that are written, and what lies between them.
    pub(crate) target: Extent,
}

impl Pattern {
    /// Joins dimensions that continue each other on both sides, so that runs are long and dimensions few.
    fn simplify(&mut self) {
        let mut dims: Vec<Dim> = Vec::with_capacity(self.dims.len());
        for dim in self.dims.iter().rev() {
            let follows = |stride: u64, inner: Option<(u64, u64)>| {
                inner.is_some_and(|(count, step)| count.checked_mul(step) == Some(stride))
            };
            let (source, target) = match dims.last() {
                None => (Some((1, self.source_run)), Some((1, self.target_run))),
                Some(inner) => (
                    Some((inner.count, inner.source_stride)),
                    Some((inner.count, inner.target_stride)),
                ),
            };
            if !(follows(dim.source_stride, source) && follows(dim.target_stride, target)) {
                dims.push(*dim);
                continue;
            }
            // The products stay below the extents, which do not wrap: strides equal lengths, which are not 0. Where
            // they are, as in a source that is read again and again, a count may be more than there are numbers.
            match dims.last_mut() {
                None => {
                    self.source_run *= dim.count;
                    self.target_run *= dim.count;
                }
                Some(inner) => match inner.count.checked_mul(dim.count) {
                    Some(count) => inner.count = count,
                    None => dims.push(*dim),
                },
            }
        }
        dims.reverse();
        self.dims = dims;
    }
}

/// From the first byte to one past the last, if that is an address.
fn extent(start: u64, run: u64, dims: &[Dim], stride: impl Fn(&Dim) -> u64) -> Option<Extent> {
    let mut end = start.checked_add(run)?;
    for dim in dims {
        end = end.checked_add((dim.count.checked_sub(1)?).checked_mul(stride(dim))?)?;
    }
    Some((start, end))
}
