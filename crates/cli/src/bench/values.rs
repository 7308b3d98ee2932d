//! What bench parameters hold: a function of the logical element and the cycle, written by sources and recomputed by
//! targets. Neither side asks the planner: each walks the bands of its own layout.
//!
//! Where a target stores other elements than a source, it recomputes what the source stored and converts that with the
//! host's reference, one row at a time.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use refit::RefitError;
use refit::planner::{
    Band, Dims, Dtype, ElementMap, Landing, Param, RankLayout, Tensor, Transform,
};
use refit::pool::Memory;
use refit::translate::host;
use refit_service::Stop;

use crate::device::Home;
use crate::error::CliError;
use crate::live::Checkpoint;
use crate::parallel;

/// Spreads neighbouring columns over all bits (2^32 / golden ratio).
const STEP: u32 = 0x9e37_79b9;

/// What one thread writes or compares at a time: small enough for its cache, large enough for a copy to a device.
const CHUNK_BYTES: u64 = 4 << 20;

/// What every logical tensor holds, from the layouts of all ranks: both sides make the same of them.
#[derive(Debug)]
pub(crate) struct Values {
    origins: BTreeMap<Arc<str>, Origin>,
    /// Where values come from that are not made from numbers.
    checkpoint: Option<Checkpoint>,
    stop: Stop,
}

/// Elements of a row of a tensor, from a column on.
struct Row<'a> {
    tensor: &'a Tensor,
    row: u64,
    col: u64,
    /// What they are made from, where they are made.
    seed: u32,
}

/// How the sources store a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Origin {
    dtype: Dtype,
    map: ElementMap,
    /// Whether some target stores it otherwise. Its elements are ordinary numbers then; what a conversion makes of
    /// infinities and NaNs is for other tests to say. Elements that are copied may have any bits.
    converted: bool,
}

impl Values {
    /// The values that these sources hold for these targets.
    ///
    /// # Errors
    /// [`CliError::Usage`] when two sources store one tensor in different ways, and where no conversion leads from a
    /// source to a target.
    pub(crate) fn new(sources: &[RankLayout], targets: &[RankLayout]) -> Result<Self, CliError> {
        let mut origins = BTreeMap::<Arc<str>, Origin>::new();
        for (param, tensor, _) in sources.iter().flat_map(RankLayout::bands) {
            let (dtype, map) = (param.dtype(), param.element_map());
            let origin = Origin { dtype, map, converted: false };
            if *origins.entry(tensor.name.clone()).or_insert(origin) != origin {
                let reason = "is stored in different ways by two source parameters";
                return Err(CliError::Usage(format!("`{}` {reason}", tensor.name)));
            }
        }
        for (param, tensor, _) in targets.iter().flat_map(RankLayout::bands) {
            let Some(origin) = origins.get_mut(&tensor.name) else { continue };
            origin.converted |= origin.transform(param)? != Transform::Copy;
        }
        Ok(Self { origins, checkpoint: None, stop: Stop::default() })
    }

    /// Writes and compares no more once this is told: [`CliError::Stopped`].
    pub(crate) fn heed(&mut self, stop: Stop) {
        self.stop = stop;
    }

    fn go_on(&self) -> Result<(), CliError> {
        if self.stop.is_told() { Err(CliError::Stopped) } else { Ok(()) }
    }

    /// Takes values from a checkpoint, whatever the cycle, from now on.
    ///
    /// # Errors
    /// [`CliError::Usage`] for a tensor that is not there as the sources store it.
    pub(crate) fn set_checkpoint(
        &mut self,
        sources: &[Tensor],
        checkpoint: Checkpoint,
    ) -> Result<(), CliError> {
        for tensor in sources {
            checkpoint.check(tensor, self.origin(tensor)?.dtype)?;
        }
        self.checkpoint = Some(checkpoint);
        Ok(())
    }

