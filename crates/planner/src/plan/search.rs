//! Finding the shard that covers most of an area without looking at all of them.

use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use super::budget::Budget;
use super::pieces::Area;
use crate::PlanError;
use crate::layout::{Param, TensorId};
use crate::source::Shard;

/// Shards in one leaf. Tensors with fewer need no tree.
const LEAF: usize = 8;

/// What one plan has learnt about the source's shards, and what it may still spend.
pub(super) struct Search {
    pub(super) budget: Budget,
    trees: BTreeMap<TensorId, Tree>,
}

impl Search {
    pub(super) fn new(budget: Budget) -> Self {
        Self { budget, trees: BTreeMap::new() }
    }

    /// The shard that covers most of `area`, the first of equals; `shards` are all there are of `tensor`.
    pub(super) fn largest_overlap<'s>(
        &mut self,
        param: &Param,
        tensor: TensorId,
        shards: &'s [Shard],
        area: &Area,
    ) -> Result<Option<(&'s Shard, Area)>, PlanError> {
        let mut best = Best::default();
        if shards.len() <= LEAF {
            best.offer(shards, 0, area);
        } else {
            let tree = self.trees.entry(tensor).or_insert_with(|| Tree::new(shards));
            tree.visit(Tree::ROOT, shards, area, &mut best);
        }
        self.budget.look(param, best.looks)?;
        Ok(best.index.map(|index| (&shards[index], area.intersect(&shards[index]))))
    }
}

/// The best shard so far.
#[derive(Default)]
struct Best {
    elements: u64,
    index: Option<usize>,
    looks: u64,
}

impl Best {
    /// Looks at shards that start with number `first`.
    fn offer(&mut self, shards: &[Shard], first: usize, area: &Area) {
        let all = area.elements();
        // Sorted by first row: where one starts below the area, the rest do.
        let near = shards.iter().take_while(|shard| shard.rows.start < area.rows.end);
        for (index, shard) in (first..).zip(near) {
            let elements = area.intersect(shard).elements();
            if self.would_take(elements, index) {
                (self.elements, self.index) = (elements, Some(index));
                if elements == all {
                    break;
                }
            }
        }
        self.looks += shards.len() as u64;
    }

    /// Whether an overlap of this size would be better if its shard had this number.
    fn would_take(&self, elements: u64, index: usize) -> bool {
        elements > self.elements
            || (elements == self.elements && self.index.is_some_and(|best| index < best))
    }
}

/// A binary tree over the shards in their order. They are sorted by place, so neighbours lie together.
struct Tree {
    /// Children of node `n` are `2n` and `2n + 1`; the second half are leaves.
    nodes: Vec<Node>,
}

/// What the shards below have in common.
#[derive(Clone)]
struct Node {
    /// What contains all of them. Empty where there are none.
    around: Area,
    /// Elements of the largest.
    most: u64,
}

impl Tree {
    const ROOT: usize = 1;

    fn new(shards: &[Shard]) -> Self {
        let leaves = shards.len().div_ceil(LEAF).next_power_of_two();
        let nothing = Node { around: Area { rows: 0..0, cols: 0..0 }, most: 0 };
        let mut nodes = vec![nothing; 2 * leaves];
        for (leaf, shards) in nodes[leaves..].iter_mut().zip(shards.chunks(LEAF)) {
            *leaf = shards.iter().map(Node::of).reduce(Node::join).unwrap_or_else(|| leaf.clone());
        }
        for node in (Self::ROOT..leaves).rev() {
            nodes[node] = nodes[2 * node].clone().join(nodes[2 * node + 1].clone());
        }
        Self { nodes }
    }

    /// Looks below `node` for a better shard than `best`, first where more can be.
    fn visit(&self, node: usize, shards: &[Shard], area: &Area, best: &mut Best) {
        best.looks += 1;
        let leaves = self.nodes.len() / 2;
        if node >= leaves {
            let first = (node - leaves) * LEAF;
            best.offer(&shards[first..shards.len().min(first + LEAF)], first, area);
            return;
        }
        let (left, right) = (2 * node, 2 * node + 1);
        let order = if self.bound(right, area) > self.bound(left, area) {
            [right, left]
        } else {
            [left, right]
        };
        for child in order {
            let bound = self.bound(child, area);
            if bound > 0 && best.would_take(bound, self.first(child)) {
                self.visit(child, shards, area, best);
            }
        }
    }

    /// No shard below `node` covers more of the area.
    fn bound(&self, node: usize, area: &Area) -> u64 {
        let Node { around, most } = &self.nodes[node];
        area.common(around).elements().min(*most)
    }

    /// The number of the first shard below `node`.
    fn first(&self, node: usize) -> usize {
        let leaves = self.nodes.len() / 2;
        let height = leaves.ilog2() - node.ilog2();
        ((node << height) - leaves) * LEAF
    }
}

impl Node {
    fn of(shard: &Shard) -> Self {
        let around = Area { rows: shard.rows.clone(), cols: shard.cols.clone() };
        let most = around.elements();
        Self { around, most }
    }

    fn join(self, other: Self) -> Self {
        if other.most == 0 {
            return self;
        }
        let around = |a: Range<u64>, b: Range<u64>| a.start.min(b.start)..a.end.max(b.end);
        Self {
            around: Area {
                rows: around(self.around.rows, other.around.rows),
                cols: around(self.around.cols, other.around.cols),
            },
            most: self.most.max(other.most),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Band, Dtype, LayoutBuilder, SourceLayout};

    const SIZE: u64 = 24;

    /// Numbers that look random and are the same every time.
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, limit: u64) -> u64 {
            self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (self.0 >> 33) % limit
        }

        fn range(&mut self) -> Range<u64> {
            let start = self.below(SIZE);
            start..start + 1 + self.below(SIZE - start)
        }

        fn area(&mut self) -> Area {
            Area { rows: self.range(), cols: self.range() }
        }
    }

    /// All shards in their order, the first of the best.
    fn linear(shards: &[Shard], area: &Area) -> Option<usize> {
        let mut best = None;
        for (index, shard) in shards.iter().enumerate() {
            let elements = area.intersect(shard).elements();
            if elements > best.map_or(0, |(_, most)| most) {
                best = Some((index, elements));
            }
        }
        best.map(|(index, _)| index)
    }

    #[test]
    fn the_tree_finds_what_looking_at_all_finds() {
        let mut numbers = Numbers(1);
        for round in 0..300 {
            let mut builder = LayoutBuilder::new(0);
            let tensor = builder.tensor("w", SIZE, SIZE).unwrap();
            let strips = round % 3 == 0;
            let bands = (0..1 + numbers.below(100)).map(|_| {
                let Area { rows, cols } = numbers.area();
                Band::new(tensor, rows, if strips { 0..SIZE } else { cols })
            });
            let param = Param::new("w", Dtype::U8, SIZE, SIZE).bands(bands);
            builder.param(param.clone()).unwrap();
            let layout = builder.build();
            let source = SourceLayout::new([&layout]).unwrap();
            let shards = source.shards_of(source.find(layout.tensors())[0].unwrap());

            let mut search = Search::new(Budget::new(u64::MAX));
            for _ in 0..100 {
                let area = numbers.area();
                let found = search.largest_overlap(&param, TensorId(0), shards, &area).unwrap();
                let index = found.map(|(shard, overlap)| {
                    assert!(overlap.elements() > 0);
                    shards.iter().position(|other| core::ptr::eq(other, shard)).unwrap()
                });
                assert_eq!(index, linear(shards, &area));
            }
        }
    }
}
