//! What a target would rather read in one piece, and what a source rank offers once it has copied that to slots.
//!
//! Where each of several targets wants some columns of a parameter that a source rank holds whole (row-parallel weights,
//! when the engine is cut finer than the trainer), a transport without strided reads has two bad choices: one read for
//! every row, or the neighbours' columns as well. [`wish`] finds those boxes in a lowered program. [`pack`] cuts a
//! source's layout along them: each box becomes a parameter of its own, a dense *slot*, and the rest stays where it is.
//! The result is a layout like any other; planning from it needs to know nothing of this.
//!
//! A slot is filled by one strided copy from the parameter it was cut from, and is stale whenever that changes.

mod cut;

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use self::cut::{Area, Block, is_contiguous};
use crate::layout::Band;
use crate::{
    Capabilities, Choice, Dim, Dims, LayoutBuilder, LayoutError, Method, Param, Program,
    RankLayout, Tensor,
};

/// Boxes that may be compared with boxes: some seconds. Engines that exist take thousands a rank.
const MAX_LOOKS: u64 = 1 << 28;

/// A box of a logical tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorSlice {
    /// Hugging Face name.
    pub tensor: Arc<str>,
    /// Logical rows.
    pub rows: Range<u64>,
    /// Logical columns.
    pub cols: Range<u64>,
}

/// What one target would rather read in one piece, and from whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Wish {
    /// The source ranks that hold some of it scattered, in ascending order, but for those that strided reads are made
    /// from: they are read well as they are.
    pub ranks: Vec<u32>,
    /// In the order in which the target keeps them.
    pub slices: Vec<TensorSlice>,
}

/// Why boxes cannot be asked for or packed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PackError {
    /// A program and layouts that do not belong together.
    #[error(
        "the program reads or writes `{param}`, which rank {rank} does not hold; it was made from other layouts"
    )]
    OtherLayouts {
        /// The rank.
        rank: u32,
        /// The parameter.
        param: Arc<str>,
    },
    /// A box that is empty or reaches outside its tensor.
    #[error(
        "rank {rank} cannot pack rows {rows:?}, columns {cols:?} of `{tensor}`, which has {tensor_rows} x {tensor_cols}; \
         do both sides run the same model?"
    )]
    OutsideTensor {
        /// The rank.
        rank: u32,
        /// The tensor.
        tensor: Arc<str>,
        /// Rows asked for.
        rows: Range<u64>,
        /// Columns asked for.
        cols: Range<u64>,
        /// Rows of the tensor.
        tensor_rows: u64,
        /// Columns of the tensor.
        tensor_cols: u64,
    },
    /// More boxes meet in one tensor than any engine asks for.
    #[error(
        "rank {rank}: too many boxes of `{tensor}` meet; let fewer differently cut engines ask for packing"
    )]
    TooComplex {
        /// The rank.
        rank: u32,
        /// The tensor.
        tensor: Arc<str>,
    },
    /// The packed layout is not one.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// A dense copy of a box of one of a rank's parameters: a parameter of the packed layout.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PackSlot {
    /// Its name in the packed layout.
    pub name: Arc<str>,
    /// Its size in bytes.
    pub bytes: u64,
    /// Index of the parameter it is copied from, in the layout that was packed.
    pub source: usize,
    /// Byte offset of the first run in that parameter.
    pub source_offset: u64,
    /// Bytes of one contiguous run.
    pub run: u64,
    /// How the run repeats, on either side. The slot is dense: its runs follow each other.
    pub dims: Dims,
}

/// A rank's layout with boxes cut out of its parameters and put into slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    layout: RankLayout,
    slots: Vec<PackSlot>,
}

impl Packed {
    /// What the rank offers: its slots, and what of its own parameters is not in them. Parameters without a rest are
    /// not there.
    #[must_use]
    pub fn layout(&self) -> &RankLayout {
        &self.layout
    }