    /// Writes what a source stores of a row.
    fn write_row(&self, origin: Origin, row: &Row<'_>, into: &mut [u8]) -> Result<(), CliError> {
        match &self.checkpoint {
            None => write_row(origin, row.seed, into),
            Some(checkpoint) => checkpoint.read(row.tensor, (row.row, row.col), into)?,
        }
        Ok(())
    }

    fn origin(&self, tensor: &Tensor) -> Result<Origin, CliError> {
        let missing = || CliError::Usage(format!("no source holds `{}`", tensor.name));
        self.origins.get(&tensor.name).copied().ok_or_else(missing)
    }

    /// Writes the values of `cycle` into every parameter of a source, on some threads at once.
    pub(crate) fn fill<'a>(
        &self,
        home: &Home,
        layout: &RankLayout,
        params: impl Iterator<Item = (&'a str, &'a mut Memory)>,
        cycle: u64,
        threads: usize,
    ) -> Result<(), CliError> {
        let contents = contents(layout);
        let mut work = Vec::new();
        for (name, memory) in params {
            let content = contents.get(name).ok_or_else(stray)?;
            let rows = content.chunk_rows();
            let size = usize::try_from(rows * content.row_bytes()).unwrap_or(usize::MAX);
            let chunks = content.chunks(rows);
            work.extend(
                chunks.zip(home.parts(memory, size)?).map(|(rows, part)| (content, rows, part)),
            );
        }
        parallel::sum(threads, work, Vec::new, |scratch, (content, rows, part)| {
            self.go_on()?;
            home.generate(part, scratch, |bytes| {
                if content.described(&rows) < bytes.len() as u64 {
                    bytes.fill(0);
                }
                content.write_stored(self, &rows, cycle, bytes)
            })?;
            Ok(0)
        })?;
        Ok(())
    }

    /// Compares every byte of every parameter of a target with the values of `cycle`, and fills with zeros, on some
    /// threads at once.
    pub(crate) fn verify<'a>(
        &self,
        home: &Home,
        layout: &RankLayout,
        params: impl Iterator<Item = (&'a str, &'a Memory)>,
        cycle: u64,
        threads: usize,
    ) -> Result<u64, CliError> {
        let contents = contents(layout);
        let mut work = Vec::new();
        for (name, memory) in params {
            let content = contents.get(name).ok_or_else(stray)?;
            let chunks = content.chunks(content.chunk_rows());
            work.extend(chunks.map(|rows| (content, rows, memory)));
        }
        let verified = parallel::sum(
            threads,
            work,
            || (Vec::new(), Vec::new()),
            |(held, want), (content, rows, memory)| {
                self.go_on()?;
                let at = content.index(rows.start, 0);
                let held = home.read(memory, at..content.index(rows.end, 0), held)?;
                let described = content.described(&rows);
                if described != held.len() as u64 {
                    let (name, len) = (content.param.name(), held.len());
                    return Err(CliError::Mismatch(format!(
                        "`{name}`: only {described} of {len} bytes could be verified"
                    )));
                }
                want.resize(held.len(), 0);
                content.write_expected(self, &rows, cycle, want)?;
                if held == want.as_slice() {
                    return Ok(described);
                }
                let same = held.iter().zip(want.iter()).take_while(|(held, want)| held == want);
                Err(mismatch(content.param, at + same.count(), cycle))
            },
        )?;
        if verified != layout.bytes() {
            let bytes = layout.bytes();
            return Err(CliError::Mismatch(format!(
                "only {verified} of {bytes} bytes could be verified"
            )));
        }
        Ok(verified)
    }
}

impl Origin {
    /// What happens on the way into a parameter.
    fn transform(self, param: &Param) -> Result<Transform, CliError> {
        let map = match (self.map, param.element_map()) {
            (ElementMap::Identity, map) | (map, ElementMap::Identity) => Some(map),
            _ => None,
        };
        let transform = map.and_then(|map| Transform::mapping(map, self.dtype, param.dtype()));
        transform.ok_or_else(|| {
            let (name, from, to) = (param.name(), self.dtype, param.dtype());
            CliError::Usage(format!("`{name}`: there is no conversion from {from} to {to}"))
        })
    }
}

