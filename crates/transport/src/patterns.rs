//! Strided patterns of bytes, and whether they share any. A row-parallel parameter is hundreds of thousands of rows; here
//! it is one pattern, and comparing two of them takes no list of rows.

use refit_planner::Dims;
use refit_pool::MemoryKind;

/// Bytes of local memory that one read writes: a run, repeated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Where the memory lives.
    pub kind: MemoryKind,
    /// First address.
    pub address: u64,
    /// Bytes of one run, as they are written.
    pub run: u64,
    /// How the run repeats; target strides count.
    pub dims: Dims,
}

/// Patterns in flight at one address beyond which pairs are no longer compared one by one.
const MOST_PAIRS: usize = 64;

/// Runs, of one pattern or of all together, that are listed to compare them. Boxes of tensors repeat one within the other, which takes no
/// list, whatever their number.
const MOST_LISTED: u64 = 1 << 24;

impl Written {
    /// A contiguous range.
    #[must_use]
    pub fn range(kind: MemoryKind, address: u64, len: u64) -> Self {
        Self { kind, address, run: len, dims: Dims::none() }
    }

    /// One past the last address (saturating).
    #[must_use]
    pub fn end(&self) -> u64 {
        self.address.saturating_add(self.dims.target_extent(self.run))
    }

    /// Bytes written (saturating).
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.run.saturating_mul(self.dims.runs())
    }

    /// Whether the pattern writes a byte twice. One that may, and has too many runs to look, counts as one that does.
    pub(crate) fn overlaps_itself(&self) -> bool {
        let strides = self.strides();
        if nested(&strides, self.run) {
            return false;
        }
        if self.bytes() > self.dims.target_extent(self.run) || self.dims.runs() > MOST_LISTED {
            return true;
        }
        let mut starts: Vec<u64> = self.dims.offsets().map(|(_, offset)| offset).collect();
        starts.sort_unstable();
        starts.windows(2).any(|pair| pair[1] - pair[0] < self.run)
    }

    /// Whether two patterns, neither of which overlaps itself, write the same byte. Takes a few steps where both repeat
    /// alike, as the shards of one parameter do, and as many as the shorter one has runs where not.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        if self.kind != other.kind || self.end() <= other.address || other.end() <= self.address {
            return false;
        }
        let (first, second) =
            if self.address <= other.address { (self, other) } else { (other, self) };
        let (a, b) = (first.strides(), second.strides());
        if apart((&a, first.run), (&b, second.run), second.address - first.address) {
            return false;
        }
        let (few, many) =
            if self.dims.runs() <= other.dims.runs() { (self, other) } else { (other, self) };
        let strides = many.strides();
        few.dims.offsets().any(|(_, offset)| {
            let start = few.address + offset;
            let end = start + few.run;
            // In offsets of `many`; what lies before its first byte cannot be met.
            end > many.address
                && hits(&strides, many.run, start.saturating_sub(many.address), end - many.address)
        })
    }

    /// Counts and strides, the longest stride first.
    fn strides(&self) -> Vec<(u64, u64)> {
        let mut strides: Vec<(u64, u64)> = self
            .dims
            .as_slice()
            .iter()
            .filter(|dim| dim.count > 1)
            .map(|dim| (dim.target_stride, dim.count))
            .collect();
        strides.sort_unstable_by(|a, b| b.cmp(a));
        strides
    }
}

type Strides<'a> = &'a [(u64, u64)];

fn extent(strides: Strides<'_>, run: u64) -> u64 {
    strides.iter().fold(run, |extent, &(stride, count)| {
        extent.saturating_add((count - 1).saturating_mul(stride))
    })
}

/// Whether each repetition steps over everything inside it: then no byte is written twice.
fn nested(strides: Strides<'_>, run: u64) -> bool {
    (0..strides.len()).all(|dim| extent(&strides[dim + 1..], run) <= strides[dim].0)
}

/// Whether a pattern at 0 and one at `distance` are seen to share no byte because they repeat alike. `false` proves
/// nothing.
fn apart(first: (Strides<'_>, u64), second: (Strides<'_>, u64), distance: u64) -> bool {
    if distance >= extent(first.0, first.1) {
        return true;
    }
    let ([(stride, _), rest @ ..], [(same, _), other @ ..]) = (first.0, second.0) else {
        return false;
    };
    // Where both repeat by one stride, what counts is their distance within a step, forwards and round the corner.
    let (mine, theirs) = (extent(rest, first.1), extent(other, second.1));
    if stride != same || *stride == 0 || mine > *stride || theirs > *stride {
        return false;
    }
    let ahead = distance % stride;
    apart((rest, first.1), (other, second.1), ahead)
        && apart((other, second.1), (rest, first.1), stride - ahead)
}

/// Whether the pattern at 0 writes any of the bytes from `start` to `end`.
fn hits(strides: Strides<'_>, run: u64, start: u64, end: u64) -> bool {
    let [(stride, count), inner @ ..] = strides else { return start < run && end > 0 };
    let inside = extent(inner, run);
    // Steps that begin before the end and end behind the start.
    let first = if start < inside { 0 } else { (start - inside) / stride + 1 };
    let last = (end - 1) / stride;
    (first..=last.min(count - 1)).any(|step| {
        let at = step * stride;
        end > at && hits(inner, run, start.saturating_sub(at), end - at)
    })
}