    /// The slots, in the order in which targets keep what they hold: placed like that, reads of several join.
    #[must_use]
    pub fn slots(&self) -> &[PackSlot] {
        &self.slots
    }
}

/// The boxes that `program` reads badly: scattered in their source parameters, and therefore by one read for every run,
/// or together with bytes that nobody needs. `sources` are the layouts it was planned from; `link` says what the way to a
/// source rank can do.
///
/// What a target wishes for is a box of its own, whoever holds how much of it: copies of it are then cut alike, and it
/// does not matter which of them a plan chooses.
///
/// # Errors
/// [`PackError::OtherLayouts`] when program and layouts do not belong together, [`PackError::TooComplex`].
pub fn wish<'a>(
    program: &Program,
    target: &RankLayout,
    sources: impl IntoIterator<Item = &'a RankLayout>,
    link: impl Fn(u32) -> Capabilities,
) -> Result<Wish, PackError> {
    let sources: BTreeMap<u32, &RankLayout> =
        sources.into_iter().map(|layout| (layout.rank(), layout)).collect();
    let mut looks = Looks(MAX_LOOKS);
    let mut known = BTreeSet::new();
    let mut slices = Vec::new();
    for of_target in program.choices().chunk_by(|a, b| a.target == b.target) {
        let param = held(target, &program.targets()[of_target[0].target as usize].name)?;
        let mut wanted = BTreeSet::new();
        for choice in of_target {
            let from = &program.sources()[choice.source as usize];
            if link(from.rank).strided_reads {
                continue;
            }
            let other = || PackError::OtherLayouts { rank: from.rank, param: from.name.clone() };
            let source = *sources.get(&from.rank).ok_or_else(other)?;
            let meeting =
                Meeting::of(target, param, source, held(source, &from.name)?, &mut looks)?;
            if !is_good(choice, meeting.boxes) {
                wanted.extend(meeting.scattered);
            }
        }
        for band in wanted.into_iter().map(|band: usize| &param.bands[band]) {
            let Band { tensor, rows, cols, .. } = band;
            if known.insert((*tensor, rows.start, rows.end, cols.start, cols.end)) {
                slices.push(TensorSlice {
                    tensor: target.tensors()[tensor.0 as usize].name.clone(),
                    rows: rows.clone(),
                    cols: cols.clone(),
                });
            }
        }
    }
    let wanted = Wanted::new(&slices);
    let mut ranks = Vec::new();
    for (&rank, layout) in &sources {
        if !link(rank).strided_reads && wanted.finds_scattered(layout, &mut looks)? {
            ranks.push(rank);
        }
    }
    Ok(Wish { ranks, slices })
}

/// Whether the rank holds some of these boxes scattered: whether [`pack`] has anything to do.
///
/// # Errors
/// [`PackError::TooComplex`].
pub fn is_scattered<'a>(
    layout: &RankLayout,
    slices: impl IntoIterator<Item = &'a TensorSlice>,
) -> Result<bool, PackError> {
    Wanted::new(slices).finds_scattered(layout, &mut Looks(MAX_LOOKS))
}