/// One parameter and what it is made of.
struct Content<'a> {
    param: &'a Param,
    bands: Vec<(&'a Tensor, &'a Band)>,
}

fn contents(layout: &RankLayout) -> BTreeMap<&str, Content<'_>> {
    let content = |param| Content { param, bands: Vec::new() };
    let mut contents: BTreeMap<&str, Content<'_>> =
        layout.params().iter().map(|param| (param.name().as_ref(), content(param))).collect();
    for (param, tensor, band) in layout.bands() {
        if let Some(content) = contents.get_mut(param.name().as_ref()) {
            content.bands.push((tensor, band));
        }
    }
    contents
}

impl Content<'_> {
    fn row_bytes(&self) -> u64 {
        self.param.cols() * self.param.dtype().size()
    }

    /// Whole rows in a chunk: at least one.
    fn chunk_rows(&self) -> u64 {
        (CHUNK_BYTES / self.row_bytes().max(1)).max(1)
    }

    /// The rows of the parameter, this many at a time. None where the parameter has no bytes.
    fn chunks(&self, rows: u64) -> impl Iterator<Item = Range<u64>> + use<> {
        let end = if self.row_bytes() == 0 { 0 } else { self.param.rows() };
        (0..end.div_ceil(rows)).map(move |chunk| chunk * rows..end.min((chunk + 1) * rows))
    }

    /// Byte index of a local element. Fits: the parameter is in memory.
    fn index(&self, row: u64, col: u64) -> usize {
        let element = row * self.param.cols() + col;
        usize::try_from(element * self.param.dtype().size()).unwrap_or(usize::MAX)
    }

    /// Bytes of these rows that bands and boxes of zeros describe. No two of them share one, or planning had refused.
    fn described(&self, rows: &Range<u64>) -> u64 {
        let bands = self.bands.iter().map(|(_, band)| {
            let (cols, steps) = (band.logical_cols(), steps(band, rows));
            (cols.end - cols.start) * (steps.end - steps.start)
        });
        let fills = self.param.fill_boxes().map(|(filled, cols)| {
            let height = filled.end.min(rows.end).saturating_sub(filled.start.max(rows.start));
            height * (cols.end - cols.start)
        });
        bands.chain(fills).sum::<u64>() * self.param.dtype().size()
    }

    /// Calls `write` with every row of every band in these rows and the place of its bytes among them.
    fn each_row(
        &self,
        rows: &Range<u64>,
        cycle: u64,
        values: &Values,
        mut write: impl FnMut(Origin, &Row<'_>, Range<usize>) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        for (tensor, band) in &self.bands {
            let ((at_row, at_col), cols) = (band.origin(), band.logical_cols());
            let origin = values.origin(tensor)?;
            let width = self.index(0, cols.end - cols.start);
            let name = name_hash(tensor, cycle);
            for step in steps(band, rows) {
                let local = at_row + step * band.step() - rows.start;
                let at = self.index(local, at_col);
                let (row, col) = (band.logical_rows().start + step, cols.start);
                let row = Row { tensor, row, col, seed: seed(name, row, col) };
                write(origin, &row, at..at + width)?;
            }
        }
        Ok(())
    }

    /// What a source stores in these rows.
    fn write_stored(
        &self,
        values: &Values,
        rows: &Range<u64>,
        cycle: u64,
        bytes: &mut [u8],
    ) -> Result<(), CliError> {
        self.each_row(rows, cycle, values, |origin, row, at| {
            values.write_row(origin, row, &mut bytes[at])
        })
    }

    /// What a target is to hold in these rows, all of which are described.
    fn write_expected(
        &self,
        values: &Values,
        rows: &Range<u64>,
        cycle: u64,
        bytes: &mut [u8],
    ) -> Result<(), CliError> {
        for (filled, cols) in self.param.fill_boxes() {
            for row in filled.start.max(rows.start)..filled.end.min(rows.end) {
                let local = row - rows.start;
                bytes[self.index(local, cols.start)..self.index(local, cols.end)].fill(0);
            }
        }
        let mut stored = Vec::new();
        self.each_row(rows, cycle, values, |origin, row, at| {
            let transform = origin.transform(self.param)?;
            if transform == Transform::Copy {
                return values.write_row(origin, row, &mut bytes[at]);
            }
            let run = at.len() as u64 / self.param.dtype().size() * origin.dtype.size();
            stored.resize(usize::try_from(run).unwrap_or(usize::MAX), 0);
            values.write_row(origin, row, &mut stored)?;
            let (offset, dims) = (at.start as u64, Dims::none());
            let landing = Landing { staging_offset: 0, target: 0, offset, run, dims, transform };
            host::land(&landing, &stored, bytes).map_err(RefitError::from)?;
            Ok(())
        })
    }
}

