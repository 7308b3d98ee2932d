//! Cutting one band along boxes.

use alloc::vec::Vec;
use core::ops::Range;

use crate::Param;
use crate::layout::Band;

/// A box of a logical tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) rows: Range<u64>,
    pub(super) cols: Range<u64>,
}

impl From<&Band> for Area {
    fn from(band: &Band) -> Self {
        Self { rows: band.rows.clone(), cols: band.cols.clone() }
    }
}

impl Area {
    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty() || self.cols.is_empty()
    }

    pub(super) fn key(&self) -> [u64; 4] {
        [self.rows.start, self.cols.start, self.rows.end, self.cols.end]
    }

    pub(super) fn common(&self, other: &Self) -> Self {
        let common = |a: &Range<u64>, b: &Range<u64>| a.start.max(b.start)..a.end.min(b.end);
        Self { rows: common(&self.rows, &other.rows), cols: common(&self.cols, &other.cols) }
    }

    /// This part of a band, which contains it.
    pub(super) fn of(&self, band: &Band) -> Band {
        let down = (self.rows.start - band.rows.start) * band.row_step;
        let right = self.cols.start - band.cols.start;
        Band {
            rows: self.rows.clone(),
            cols: self.cols.clone(),
            at_row: band.at_row + down,
            at_col: band.at_col + right,
            ..band.clone()
        }
    }
}

/// A part of a band that gets a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Block {
    /// The least number of the boxes that want some of it.
    pub(super) first: usize,
    pub(super) area: Area,
}

/// Whether an area of a band lies in one piece in the band's parameter.
pub(super) fn is_contiguous(param: &Param, band: &Band, area: &Area) -> bool {
    let (height, width) = (area.rows.end - area.rows.start, area.cols.end - area.cols.start);
    height <= 1 || (band.row_step == 1 && width == param.cols)
}

/// Cuts a band along numbered boxes, which lie inside it: what they want, and what is left.
///
/// Columns are cut wherever a box begins or ends; rows need no cut between boxes, because rows of a dense block follow
/// each other. So every box is a number of blocks, or of whole rows of them.
pub(super) fn cut(band: &Band, boxes: &[(usize, Area)]) -> (Vec<Block>, Vec<Area>) {
    let ends = |area: &Area| [area.cols.start, area.cols.end];
    let mut cuts: Vec<u64> = boxes.iter().flat_map(|(_, area)| ends(area)).collect();
    cuts.extend(ends(&Area::from(band)));
    cuts.sort_unstable();
    cuts.dedup();

    let (mut blocks, mut rest) = (Vec::new(), Vec::new());
    for pair in cuts.windows(2) {
        let cols = pair[0]..pair[1];
        let over = |area: &Area| area.cols.start <= cols.start && cols.end <= area.cols.end;
        let mut wanted: Vec<(&Range<u64>, usize)> = boxes
            .iter()
            .filter(|(_, area)| over(area))
            .map(|(number, area)| (&area.rows, *number))
            .collect();
        wanted.sort_unstable_by_key(|(rows, number)| (rows.start, rows.end, *number));
        let mut row = band.rows.start;
        let of_strip = blocks.len();
        for (rows, number) in wanted {
            match blocks.get_mut(of_strip..).and_then(<[Block]>::last_mut) {
                Some(last) if rows.start <= last.area.rows.end => {
                    last.first = last.first.min(number);
                    last.area.rows.end = last.area.rows.end.max(rows.end);
                    row = last.area.rows.end;
                }
                _ => {
                    if row < rows.start {
                        rest.push(Area { rows: row..rows.start, cols: cols.clone() });
                    }
                    row = rows.end;
                    let area = Area { rows: rows.clone(), cols: cols.clone() };
                    blocks.push(Block { first: number, area });
                }
            }
        }
        if row < band.rows.end {
            rest.push(Area { rows: row..band.rows.end, cols });
        }
    }
    (blocks, rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dtype, LayoutBuilder};

    fn band(rows: Range<u64>, cols: Range<u64>) -> Band {
        let tensor = LayoutBuilder::new(0).tensor("w", 100, 100).unwrap();
        Band::new(tensor, rows, cols)
    }

    fn area(rows: Range<u64>, cols: Range<u64>) -> Area {
        Area { rows, cols }
    }

    fn block(first: usize, rows: Range<u64>, cols: Range<u64>) -> Block {
        Block { first, area: area(rows, cols) }
    }

    #[test]
    fn even_and_uneven_shares_are_blocks() {
        let band = band(0..10, 20..32);
        let halves = [(0, area(0..10, 20..26)), (1, area(0..10, 26..32))];
        let (blocks, rest) = cut(&band, &halves);
        assert_eq!(blocks, [block(0, 0..10, 20..26), block(1, 0..10, 26..32)]);
        assert_eq!(rest, []);
        // Halves and thirds: what both can be put together from.
        let thirds = [(2, area(0..10, 20..24)), (3, area(0..10, 24..28)), (4, area(0..10, 28..32))];
        let (blocks, rest) = cut(&band, &[halves.as_slice(), &thirds].concat());
        let cols: Vec<_> = blocks.iter().map(|block| block.area.cols.clone()).collect();
        assert_eq!(cols, [20..24, 24..26, 26..28, 28..32]);
        assert_eq!(blocks.iter().map(|block| block.first).collect::<Vec<_>>(), [0, 0, 1, 1]);
        assert_eq!(rest, []);
    }

    #[test]
    fn what_nobody_wants_is_left() {
        let band = band(5..15, 0..8);
        let (blocks, rest) =
            cut(&band, &[(0, area(7..9, 2..4)), (1, area(8..12, 2..4)), (2, area(13..14, 2..4))]);
        assert_eq!(blocks, [block(0, 7..12, 2..4), block(2, 13..14, 2..4)]);
        let left = [
            area(5..15, 0..2),
            area(5..7, 2..4),
            area(12..13, 2..4),
            area(14..15, 2..4),
            area(5..15, 4..8),
        ];
        assert_eq!(rest, left);
    }

    #[test]
    fn a_part_of_a_band_is_where_it_was() {
        let spread = band(10..20, 4..8).at(1, 3).row_step(3);
        let part = area(12..14, 6..8).of(&spread);
        assert_eq!((part.origin(), part.step()), ((7, 5), 3));
        assert_eq!((part.logical_rows(), part.logical_cols()), (12..14, 6..8));
    }

    #[test]
    fn whole_rows_and_single_rows_are_in_one_piece() {
        let param = Param::new("p", Dtype::Bf16, 30, 4);
        let (dense, spread) = (band(0..10, 0..4), band(0..10, 0..4).row_step(2));
        for (band, part, wanted) in [
            (&dense, area(2..7, 0..4), true),
            (&dense, area(2..7, 0..3), false),
            (&dense, area(2..3, 0..3), true),
            (&spread, area(2..4, 0..4), false),
            (&spread, area(2..3, 1..2), true),
        ] {
            assert_eq!(is_contiguous(&param, band, &part), wanted, "{part:?}");
        }
        let apart = area(0..4, 0..2).common(&area(2..6, 3..5));
        assert!(apart.is_empty() && area(0..0, 1..2).is_empty() && !area(0..1, 1..2).is_empty());
    }
}
