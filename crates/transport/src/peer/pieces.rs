//! Reads, cut where the memory they touch stops being one allocation.
//!
//! Two allocations that touch in the peer's address space need not touch in ours, and no copy engine crosses from one
//! allocation into the next. As a rule nothing is cut.

use refit_planner::{Dim, Dims, Transform};

use crate::ReadOp;

/// A read, or a part of one, by addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) from: u64,
    pub(super) into: u64,
    /// Bytes of one run, as it is read.
    pub(super) run: u64,
    pub(super) dims: Dims,
    pub(super) transform: Transform,
}

/// Why a read cannot be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Uncut {
    /// A byte of it lies in no allocation.
    Outside,
    /// A border lies within an element that is to be changed.
    Element,
}

impl Piece {
    pub(super) fn of(op: &ReadOp) -> Self {
        Self {
            from: op.from.address,
            into: op.into.address,
            run: op.run,
            dims: op.dims.clone(),
            transform: op.transform,
        }
    }

    /// Whether it is a plain copy of contiguous bytes.
    pub(super) fn is_plain(&self) -> bool {
        self.dims.is_none() && self.transform == Transform::Copy
    }

    /// Cuts it where allocations end on the side that is read. `room` says how many bytes from an address on lie in the
    /// allocation of the first of them.
    ///
    /// A pattern is halved until its parts lie in one allocation each, so that the pieces are few: a logarithm of the
    /// runs for each border.
    pub(super) fn cut(
        self,
        room: &impl Fn(u64) -> Option<u64>,
        out: &mut Vec<Self>,
    ) -> Result<(), Uncut> {
        let here = room(self.from).ok_or(Uncut::Outside)?;
        if self.dims.source_extent(self.run) <= here {
            out.push(self);
            return Ok(());
        }
        let Some((&outer, inner)) = self.dims.as_slice().split_first() else {
            return self.cut_run(here, room, out);
        };
        let inner = || inner.to_vec();
        if outer.count <= 1 {
            return Self { dims: inner().into_iter().collect(), ..self }.cut(room, out);
        }
        let half = outer.count / 2;
        let part = |count| {
            let dim = Dim { count, ..outer };
            [dim].into_iter().chain(inner()).collect::<Dims>()
        };
        // Offsets inside the extents, which lie inside memory.
        let second = Self {
            from: self.from + half * outer.source_stride,
            into: self.into + half * outer.target_stride,
            dims: part(outer.count - half),
            ..self
        };
        Self { dims: part(half), ..self }.cut(room, out)?;
        second.cut(room, out)
    }

    fn cut_run(
        mut self,
        here: u64,
        room: &impl Fn(u64) -> Option<u64>,
        out: &mut Vec<Self>,
    ) -> Result<(), Uncut> {
        let mut here = here;
        while here < self.run {
            if !self.transform.takes(here) {
                return Err(Uncut::Element);
            }
            out.push(Self { run: here, dims: Dims::none(), ..self });
            self.from += here;
            self.into += self.transform.target_bytes(here);
            self.run -= here;
            here = room(self.from).ok_or(Uncut::Outside)?;
        }
        out.push(self);
        Ok(())
    }