/// Which of a band's rows lie in these rows of its parameter, counted from its first.
fn steps(band: &Band, rows: &Range<u64>) -> Range<u64> {
    let ((at_row, _), height) = (band.origin(), band.logical_rows());
    let before = |row: u64| row.saturating_sub(at_row).div_ceil(band.step());
    let count = height.end - height.start;
    before(rows.start).min(count)..before(rows.end).min(count)
}

/// The elements of one row of a band.
fn write_row(origin: Origin, seed: u32, into: &mut [u8]) {
    match (origin.dtype, origin.converted) {
        (Dtype::F32, true) => elements(seed, into, |bits| number(bits, 23, 127).to_le_bytes()),
        (Dtype::Bf16, true) => elements(seed, into, |bits| upper(number(bits, 23, 127))),
        (Dtype::F16, true) => elements(seed, into, |bits| upper(number(bits, 26, 15))),
        (dtype, _) => match dtype.size() {
            1 => elements(seed, into, |bits| [bits.to_be_bytes()[0]]),
            2 => elements(seed, into, upper),
            4 => elements(seed, into, u32::to_le_bytes),
            _ => elements(seed, into, |bits| {
                ((u64::from(bits) << 32) | u64::from(bits.rotate_left(13))).to_le_bytes()
            }),
        },
    }
}

/// An arithmetic progression, which a compiler turns into vector additions.
fn elements<const N: usize>(seed: u32, into: &mut [u8], element: impl Fn(u32) -> [u8; N]) {
    for (col, into) in (0_u32..).zip(into.chunks_exact_mut(N)) {
        into.copy_from_slice(&element(seed.wrapping_add(col.wrapping_mul(STEP))));
    }
}

fn upper(bits: u32) -> [u8; 2] {
    let [_, _, low, high] = bits.to_le_bytes();
    [low, high]
}

/// A float between 2^-7 and 2 of either sign, whose fraction has `fraction` bits and whose exponent has this bias.
fn number(bits: u32, fraction: u32, bias: u32) -> u32 {
    let exponents = (0x7fff_ffff >> fraction) << fraction;
    let exponent = bias - 7 + ((bits >> fraction) & 7);
    (bits & !exponents) | (exponent << fraction)
}

/// Of a tensor in a cycle.
fn name_hash(tensor: &Tensor, cycle: u64) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    tensor.name.bytes().fold(cycle, step)
}

/// The starting point of a row from a column on (splitmix64).
#[allow(clippy::cast_possible_truncation, reason = "columns wrap around on purpose")]
fn seed(name: u64, row: u64, col: u64) -> u32 {
    let mut hash = name ^ row.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let row = u32::try_from(hash >> 32).unwrap_or_default();
    row.wrapping_add((col as u32).wrapping_mul(STEP))
}

