//! Where rows of hybrid models' parameters are: lists in the frameworks' order, made with loops over heads and cut into
//! equal shares.

use refit_translate::roles::GdnLayout;
use refit_translate::{Gdn, Mamba};

/// Which row of which logical tensor each local row is.
pub type Rows = Vec<(usize, u64)>;

/// An equal share of a list.
fn share(rows: &Rows, rank: u64, size: u64) -> Rows {
    let each = rows.len() / usize::try_from(size).unwrap();
    rows.chunks(each.max(1)).nth(usize::try_from(rank).unwrap()).unwrap_or_default().to_vec()
}

fn range(tensor: usize, start: u64, len: u64) -> Rows {
    (start..start + len).map(|row| (tensor, row)).collect()
}

/// `[z; x; B; C; dt]` of all ranks, block by block; without the first and the last: the channels of the convolution.
fn mamba(sizes: &Mamba, conv: bool) -> Vec<Rows> {
    let (inner, groups) = (sizes.heads * sizes.head_dim, sizes.groups * sizes.state);
    let heights = if conv {
        vec![inner, groups, groups]
    } else {
        vec![inner, inner, groups, groups, sizes.heads]
    };
    let mut start = 0;
    heights
        .into_iter()
        .map(|height| {
            start += height;
            range(0, start - height, height)
        })
        .collect()
}

/// The trainer's input projection, or its convolution.
#[must_use]
pub fn mamba_source(sizes: &Mamba, conv: bool, rank: u64, size: u64) -> Rows {
    mamba(sizes, conv).iter().flat_map(|block| share(block, rank, size)).collect()
}

/// The engine's input projection, or its convolution.
#[must_use]
pub fn mamba_target(sizes: &Mamba, conv: bool, rank: u64, size: u64) -> Rows {
    let blocks = mamba(sizes, conv);
    let b = if conv { 1 } else { 2 };
    let mut rows = Rows::new();
    for (number, block) in blocks.iter().enumerate() {
        let replicated = sizes.groups == 1 && (number == b || number == b + 1);
        rows.extend(if replicated { block.clone() } else { share(block, rank, size) });
    }
    rows
}

/// The checkpoint's tensors as lists of what each row is: block (`q`, `k`, `v`, `z`, `b`, `a`), head, element.
fn gdn_checkpoint(sizes: &Gdn, layout: GdnLayout) -> Vec<Vec<(char, u64, u64)>> {
    let each = sizes.value_heads / sizes.key_heads;
    let dim = |block| match block {
        'q' | 'k' => sizes.key_head_dim,
        'v' | 'z' => sizes.value_head_dim,
        _ => 1,
    };
    let mut tensors = Vec::new();
    match layout {
        GdnLayout::Interleaved => {
            for blocks in ["qkvz", "ba"] {
                let mut rows = Vec::new();
                for key in 0..sizes.key_heads {
                    for block in blocks.chars() {
                        let heads = match block {
                            'q' | 'k' => key..key + 1,
                            _ => key * each..(key + 1) * each,
                        };
                        for head in heads {
                            rows.extend((0..dim(block)).map(|element| (block, head, element)));
                        }
                    }
                }
                tensors.push(rows);
            }
        }
        GdnLayout::Flat => {
            for blocks in ["qkv", "z", "b", "a"] {
                let mut rows = Vec::new();
                for block in blocks.chars() {
                    let heads =
                        if "qk".contains(block) { sizes.key_heads } else { sizes.value_heads };
                    for head in 0..heads {
                        rows.extend((0..dim(block)).map(|element| (block, head, element)));
                    }
                }
                tensors.push(rows);
            }
        }
    }
    tensors
}

/// Where the rows of a block are in the checkpoint, by head and element.
fn gdn_block(sizes: &Gdn, layout: GdnLayout, block: char) -> Rows {
    let mut rows = Vec::new();
    for (tensor, held) in gdn_checkpoint(sizes, layout).iter().enumerate() {
        for (row, &(of, head, element)) in (0..).zip(held) {
            if of == block {
                rows.push(((head, element), (tensor, row)));
            }
        }
    }
    rows.sort_unstable();
    rows.into_iter().map(|(_, place)| place).collect()
}

/// The trainer's input projection.
#[must_use]
pub fn gdn_source(sizes: &Gdn, layout: GdnLayout, rank: u64, size: u64) -> Rows {
    let block = |block| share(&gdn_block(sizes, layout, block), rank, size);
    "qkvzba".chars().flat_map(block).collect()
}

/// The engine's input projections: `qkvz`, then `ba`.
#[must_use]
pub fn gdn_target(sizes: &Gdn, layout: GdnLayout, rank: u64, size: u64) -> [Rows; 2] {
    match layout {
        GdnLayout::Interleaved => {
            let tensors = gdn_checkpoint(sizes, layout);
            [0, 1].map(|tensor| share(&range(tensor, 0, tensors[tensor].len() as u64), rank, size))
        }
        GdnLayout::Flat => ["qkvz", "ba"].map(|blocks| {
            let block = |block| share(&gdn_block(sizes, layout, block), rank, size);
            blocks.chars().flat_map(block).collect()
        }),
    }
}

/// The convolution of either side.
#[must_use]
pub fn gdn_conv(sizes: &Gdn, rank: u64, size: u64) -> Rows {
    let (keys, values) =
        (sizes.key_heads * sizes.key_head_dim, sizes.value_heads * sizes.value_head_dim);
    [range(0, 0, keys), range(0, keys, keys), range(0, 2 * keys, values)]
        .iter()
        .flat_map(|block| share(block, rank, size))
        .collect()
}

/// The trainer's projection, of these query heads, KV groups and elements of a head.
#[must_use]
pub fn gated_qkv_source(
    (heads, kv_heads, head_dim): (u64, u64, u64),
    rank: u64,
    size: u64,
) -> Rows {
    let each = heads / kv_heads;
    let mut rows = Rows::new();
    for group in 0..kv_heads {
        for gate in [0, 1] {
            for head in group * each..(group + 1) * each {
                rows.extend(range(0, (2 * head + gate) * head_dim, head_dim));
            }
        }
        rows.extend(range(1, group * head_dim, head_dim));
        rows.extend(range(2, group * head_dim, head_dim));
    }
    share(&rows, rank, size)
}

/// The engine's projection, of these query heads, KV groups and elements of a head.
#[must_use]
pub fn gated_qkv_target(
    (heads, kv_heads, head_dim): (u64, u64, u64),
    rank: u64,
    size: u64,
) -> Rows {
    let mut rows = share(&range(0, 0, 2 * heads * head_dim), rank, size);
    for tensor in [1, 2] {
        let heads = if size > kv_heads {
            vec![rank / (size / kv_heads)]
        } else {
            let each = kv_heads / size;
            (rank * each..(rank + 1) * each).collect()
        };
        rows.extend(heads.iter().flat_map(|head| range(tensor, head * head_dim, head_dim)));
    }
    rows
}