/// Cuts a rank's layout along these boxes, of which it need not hold all or any. Where several overlap, slots are what
/// all of them can be put together from, so that no element is copied twice.
///
/// Boxes that lie in one piece already stay where they are. Packing what was packed for the same boxes changes nothing.
///
/// # Errors
/// [`PackError::OutsideTensor`], [`PackError::TooComplex`], and [`PackError::Layout`] where a parameter has the name of
/// a slot.
pub fn pack<'a>(
    layout: &RankLayout,
    slices: impl IntoIterator<Item = &'a TensorSlice>,
) -> Result<Packed, PackError> {
    let rank = layout.rank();
    let wanted = Wanted::new(slices);
    let mut looks = Looks(MAX_LOOKS);
    let mut builder = LayoutBuilder::new(rank);
    for Tensor { name, rows, cols } in layout.tensors() {
        // In the order of their numbers, so that bands keep theirs.
        builder.tensor(name, *rows, *cols)?;
        for (_, area) in wanted.of(name) {
            if area.is_empty() || area.rows.end > *rows || area.cols.end > *cols {
                return Err(PackError::OutsideTensor {
                    rank,
                    tensor: name.clone(),
                    rows: area.rows.clone(),
                    cols: area.cols.clone(),
                    tensor_rows: *rows,
                    tensor_cols: *cols,
                });
            }
        }
    }
    let mut slots = Vec::new();
    for (source, param) in layout.params().iter().enumerate() {
        let mut rest = Vec::with_capacity(param.bands.len());
        let before = slots.len();
        for band in &param.bands {
            let tensor = &layout.tensors()[band.tensor.0 as usize].name;
            let boxes = wanted.within(tensor, param, band, rank, &mut looks)?;
            let Some(boxes) = boxes else {
                rest.push(band.clone());
                continue;
            };
            let strips = 2 * boxes.len() as u64 + 1;
            looks.take(strips.saturating_mul(boxes.len() as u64), rank, tensor)?;
            let (blocks, left) = cut::cut(band, &boxes);
            rest.extend(left.iter().map(|area| area.of(band)));
            for Block { first, area } in blocks {
                let name: Arc<str> = format!("{}#{}", param.name, slots.len() - before).into();
                builder.param(slot_param(&name, param, band, &area))?;
                slots.push((first, slot(name, source, param, band, &area)));
            }
        }
        if slots.len() == before {
            builder.param(param.clone())?;
        } else if !rest.is_empty() {
            builder.param(Param { bands: rest, ..param.clone() })?;
        }
    }
    // Stable: parts of one box follow each other as they were found.
    slots.sort_by_key(|(first, _)| *first);
    let slots = slots.into_iter().map(|(_, slot)| slot).collect();
    Ok(Packed { layout: builder.build(), slots })
}

fn held<'a>(layout: &'a RankLayout, param: &Arc<str>) -> Result<&'a Param, PackError> {
    let other = || PackError::OtherLayouts { rank: layout.rank(), param: param.clone() };
    layout.param(param).ok_or_else(other)
}

/// Whether nothing is gained by packing what a choice reads: it moves what is needed, by one read for each of `boxes`,
/// or by few large ones that land from staging.
fn is_good(choice: &Choice, boxes: u64) -> bool {
    choice.wire_bytes <= choice.needed_bytes
        && (matches!(choice.method, Method::Span | Method::Gathered) || choice.reads <= boxes)
}

/// Where the bands of a target parameter meet those of a source parameter.
struct Meeting {
    /// How many boxes they have in common.
    boxes: u64,
    /// The target bands of which some lies scattered in the source parameter.
    scattered: Vec<usize>,
}

impl Meeting {
    fn of(
        target: &RankLayout,
        wanted: &Param,
        source: &RankLayout,
        held: &Param,
        looks: &mut Looks,
    ) -> Result<Self, PackError> {
        // Numbers are compared, not names: a fused parameter has hundreds of bands.
        let number = |band: &Band| {
            let name = &source.tensors()[band.tensor.0 as usize].name;
            target.tensors().binary_search_by(|tensor| tensor.name.cmp(name)).ok()
        };
        let held_bands: Vec<_> =
            held.bands.iter().filter_map(|band| Some((number(band)?, band))).collect();
        let mut meeting = Self { boxes: 0, scattered: Vec::new() };
        for (index, band) in wanted.bands.iter().enumerate() {
            let tensor = band.tensor.0 as usize;
            looks.take(held_bands.len() as u64, source.rank(), &target.tensors()[tensor].name)?;
            let mut scattered = false;
            for (_, other) in held_bands.iter().filter(|(number, _)| *number == tensor) {
                let common = Area::from(band).common(&Area::from(*other));
                if !common.is_empty() {
                    meeting.boxes += 1;
                    scattered |= !is_contiguous(held, other, &common);
                }
            }
            if scattered {
                meeting.scattered.push(index);
            }
        }
        Ok(meeting)
    }
}