fn stray() -> CliError {
    CliError::Usage("a rank holds a parameter that is not in its layout".to_owned())
}

fn mismatch(param: &Param, byte: usize, cycle: u64) -> CliError {
    CliError::Mismatch(format!("cycle {cycle}: `{}` is wrong from byte {byte} on", param.name()))
}

#[cfg(test)]
mod tests {
    use std::slice;

    use refit::planner::LayoutBuilder;

    use super::*;

    /// A parameter of 6 x 5 elements: a band of spread rows, another beside it, and zeros at the end.
    fn layout(dtype: Dtype, map: ElementMap, zeros: bool) -> RankLayout {
        let mut layout = LayoutBuilder::new(0);
        let (a, b) = (layout.tensor("a", 9, 4).unwrap(), layout.tensor("b", 9, 9).unwrap());
        let param = Param::new("p", dtype, 6, 5).map(map);
        let param = param
            .band(Band::new(a, 2..5, 1..4).row_step(2))
            .band(Band::new(b, 1..4, 0..3).at(1, 0).row_step(2));
        let param = if zeros { param.fill(0..6, 3..5) } else { param };
        layout.param(param).unwrap();
        layout.build()
    }

    fn of(source: &RankLayout, target: &RankLayout) -> Values {
        Values::new(slice::from_ref(source), slice::from_ref(target)).unwrap()
    }

    fn filled(values: &Values, layout: &RankLayout, threads: usize) -> Memory {
        let mut memory = Home::Host.separate(layout).unwrap().remove(0).1;
        values.fill(&Home::Host, layout, [("p", &mut memory)].into_iter(), 7, threads).unwrap();
        memory
    }

    fn verify(values: &Values, layout: &RankLayout, memory: &Memory, cycle: u64) -> bool {
        values.verify(&Home::Host, layout, [("p", memory)].into_iter(), cycle, 3).is_ok()
    }

    #[test]
    fn any_other_byte_and_any_other_cycle_is_found() {
        for dtype in [Dtype::U8, Dtype::F8E4m3, Dtype::Bf16, Dtype::F32, Dtype::I64] {
            let layout = layout(dtype, ElementMap::Identity, true);
            let values = of(&layout, &layout);
            let mut memory = filled(&values, &layout, 1);
            assert_eq!(memory.host_bytes(), filled(&values, &layout, 4).host_bytes());
            assert!(verify(&values, &layout, &memory, 7), "{dtype}");
            assert!(!verify(&values, &layout, &memory, 8), "{dtype}");
            for byte in 0..memory.len() {
                memory.host_bytes_mut().unwrap()[byte] ^= 1;
                assert!(!verify(&values, &layout, &memory, 7), "{dtype} {byte}");
                memory.host_bytes_mut().unwrap()[byte] ^= 1;
            }
            assert!(verify(&values, &layout, &memory, 7), "{dtype}");
        }
    }

    #[test]
    fn nothing_is_written_or_compared_once_it_is_told_to_stop() {
        let layout = layout(Dtype::Bf16, ElementMap::Identity, true);
        let mut values = of(&layout, &layout);
        let mut memory = filled(&values, &layout, 1);
        let stop = Stop::default();
        values.heed(stop.clone());
        assert!(verify(&values, &layout, &memory, 7));
        stop.tell(std::time::Instant::now());
        let params = || [("p", &memory)].into_iter();
        let verified = values.verify(&Home::Host, &layout, params(), 7, 2);
        assert!(matches!(verified, Err(CliError::Stopped)), "{verified:?}");
        let params = [("p", &mut memory)].into_iter();
        let filled = values.fill(&Home::Host, &layout, params, 8, 2);
        assert!(matches!(filled, Err(CliError::Stopped)), "{filled:?}");
    }

