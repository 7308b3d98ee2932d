//! Every source rank's layout, indexed by logical tensor.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::borrow::Borrow;
use core::ops::Range;

use crate::names::Names;
use crate::{Dtype, ElementMap, Hash, LayoutError, RankLayout, Tensor};

/// The layouts of all source ranks, joined and indexed. Built once, used to plan every target rank.
///
/// Ranks whose layouts are equal, as data-parallel copies are, form one class and are indexed once. Boxes of a tensor
/// that several classes hold (a norm that every rank of a tensor-parallel group has) are indexed as one shard with
/// several owners. The order in which ranks are given does not matter.
#[derive(Clone, Debug)]
pub struct SourceLayout {
    classes: Vec<Class>,
    /// Sorted, and in the order of the tensors.
    names: Names,
    tensors: Vec<Held>,
    /// Sorted by tensor, then by box.
    shards: Vec<Shard>,
    /// Sorted within each shard.
    owners: Vec<Owner>,
}

/// Ranks with equal layouts.
#[derive(Clone, Debug)]
pub(crate) struct Class {
    /// In ascending order; at least one.
    pub(crate) ranks: Vec<u32>,
    /// In the order of the layout's.
    pub(crate) params: Vec<ClassParam>,
    /// The tensors that the layout names, as numbers among all, in ascending order.
    tensors: Vec<usize>,
}

/// What planning needs to know of a source parameter.
#[derive(Clone, Debug)]
pub(crate) struct ClassParam {
    pub(crate) name: Arc<str>,
    pub(crate) cols: u64,
    pub(crate) bytes: u64,
}

/// A logical tensor that at least one source rank holds some of.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) rows: u64,
    pub(crate) cols: u64,
    shards: Range<usize>,
}

/// A box of a logical tensor that one or more classes hold.
#[derive(Clone, Debug)]
pub(crate) struct Shard {
    pub(crate) rows: Range<u64>,
    pub(crate) cols: Range<u64>,
    /// How many ranks hold it.
    pub(crate) copies: usize,
    owners: Range<usize>,
}

/// A class that holds a shard, and where in its parameter the shard lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Owner {
    pub(crate) class: u32,
    pub(crate) param: u32,
    pub(crate) dtype: Dtype,
    pub(crate) map: ElementMap,
    pub(crate) at_row: u64,
    pub(crate) at_col: u64,
    pub(crate) row_step: u64,
}

impl Owner {
    /// The parameter: what must agree for two shards to be read from one rank as one.
    pub(crate) fn param(&self) -> (u32, u32) {
        (self.class, self.param)
    }
}

impl SourceLayout {
    /// Joins the layouts of all source ranks.
    ///
    /// # Errors
    /// [`LayoutError::DuplicateRank`], [`LayoutError::TensorShape`] when ranks disagree about a tensor, and
    /// [`LayoutError::TooMany`].
    pub fn new(
        layouts: impl IntoIterator<Item = impl Borrow<RankLayout>>,
    ) -> Result<Self, LayoutError> {
        let mut known = BTreeMap::<Hash, usize>::new();
        let mut classes = Vec::<Distinct>::new();
        for layout in layouts {
            let layout = layout.borrow();
            let class = *known.entry(layout.digest).or_insert(classes.len());
            match classes.get_mut(class) {
                Some(class) => class.ranks.push(layout.rank),
                None => classes.push(Distinct::new(layout)?),
            }
        }
        // By lowest rank: the numbers of classes do not depend on the order of the input.
        classes.iter_mut().for_each(|class| class.ranks.sort_unstable());
        classes.sort_unstable_by_key(|class| class.ranks[0]);
        let mut ranks: Vec<u32> = classes.iter().flat_map(|class| &class.ranks).copied().collect();
        ranks.sort_unstable();
        if let Some(pair) = ranks.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(LayoutError::DuplicateRank { rank: pair[0] });
        }
        Self::index(classes)
    }

    fn index(classes: Vec<Distinct>) -> Result<Self, LayoutError> {
        let (names, mut tensors, numbers) = declare(&classes)?;
        let mut boxes = Vec::with_capacity(classes.iter().map(|class| class.boxes.len()).sum());
        let mut indexed = Vec::with_capacity(classes.len());
        for (number, (class, numbers)) in classes.into_iter().zip(numbers).enumerate() {
            let rank = class.ranks[0];
            let number = u32::try_from(number).map_err(|_| LayoutError::TooMany { rank })?;
            boxes.extend(class.boxes.into_iter().map(|mut held| {
                held.tensor = numbers[held.tensor];
                held.owner.class = number;
                held
            }));
            indexed.push(Class { ranks: class.ranks, params: class.params, tensors: numbers });
        }
        // Equal boxes become neighbours.
        boxes.sort_unstable_by_key(HeldBox::key);

        let mut shards = Vec::<Shard>::new();
        let mut owners = Vec::with_capacity(boxes.len());
        for of_tensor in boxes.chunk_by(|a, b| a.tensor == b.tensor) {
            let first = shards.len();
            for equal in of_tensor.chunk_by(|a, b| a.rows == b.rows && a.cols == b.cols) {
                let start = owners.len();
                owners.extend(equal.iter().map(|held| held.owner));
                let copies = |owner: &Owner| indexed[owner.class as usize].ranks.len();
                shards.push(Shard {
                    rows: equal[0].rows.clone(),
                    cols: equal[0].cols.clone(),
                    copies: owners[start..].iter().map(copies).sum(),
                    owners: start..owners.len(),
                });
            }
            tensors[of_tensor[0].tensor].shards = first..shards.len();
        }
        Ok(Self { classes: indexed, names, tensors, shards, owners })
    }

    pub(crate) fn classes(&self) -> &[Class] {
        &self.classes
    }

    /// For each of `wanted`, which are sorted by name, the tensor of this name that some source rank holds.
    pub(crate) fn find(&self, wanted: &[Tensor]) -> Vec<Option<&Held>> {
        // What follows a tensor on a target rank mostly follows it on some source rank too, so that is tried first.
        let mut guesses: &[usize] = &[];
        let mut at = 0;
        let find = |wanted: &Tensor| {
            if let Some((&guess, rest)) = guesses.split_first()
                && *self.names.get(guess) == *wanted.name
            {
                (guesses, at) = (rest, guess + 1);
                return Some(&self.tensors[guess]);
            }
            at += self.names.less(at, &wanted.name);
            if at == self.names.len() || *self.names.get(at) != *wanted.name {
                return None;
            }
            let held = &self.tensors[at];
            let holder = self.shards_of(held).first().map(|shard| self.owners_of(shard)[0].class);
            guesses = holder.map_or(&[], |class| {
                let all = &self.classes[class as usize].tensors;
                &all[all.partition_point(|&number| number <= at)..]
            });
            Some(held)
        };
        wanted.iter().map(find).collect()
    }

    pub(crate) fn shards_of(&self, held: &Held) -> &[Shard] {
        &self.shards[held.shards.clone()]
    }

    pub(crate) fn owners_of(&self, shard: &Shard) -> &[Owner] {
        &self.owners[shard.owners.clone()]
    }

    pub(crate) fn param_of(&self, owner: &Owner) -> &ClassParam {
        &self.classes[owner.class as usize].params[owner.param as usize]
    }
}