/// Boxes by tensor, each with its number among all, without repetitions.
struct Wanted<'a>(BTreeMap<&'a str, Vec<(usize, Area)>>);

impl<'a> Wanted<'a> {
    fn new(slices: impl IntoIterator<Item = &'a TensorSlice>) -> Self {
        let mut tensors = BTreeMap::<&str, Vec<(usize, Area)>>::new();
        for (number, TensorSlice { tensor, rows, cols }) in slices.into_iter().enumerate() {
            let area = Area { rows: rows.clone(), cols: cols.clone() };
            tensors.entry(tensor).or_default().push((number, area));
        }
        for areas in tensors.values_mut() {
            areas.sort_by_key(|(number, area)| (area.key(), *number));
            areas.dedup_by(|next, kept| next.1 == kept.1);
        }
        Self(tensors)
    }

    fn of(&self, tensor: &str) -> &[(usize, Area)] {
        self.0.get(tensor).map_or(&[], Vec::as_slice)
    }

    /// What of the boxes lies in a band, or `None` where all of that is in one piece each.
    fn within(
        &self,
        tensor: &Arc<str>,
        param: &Param,
        band: &Band,
        rank: u32,
        looks: &mut Looks,
    ) -> Result<Option<Vec<(usize, Area)>>, PackError> {
        let wanted = self.of(tensor);
        looks.take(wanted.len() as u64, rank, tensor)?;
        let common = |(number, area): &(usize, Area)| (*number, area.common(&Area::from(band)));
        let within: Vec<_> =
            wanted.iter().map(common).filter(|(_, area)| !area.is_empty()).collect();
        let scattered = within.iter().any(|(_, area)| !is_contiguous(param, band, area));
        Ok(scattered.then_some(within))
    }

    fn finds_scattered(&self, layout: &RankLayout, looks: &mut Looks) -> Result<bool, PackError> {
        // Fewer look-ups than through the bands: most ranks that hold nothing are seen at once.
        let names = |tensor: &Tensor| self.0.contains_key(&*tensor.name);
        if self.0.is_empty() || !layout.tensors().iter().any(names) {
            return Ok(false);
        }
        for (param, tensor, band) in layout.bands() {
            if self.within(&tensor.name, param, band, layout.rank(), looks)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// What may still be compared.
struct Looks(u64);

impl Looks {
    fn take(&mut self, looks: u64, rank: u32, tensor: &Arc<str>) -> Result<(), PackError> {
        let too_complex = || PackError::TooComplex { rank, tensor: tensor.clone() };
        self.0 = self.0.checked_sub(looks).ok_or_else(too_complex)?;
        Ok(())
    }
}

fn slot_param(name: &Arc<str>, param: &Param, band: &Band, area: &Area) -> Param {
    let Area { rows, cols } = area;
    let (height, width) = (rows.end - rows.start, cols.end - cols.start);
    Param::new(name.clone(), param.dtype, height, width).map(param.map).band(Band::new(
        band.tensor,
        rows.clone(),
        cols.clone(),
    ))
}

/// The slot of an area of a band. It lies inside the parameter, whose bytes fit in 63 bits.
fn slot(name: Arc<str>, source: usize, param: &Param, band: &Band, area: &Area) -> PackSlot {
    let part = area.of(band);
    let (height, size) = (area.rows.end - area.rows.start, param.dtype.size());
    let run = (area.cols.end - area.cols.start) * size;
    let repetition = (height > 1).then(|| Dim {
        count: height,
        source_stride: band.row_step * param.cols * size,
        target_stride: run,
    });
    PackSlot {
        name,
        bytes: height * run,
        source,
        source_offset: (part.at_row * param.cols + part.at_col) * size,
        run,
        dims: repetition.into_iter().collect(),
    }
}
