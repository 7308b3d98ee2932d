//! Random legal layouts: tensors cut into boxes along a grid, boxes stacked or interleaved into parameters, copies
//! on several ranks, padding that belongs to no tensor, mixed element types, element maps on either side.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::subsequence;
use refit::planner::{Band, Dtype, ElementMap, LayoutBuilder, Param, RankLayout};

/// A logical tensor, and how the sides store it.
#[derive(Clone, Debug)]
struct Shape {
    name: String,
    rows: u64,
    cols: u64,
    /// At most one of them maps.
    source_map: ElementMap,
    target_map: ElementMap,
    /// The source's type where one of them does: what a map gives depends on it.
    stored: Dtype,
}

impl Shape {
    fn map(&self, source: bool) -> ElementMap {
        if source { self.source_map } else { self.target_map }
    }

    fn is_mapped(&self) -> bool {
        (self.source_map, self.target_map) != (ElementMap::Identity, ElementMap::Identity)
    }
}

fn shape(index: usize) -> impl Strategy<Value = Shape> {
    let maps = prop_oneof![
        4 => Just((ElementMap::Identity, ElementMap::Identity)),
        1 => Just((ElementMap::AddOne, ElementMap::Identity)),
        1 => Just((ElementMap::Identity, ElementMap::NegExp)),
    ];
    let stored = prop_oneof![Just(Dtype::Bf16), Just(Dtype::F32)];
    (1u64..20, 1u64..10, maps, stored).prop_map(move |(rows, cols, maps, stored)| Shape {
        name: format!("tensor.{index}.weight"),
        rows,
        cols,
        source_map: maps.0,
        target_map: maps.1,
        stored,
    })
}

/// A box of tensor number `.0`.
#[derive(Clone, Debug)]
struct Piece(usize, std::ops::Range<u64>, std::ops::Range<u64>);

impl Piece {
    fn height(&self) -> u64 {
        self.1.end - self.1.start
    }

    fn width(&self) -> u64 {
        self.2.end - self.2.start
    }
}

/// A random model: every source rank's layout and every target rank's.
#[derive(Clone, Debug)]
pub struct Model {
    /// Source ranks; together they hold every element at least once.
    pub source: Vec<RankLayout>,
    /// Target ranks; each holds whatever it likes, tiled without gaps.
    pub target: Vec<RankLayout>,
}

/// Random models of 1 to 3 tensors, 1 to 4 source ranks and 1 to 3 target ranks.
pub fn model() -> impl Strategy<Value = Model> {
    (1usize..4)
        .prop_flat_map(|tensors| (0..tensors).map(shape).collect::<Vec<_>>())
        .prop_flat_map(|shapes| {
            let source = (1u32..5).prop_flat_map({
                let shapes = shapes.clone();
                move |ranks| side(shapes.clone(), ranks, true)
            });
            let target = (1u32..4).prop_flat_map({
                let shapes = shapes.clone();
                move |ranks| side(shapes.clone(), ranks, false)
            });
            (source, target)
        })
        .prop_map(|(source, target)| Model { source, target })
}

/// Cuts every tensor along a random grid and deals the boxes to ranks: a source deals every box to at least one.
fn side(shapes: Vec<Shape>, ranks: u32, source: bool) -> impl Strategy<Value = Vec<RankLayout>> {
    let grids: Vec<_> = shapes
        .iter()
        .enumerate()
        .map(|(index, shape)| grid(index, shape.rows, shape.cols))
        .collect();
    grids.prop_flat_map(move |grids| {
        let shapes = shapes.clone();
        let pieces: Vec<Piece> = grids.into_iter().flatten().collect();
        let all: Vec<u32> = (0..ranks).collect();
        let least = usize::from(source);
        let owners = vec(subsequence(all, least..=ranks as usize), pieces.len());
        let rank = move |rank: u32, owned: Vec<Piece>| params(shapes.clone(), rank, owned, source);
        (Just(pieces), owners).prop_flat_map(move |(pieces, owners)| {
            (0..ranks)
                .map(|number| {
                    let owned =
                        pieces.iter().zip(&owners).filter(|(_, owners)| owners.contains(&number));
                    rank(number, owned.map(|(piece, _)| piece.clone()).collect())
                })
                .collect::<Vec<_>>()
        })
    })
}