    /// Cuts a plain copy where allocations end on the side that is written.
    pub(super) fn cut_target(
        mut self,
        room: &impl Fn(u64) -> Option<u64>,
        out: &mut Vec<Self>,
    ) -> Result<(), Uncut> {
        debug_assert!(self.is_plain(), "the kernel writes across allocations");
        loop {
            let here = room(self.into).ok_or(Uncut::Outside)?;
            if self.run <= here {
                out.push(self);
                return Ok(());
            }
            out.push(Self { run: here, dims: Dims::none(), ..self });
            self.from += here;
            self.into += here;
            self.run -= here;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use refit_planner::Dtype;

    use super::*;

    const CAST: Transform = Transform::Cast { from: Dtype::F32, to: Dtype::Bf16 };

    /// Allocations that touch, ending at these addresses, from 0 on.
    fn until(ends: &[u64]) -> impl Fn(u64) -> Option<u64> + '_ {
        |address| ends.iter().find(|&&end| address < end).map(|end| end - address)
    }

    /// Every element that moves: where from, and where to.
    fn elements(pieces: &[Piece]) -> Vec<(u64, u64)> {
        let mut all = Vec::new();
        for piece in pieces {
            let (from, to) = match piece.transform {
                Transform::Cast { from, to } => (from.size(), to.size()),
                _ => (1, 1),
            };
            for (source, target) in piece.dims.offsets() {
                all.extend(
                    (0..piece.run / from)
                        .map(|at| (piece.from + source + at * from, piece.into + target + at * to)),
                );
            }
        }
        all
    }

    fn piece(from: u64, run: u64, dims: &[(u64, u64, u64)], transform: Transform) -> Piece {
        let dims = dims.iter().map(|&(count, source_stride, target_stride)| Dim {
            count,
            source_stride,
            target_stride,
        });
        Piece { from, into: 10_000, run, dims: dims.collect(), transform }
    }

    #[test]
    fn what_lies_in_one_allocation_stays_as_it_is() {
        let whole = piece(10, 4, &[(8, 16, 4), (2, 8, 64)], Transform::Copy);
        let mut out = Vec::new();
        whole.clone().cut(&until(&[1000]), &mut out).unwrap();
        assert_eq!(out, [whole]);
    }

    #[test]
    fn patterns_are_cut_at_every_border_and_lose_nothing() {
        for (dims, run, transform) in [
            (vec![], 600, Transform::Copy),
            (vec![], 600, CAST),
            (vec![(37, 16, 12)], 12, Transform::Copy),
            (vec![(37, 16, 6)], 12, CAST),
            (vec![(5, 120, 200), (7, 16, 20)], 16, Transform::Copy),
            // The same bytes again and again, and backwards nested.
            (vec![(3, 0, 1000), (9, 64, 40)], 40, CAST),
        ] {
            let whole = piece(8, run, &dims, transform);
            let expected = elements(std::slice::from_ref(&whole));
            for ends in [vec![2000], vec![308, 2000], vec![12, 60, 64, 300, 304, 2000]] {
                let room = until(&ends);
                let mut out = Vec::new();
                whole.clone().cut(&room, &mut out).unwrap();
                for part in &out {
                    let extent = part.dims.source_extent(part.run);
                    assert!(extent <= room(part.from).unwrap(), "{part:?} crosses {ends:?}");
                }
                let found = elements(&out);
                assert_eq!(found.len(), expected.len(), "{dims:?} {ends:?}");
                let set: BTreeSet<_> = found.into_iter().collect();
                assert_eq!(set, expected.iter().copied().collect(), "{dims:?} {ends:?}");
            }
        }
    }

    #[test]
    fn a_border_costs_a_logarithm_of_the_runs() {
        let rows = piece(0, 512, &[(1 << 20, 1024, 512)], Transform::Copy);
        let mut out = Vec::new();
        rows.cut(&until(&[1 << 29, 1 << 40]), &mut out).unwrap();
        assert!(out.len() <= 40, "{} pieces", out.len());
    }

    #[test]
    fn borders_within_elements_and_bytes_outside_are_refused() {
        let mut out = Vec::new();
        let cast = piece(0, 64, &[], CAST);
        assert_eq!(cast.clone().cut(&until(&[30, 100]), &mut out), Err(Uncut::Element));
        assert_eq!(cast.clone().cut(&until(&[32]), &mut out), Err(Uncut::Outside));
        assert_eq!(
            piece(100, 4, &[], Transform::Copy).cut(&until(&[50]), &mut out),
            Err(Uncut::Outside)
        );
    }

    #[test]
    fn copies_are_cut_where_they_are_written_too() {
        let whole = piece(7, 100, &[], Transform::Copy);
        let mut out = Vec::new();
        let room = until(&[10_050, 10_051, 20_000]);
        whole.clone().cut_target(&room, &mut out).unwrap();
        let spans: Vec<_> = out.iter().map(|part| (part.from, part.into, part.run)).collect();
        assert_eq!(spans, [(7, 10_000, 50), (57, 10_050, 1), (58, 10_051, 49)]);
        assert_eq!(whole.cut_target(&until(&[10_050]), &mut out), Err(Uncut::Outside));
    }
}