/// A class that is still alone: its tensors and itself are not numbered yet.
struct Distinct {
    ranks: Vec<u32>,
    /// Of its tensors, sorted.
    names: Names,
    shapes: Vec<(u64, u64)>,
    params: Vec<ClassParam>,
    boxes: Vec<HeldBox>,
}

/// A box of a tensor, number `tensor` of the class's or, later, of all.
struct HeldBox {
    tensor: usize,
    rows: Range<u64>,
    cols: Range<u64>,
    owner: Owner,
}

impl HeldBox {
    fn key(&self) -> (usize, u64, u64, u64, u64, Owner) {
        let Self { tensor, rows, cols, owner } = self;
        (*tensor, rows.start, cols.start, rows.end, cols.end, *owner)
    }
}

impl Distinct {
    fn new(layout: &RankLayout) -> Result<Self, LayoutError> {
        let params = layout.params.iter().map(|param| ClassParam {
            name: param.name.clone(),
            cols: param.cols,
            bytes: param.bytes(),
        });
        let mut boxes = Vec::with_capacity(layout.params.len());
        for (index, param) in layout.params.iter().enumerate() {
            let index =
                u32::try_from(index).map_err(|_| LayoutError::TooMany { rank: layout.rank })?;
            boxes.extend(param.bands.iter().map(|band| HeldBox {
                tensor: band.tensor.0 as usize,
                rows: band.rows.clone(),
                cols: band.cols.clone(),
                owner: Owner {
                    class: 0,
                    param: index,
                    dtype: param.dtype,
                    map: param.map,
                    at_row: band.at_row,
                    at_col: band.at_col,
                    row_step: band.row_step,
                },
            }));
        }
        Ok(Self {
            ranks: alloc::vec![layout.rank],
            names: layout.tensors.iter().map(|tensor| tensor.name.as_ref()).collect(),
            shapes: layout.tensors.iter().map(|tensor| (tensor.rows, tensor.cols)).collect(),
            params: params.collect(),
            boxes,
        })
    }
}

/// The names of all tensors, sorted; the tensors, still without their shards; and for each class the numbers that its
/// own have among them.
type Declared = (Names, Vec<Held>, Vec<Vec<usize>>);

fn declare(classes: &[Distinct]) -> Result<Declared, LayoutError> {
    let mut declared = Vec::with_capacity(classes.iter().map(|class| class.names.len()).sum());
    for (number, class) in classes.iter().enumerate() {
        declared
            .extend((0..class.names.len()).map(|local| (class.names.get(local), number, local)));
    }
    // Stable, because it finds the runs that are in order already: the tensors of a class are.
    declared.sort_by(|a, b| a.0.cmp(b.0));
    let (mut names, mut tensors) = (Names::default(), Vec::new());
    let mut numbers: Vec<Vec<usize>> =
        classes.iter().map(|class| alloc::vec![0; class.names.len()]).collect();
    for same in declared.chunk_by(|a, b| a.0 == b.0) {
        let (name, declarer, local) = same[0];
        let (rows, cols) = classes[declarer].shapes[local];
        for &(_, class, local) in same {
            let (other_rows, other_cols) = classes[class].shapes[local];
            if (other_rows, other_cols) != (rows, cols) {
                return Err(LayoutError::TensorShape {
                    rank: classes[declarer].ranks[0],
                    tensor: name.into(),
                    rows,
                    cols,
                    other_rows,
                    other_cols,
                });
            }
            numbers[class][local] = tensors.len();
        }
        names.push(name);
        tensors.push(Held { rows, cols, shards: 0..0 });
    }
    Ok((names, tensors, numbers))
}