/// The boxes of a random grid over `rows` x `cols`.
fn grid(tensor: usize, rows: u64, cols: u64) -> impl Strategy<Value = Vec<Piece>> {
    (cuts(rows), cuts(cols)).prop_map(move |(rows, cols)| {
        rows.windows(2)
            .flat_map(|rows| {
                cols.windows(2).map(move |cols| Piece(tensor, rows[0]..rows[1], cols[0]..cols[1]))
            })
            .collect()
    })
}

/// `0`, some points in between, `len`: anywhere, or at equal distances as heads and shards are.
fn cuts(len: u64) -> impl Strategy<Value = Vec<u64>> {
    let inner: Vec<u64> = (1..len).collect();
    let most = inner.len().min(3);
    let anywhere =
        subsequence(inner, 0..=most).prop_map(move |inner| [vec![0], inner, vec![len]].concat());
    let even = (1..=len.min(3))
        .prop_map(move |step| (0..len.div_ceil(step)).map(|at| at * step).chain([len]).collect());
    prop_oneof![anywhere, even]
}

/// Packs a rank's boxes into parameters: shuffled, stacked where widths agree, sometimes two interleaved or side by
/// side where heights agree, padded with rows of nobody's (a source) or of zeros (a target).
fn params(
    shapes: Vec<Shape>,
    rank: u32,
    owned: Vec<Piece>,
    source: bool,
) -> impl Strategy<Value = RankLayout> {
    let count = owned.len();
    let dtypes = vec![Dtype::Bf16, Dtype::Bf16, Dtype::F32];
    let order = prop_oneof![Just(owned.clone()).boxed(), Just(owned).prop_shuffle().boxed()];
    (order, vec((any::<bool>(), 0u64..3, proptest::sample::select(dtypes), 0u8..3), count))
        .prop_map(move |(owned, coins)| {
            let mut builder = LayoutBuilder::new(rank);
            let ids: Vec<_> = shapes
                .iter()
                .map(|shape| builder.tensor(&shape.name, shape.rows, shape.cols).unwrap())
                .collect();
            let band = |piece: &Piece| Band::new(ids[piece.0], piece.1.clone(), piece.2.clone());
            let mut rest = owned.as_slice();
            let mut number = 0;
            while let Some((first, more)) = rest.split_first() {
                let (join, padding, dtype, form) = coins[number];
                let shape = &shapes[first.0];
                let dtype = if source && shape.is_mapped() { shape.stored } else { dtype };
                // A parameter has one map and one type: what is mapped keeps to itself.
                let alike = |piece: &Piece| {
                    piece.0 == first.0 || !(shape.is_mapped() || shapes[piece.0].is_mapped())
                };
                let name = format!("param.{number}");
                let partner = more.first().filter(|second| join && alike(second));
                let mut taken = 1;
                let (mut rows, mut cols) = (first.height(), first.width());
                let mut bands = vec![band(first)];
                match partner {
                    Some(second) if form == 0 && second.width() == cols => {
                        for piece in
                            more.iter().take_while(|piece| piece.width() == cols && alike(piece))
                        {
                            bands.push(band(piece).at(rows, 0));
                            rows += piece.height();
                            taken += 1;
                        }
                    }
                    Some(second)
                        if form == 1 && second.height() == rows && second.width() == cols =>
                    {
                        bands = vec![band(first).row_step(2), band(second).at(1, 0).row_step(2)];
                        rows *= 2;
                        taken = 2;
                    }
                    Some(second) if form == 2 && second.height() == rows => {
                        bands.push(band(second).at(0, cols));
                        cols += second.width();
                        taken = 2;
                    }
                    _ => {}
                }
                let mut param = Param::new(name, dtype, rows + padding, cols)
                    .map(shape.map(source))
                    .bands(bands);
                if padding > 0 && !source {
                    param = param.fill(rows..rows + padding, 0..cols);
                }
                builder.param(param).unwrap();
                rest = &rest[taken..];
                number += 1;
            }
            builder.build()
        })
}