    /// What is computed by hand, from the elements that the source stores.
    #[test]
    fn conversions_are_those_of_the_elements() {
        type Expect = fn(f32) -> f32;
        let cases: [(Dtype, ElementMap, Dtype, ElementMap, Expect); 4] = [
            (Dtype::Bf16, ElementMap::Identity, Dtype::F32, ElementMap::Identity, |x| x),
            (Dtype::F32, ElementMap::Identity, Dtype::Bf16, ElementMap::Identity, |x| x),
            (Dtype::F32, ElementMap::AddOne, Dtype::F32, ElementMap::Identity, |x| x + 1.0),
            (Dtype::F32, ElementMap::Identity, Dtype::F32, ElementMap::NegExp, |x| -x.exp()),
        ];
        for (from, source_map, to, target_map, expect) in cases {
            let (source, target) = (layout(from, source_map, true), layout(to, target_map, true));
            let values = of(&source, &target);
            let stored = filled(&values, &source, 2);
            let numbers = |dtype: Dtype, bytes: &[u8]| -> Vec<f32> {
                let size = usize::try_from(dtype.size()).unwrap();
                let wide = |element: &[u8]| {
                    let mut bytes = [0; 4];
                    bytes[4 - size..].copy_from_slice(element);
                    f32::from_le_bytes(bytes)
                };
                bytes.chunks_exact(size).map(wide).collect()
            };
            let want: Vec<f32> = numbers(from, stored.host_bytes().unwrap());
            assert!(want.iter().all(|number| number.abs() < 2.0), "{from}: {want:?}");
            let mut got = vec![0; usize::try_from(target.bytes()).unwrap()];
            contents(&target)["p"].write_expected(&values, &(0..6), 7, &mut got).unwrap();
            for (index, (got, stored)) in numbers(to, &got).into_iter().zip(want).enumerate() {
                // Two columns of zeros, which nothing converts.
                let want = if index % 5 > 2 { 0.0 } else { expect(stored) };
                // Half a unit in the last place of a bf16 below 2, and what exponentials differ by.
                let near = if to == Dtype::Bf16 { 0.004 } else { 1e-6 };
                assert!((got - want).abs() <= near * want.abs(), "{from} {to} {got} {want}");
            }
        }
    }

    #[test]
    fn what_no_band_describes_is_zero_in_a_source_and_an_error_in_a_target() {
        let layout = layout(Dtype::Bf16, ElementMap::Identity, false);
        let values = Values::new(slice::from_ref(&layout), &[]).unwrap();
        let memory = filled(&values, &layout, 1);
        let bytes = memory.host_bytes().unwrap();
        assert!(bytes.chunks_exact(10).all(|row| row[6..] == [0; 4] && row[..6] != [0; 6]));
        let error = values
            .verify(&Home::Host, &layout, [("p", &memory)].into_iter(), 7, 1)
            .unwrap_err()
            .to_string();
        assert_eq!(error, "`p`: only 36 of 60 bytes could be verified");
    }

    #[test]
    fn sides_that_no_conversion_joins_are_refused() {
        let side = |dtype, map| [layout(dtype, map, true)];
        let refused = |source: [RankLayout; 1], target: [RankLayout; 1]| {
            Values::new(&source, &target).unwrap_err().to_string()
        };
        let (plain, map) = (ElementMap::Identity, ElementMap::NegExp);
        let error = refused(side(Dtype::Bf16, plain), side(Dtype::I32, plain));
        assert_eq!(error, "`p`: there is no conversion from BF16 to I32");
        let error = refused(side(Dtype::F32, map), side(Dtype::F32, map));
        assert_eq!(error, "`p`: there is no conversion from F32 to F32");
        let both = [layout(Dtype::F32, plain, true), layout(Dtype::Bf16, plain, true)];
        let error = Values::new(&both, &[]).unwrap_err().to_string();
        assert_eq!(error, "`a` is stored in different ways by two source parameters");
    }
}