/// Two of these patterns that share a byte, by what they are tagged with. They are sorted by kind and address, and none
/// overlaps itself.
pub(crate) fn shared<T: Copy>(patterns: &[(&Written, T)]) -> Option<(T, T)> {
    let runs =
        patterns.iter().fold(0, |runs: u64, (pattern, _)| runs.saturating_add(pattern.dims.runs()));
    let mut open: Vec<(&Written, T)> = Vec::new();
    for &(pattern, tag) in patterns {
        open.retain(|(earlier, _)| earlier.kind == pattern.kind && earlier.end() > pattern.address);
        if open.len() > MOST_PAIRS && runs <= MOST_LISTED {
            return shared_runs(patterns);
        }
        if let Some(&(_, other)) = open.iter().find(|(earlier, _)| earlier.overlaps(pattern)) {
            return Some((other, tag));
        }
        open.push((pattern, tag));
    }
    None
}

/// The same by listing every run, for patterns that are interleaved too finely to compare in pairs.
fn shared_runs<T: Copy>(patterns: &[(&Written, T)]) -> Option<(T, T)> {
    let mut runs: Vec<(MemoryKind, u64, u64, usize)> = Vec::new();
    for (index, (pattern, _)) in patterns.iter().enumerate() {
        runs.extend(pattern.dims.offsets().map(|(_, offset)| {
            let start = pattern.address + offset;
            (pattern.kind, start, start + pattern.run, index)
        }));
    }
    runs.sort_unstable();
    let pair = runs.windows(2).find(|pair| pair[0].0 == pair[1].0 && pair[1].1 < pair[0].2)?;
    Some((patterns[pair[0].3].1, patterns[pair[1].3].1))
}

#[cfg(test)]
mod tests {
    use refit_planner::Dim;

    use super::*;

    const KIND: MemoryKind = MemoryKind::Host;

    fn pattern(address: u64, run: u64, dims: &[(u64, u64)]) -> Written {
        let dims = dims
            .iter()
            .map(|&(count, target_stride)| Dim { count, source_stride: 1, target_stride })
            .collect();
        Written { kind: KIND, address, run, dims }
    }

    /// Every byte, one by one.
    fn bytes(pattern: &Written) -> Vec<u64> {
        let mut bytes: Vec<u64> = pattern
            .dims
            .offsets()
            .flat_map(|(_, offset)| {
                (0..pattern.run).map(move |byte| pattern.address + offset + byte)
            })
            .collect();
        bytes.sort_unstable();
        bytes
    }

    /// All small patterns against all others, byte by byte.
    #[test]
    fn small_patterns_overlap_where_their_bytes_do() {
        let dims: Vec<Vec<(u64, u64)>> = vec![
            vec![],
            vec![(2, 3)],
            vec![(3, 4)],
            vec![(3, 2)],
            vec![(2, 12), (3, 4)],
            vec![(3, 4), (2, 12)],
            vec![(2, 6), (2, 3)],
            vec![(4, 5)],
            vec![(1, 7)],
        ];
        let mut patterns = Vec::new();
        for address in 100..108 {
            for run in 1..4 {
                for dims in &dims {
                    let pattern = pattern(address, run, dims);
                    let bytes = bytes(&pattern);
                    let twice = bytes.windows(2).any(|pair| pair[0] == pair[1]);
                    assert_eq!(pattern.overlaps_itself(), twice, "{pattern:?}");
                    if !twice {
                        patterns.push((pattern, bytes));
                    }
                }
            }
        }
        for (a, a_bytes) in &patterns {
            for (b, b_bytes) in &patterns {
                let common = a_bytes.iter().any(|byte| b_bytes.binary_search(byte).is_ok());
                assert_eq!(a.overlaps(b), common, "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn columns_of_one_parameter_are_compared_without_their_rows() {
        let rows = 1 << 40;
        let columns = |first: u64, width: u64| pattern((1 << 20) + first, width, &[(rows, 4096)]);
        assert!(!columns(0, 1024).overlaps(&columns(1024, 3072)));
        assert!(columns(0, 1024).overlaps(&columns(1023, 1)));
        assert!(!columns(0, 4096).overlaps_itself());
        assert!(pattern(1, 4097, &[(rows, 4096)]).overlaps_itself());
        // Rows in steps of 6 and within them of 4: no byte twice, and nothing but a list would tell.
        assert!(!pattern(1, 1, &[(3, 4), (1 << 20, 6)]).overlaps_itself());
        assert!(pattern(1, 1, &[(3, 4), (rows, 6)]).overlaps_itself());
    }

    #[test]
    fn many_interleaved_patterns_are_compared_by_their_runs() {
        let column = |index: u64| pattern(1000 + 2 * index, 2, &[(50, 400)]);
        let mut columns: Vec<Written> = (0..200).map(column).collect();
        let tagged = |columns: &[Written]| {
            let tagged: Vec<(&Written, usize)> =
                columns.iter().enumerate().map(|(index, column)| (column, index)).collect();
            shared(&tagged)
        };
        assert_eq!(tagged(&columns), None);
        columns[199].address -= 1;
        assert_eq!(tagged(&columns), Some((198, 199)));
    }
}
