//! Layouts given from outside: what is written is read back, captured copies say what was copied, and mistakes are
//! named.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::collections::BTreeMap;

use proptest::prelude::*;
use refit::planner::{Band, Dtype, ElementMap, LayoutBuilder, Param, RankLayout};
use refit_tests::models;
use refit_tests::strategies::model;
use refit_translate::bands::{self, BandsError, CopyProblem, MAX_NAME_BYTES, MAX_TEXT_BYTES, Side};
use refit_translate::megatron::{SourceRank, TrainerOptions};
use refit_translate::{Family, ModelConfig};
use serde_json::{Value, json};

/// A family with biases and a tied head.
fn qwen2() -> ModelConfig {
    let mut config = models::tiny();
    config.family = Family::Qwen2;
    (config.qkv_bias, config.qk_norm, config.tied) = (true, false, true);
    config
}

fn read(side: Side, ranks: &[RankLayout]) -> Vec<RankLayout> {
    let read = bands::read(&bands::write(side, "a \"test\"", ranks)).unwrap();
    assert_eq!(read.side, side);
    read.ranks
}

#[test]
fn built_in_layouts_are_read_back() {
    for config in [models::tiny(), qwen2()] {
        for (tp, pp, dp) in [(1, 1, 1), (4, 1, 2), (2, 2, 1)] {
            let options = TrainerOptions::default().with_padded_vocab(512);
            let ranks = SourceRank::grid(config.num_layers, tp, pp, dp).unwrap();
            let source = models::source_ranks(&config, &ranks, &options);
            assert_eq!(read(Side::Source, &source), source);
        }
        for tp in [1, 2, 8] {
            let target = models::target(&config, tp);
            assert_eq!(read(Side::Target, &target), target);
        }
    }
}

#[test]
fn maps_are_read_back() {
    for map in [ElementMap::Identity, ElementMap::AddOne, ElementMap::NegExp] {
        let mut layout = LayoutBuilder::new(3);
        let id = layout.tensor("a_log", 6, 1).unwrap();
        let param = Param::new("a", Dtype::F32, 6, 1).band(Band::new(id, 0..6, 0..1)).map(map);
        layout.param(param).unwrap();
        let layout = layout.build();
        assert_eq!(read(Side::Target, std::slice::from_ref(&layout)), [layout]);
    }
}

#[test]
fn what_is_left_out_is_all_there_is() {
    let text = json!({
        "schema": 1, "side": "target",
        "tensors": { "norm": [8], "conv": [4, 1, 3], "moe": { "shape": [2, 3, 5], "view": [6, 5] } },
        "ranks": [{ "rank": 7, "params": {
            "norm": { "dtype": "F32", "shape": [8], "bands": [{ "tensor": "norm" }] },
            "conv": { "dtype": "BF16", "shape": [2, 1, 3], "bands": [{ "tensor": "conv", "rows": [2, 4] }] },
            "moe": { "dtype": "BF16", "shape": [2, 3, 5], "view": [6, 5], "bands": [{ "tensor": "moe" }] },
            "pad": { "dtype": "U8", "shape": [2, 2], "bands": [], "fill": [{ "rows": [0, 2] }] },
            "one": { "dtype": "I64", "shape": [], "bands": [], "fill": [{ "rows": [0, 1] }] },
        } }],
    });
    let layout = bands::read(&text.to_string()).unwrap().ranks.remove(0);
    assert_eq!(layout.rank(), 7);
    let extents = |param: &str| {
        let param = layout.param(param).unwrap();
        (param.rows(), param.cols(), param.bytes())
    };
    assert_eq!(extents("norm"), (8, 1, 32));
    assert_eq!(extents("conv"), (2, 3, 12));
    assert_eq!(extents("moe"), (6, 5, 60));
    assert_eq!(extents("pad"), (2, 2, 4));
    assert_eq!(extents("one"), (1, 1, 8));
    let placed: Vec<_> = layout
        .bands()
        .map(|(param, _, band)| (param.name().as_ref(), band.logical_rows(), band.logical_cols()))
        .collect();
    assert_eq!(placed, [("conv", 2..4, 0..3), ("moe", 0..6, 0..5), ("norm", 0..8, 0..1)]);
}

/// Every band as the record that a loader's `copy_` would have left, and every fill likewise.
fn captured(layouts: &[RankLayout]) -> Value {
    let mut tensors = serde_json::Map::new();
    let ranks: Vec<Value> = layouts
        .iter()
        .map(|layout| {
            let mut params = serde_json::Map::new();
            for param in layout.params() {
                let (mut copies, mut fill) = (Vec::new(), Vec::new());
                let to = |row: u64, col: u64, rows: u64, cols: u64, step: u64| {
                    json!({ "offset": row * param.cols() + col, "shape": [rows, cols],
                            "stride": [step * param.cols(), 1] })
                };
                for (_, tensor, band) in
                    layout.bands().filter(|(owner, ..)| owner.name() == param.name())
                {
                    let (rows, cols) = (band.logical_rows(), band.logical_cols());
                    let (row, col) = band.origin();
                    tensors.insert(tensor.name.to_string(), json!([tensor.rows, tensor.cols]));
                    copies.push(json!({
                        "tensor": *tensor.name,
                        "from": { "slice": [[rows.start, rows.end], [cols.start, cols.end]] },
                        "to": to(row, col, rows.end - rows.start, cols.end - cols.start, band.step()),
                    }));
                }
                for (rows, cols) in param.fill_boxes() {
                    let (height, width) = (rows.end - rows.start, cols.end - cols.start);
                    fill.push(to(rows.start, cols.start, height, width, 1));
                }
                params.insert(
                    param.name().to_string(),
                    json!({ "dtype": param.dtype().name(), "shape": [param.rows(), param.cols()],
                            "copies": copies, "fill": fill }),
                );
            }
            json!({ "rank": layout.rank(), "params": params })
        })
        .collect();
    json!({ "schema": 1, "side": "target", "tensors": tensors, "ranks": ranks })
}

#[test]
fn a_captured_model_is_the_built_in_one() {
    for config in [models::tiny(), qwen2()] {
        for tp in [1, 2, 8] {
            let target = models::target(&config, tp);
            let read = bands::read(&captured(&target).to_string()).unwrap();
            assert_eq!(read.ranks, target);
        }
    }
}

/// What one copy does, element by element: `(element of the tensor, element of the parameter)`.
fn elements(from: &Pattern, to: &Pattern) -> Vec<(u64, u64)> {
    from.walk().into_iter().zip(to.walk()).collect()
}

#[derive(Clone, Debug)]
struct Pattern {
    offset: u64,
    shape: Vec<u64>,
    stride: Vec<u64>,
}

impl Pattern {
    fn contiguous(shape: &[u64]) -> Self {
        let stride = (0..shape.len()).map(|dim| shape[dim + 1..].iter().product()).collect();
        Self { offset: 0, shape: shape.to_vec(), stride }
    }

    fn slice(shape: &[u64], slice: &[[u64; 2]]) -> Self {
        let mut pattern = Self::contiguous(shape);
        for (dim, [start, stop]) in slice.iter().enumerate() {
            pattern.offset += start * pattern.stride[dim];
            pattern.shape[dim] = stop - start;
        }
        pattern
    }

    /// Every element's place, in the order of a copy.
    fn walk(&self) -> Vec<u64> {
        let mut places = vec![self.offset];
        for (extent, stride) in self.shape.iter().zip(&self.stride) {
            let inner = |&place: &u64| (0..*extent).map(move |index| place + index * stride);
            places = places.iter().flat_map(inner).collect();
        }
        places
    }

    fn json(&self) -> Value {
        json!({ "offset": self.offset, "shape": self.shape, "stride": self.stride })
    }
}

/// What a layout's bands say about a parameter: the element of the tensor that each element comes from.
fn said(layout: &RankLayout) -> BTreeMap<u64, u64> {
    let mut said = BTreeMap::new();
    for (param, tensor, band) in layout.bands() {
        for row in band.logical_rows() {
            for col in band.logical_cols() {
                let at_row = band.origin().0 + (row - band.logical_rows().start) * band.step();
                let at_col = band.origin().1 + col - band.logical_cols().start;
                let to = at_row * param.cols() + at_col;
                assert_eq!(said.insert(to, row * tensor.cols + col), None);
            }
        }
    }
    said
}

/// A document with one tensor, one parameter and one copy.
fn one_copy(tensor: &[u64], param: &[u64], from: &Value, to: &Pattern) -> String {
    json!({
        "schema": 1, "side": "source", "tensors": { "w": tensor },
        "ranks": [{ "rank": 0, "params": { "p": {
            "dtype": "U8", "shape": param, "copies": [{ "tensor": "w", "from": from, "to": to.json() }],
        } } }],
    })
    .to_string()
}

/// A slice of a random tensor, and where loaders may have put it: strides as views have them, and others.
fn copies() -> impl Strategy<Value = (Vec<u64>, Vec<[u64; 2]>, Vec<u64>, Pattern)> {
    let shape = proptest::collection::vec(1u64..6, 1..4);
    let sliced = shape.prop_flat_map(|shape| {
        let slices: Vec<_> = shape
            .iter()
            .map(|&extent| {
                (0..extent).prop_flat_map(move |start| (Just(start), start + 1..=extent))
            })
            .collect();
        (Just(shape), slices.prop_map(|ends| ends.iter().map(|&(a, b)| [a, b]).collect::<Vec<_>>()))
    });
    let around = proptest::collection::vec((0u64..3, 0u64..3, 1u64..3), 3);
    let order = prop_oneof![6 => Just(false), 1 => Just(true)];
    (sliced, around, order, 0usize..4, 0u64..40).prop_map(
        |((shape, slice), around, swap, split, room)| {
            // A parameter with room around the slice in each dimension, and room between its steps.
            let mut counts: Vec<u64> = slice.iter().map(|[start, stop]| stop - start).collect();
            if split < counts.len() && counts[split].is_multiple_of(2) {
                // As after `view` or `unflatten`.
                let half = counts[split] / 2;
                counts.splice(split..=split, [half, 2]);
            }
            let extents: Vec<u64> = counts
                .iter()
                .enumerate()
                .map(|(dim, count)| {
                    let (before, after, step) = around[dim % 3];
                    before + (count - 1) * step + 1 + after
                })
                .collect();
            let whole = Pattern::contiguous(&extents);
            let mut to = Pattern { offset: 0, shape: counts, stride: Vec::new() };
            for (dim, stride) in whole.stride.iter().enumerate() {
                let (before, _, step) = around[dim % 3];
                to.offset += before * stride;
                to.stride.push(step * stride);
            }
            if swap && to.stride.len() > 1 {
                to.stride.swap(0, 1);
            }
            let mut param = extents;
            param[0] += room / 20;
            (shape, slice, param, to)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_000, ..ProptestConfig::default() })]

    #[test]
    fn captured_copies_say_what_was_copied((tensor, slice, param, to) in copies()) {
        let from = Pattern::slice(&tensor, &slice);
        let wanted = elements(&from, &to);
        let mut places: Vec<u64> = wanted.iter().map(|&(_, to)| to).collect();
        places.sort_unstable();
        let twice = places.windows(2).any(|pair| pair[0] == pair[1]);
        let outside = places.last().is_some_and(|last| *last >= param.iter().product());

        for from in [json!({ "slice": slice }), from.json()] {
            match bands::read(&one_copy(&tensor, &param, &from, &to)) {
                Ok(read) => {
                    prop_assert!(!twice && !outside);
                    let wanted = wanted.iter().map(|&(from, to)| (to, from)).collect();
                    prop_assert_eq!(said(&read.ranks[0]), wanted);
                }
                Err(BandsError::Copy { place, problem }) => {
                    prop_assert_eq!(place.tensor.as_deref(), Some("w"));
                    match problem {
                        CopyProblem::OutsideParam { .. } => prop_assert!(outside),
                        // Single elements that are not in columns next to each other, or strides that were swapped.
                        CopyProblem::Columns { .. } | CopyProblem::Transposed { .. } | CopyProblem::Reshaped { .. } => {}
                        other => prop_assert!(false, "unexpected {other}"),
                    }
                }
                Err(BandsError::Overlap { .. }) => prop_assert!(twice),
                Err(other) => prop_assert!(false, "unexpected {other}"),
            }
        }
    }

    #[test]
    fn random_layouts_are_read_back(model in model()) {
        prop_assert_eq!(read(Side::Source, &model.source), model.source);
        prop_assert_eq!(read(Side::Target, &model.target), model.target);
    }
}

/// Rows of a matrix that are spread out, stacked experts, a bias between others, and a copy through a reshape.
#[test]
fn loaders_of_real_engines_are_understood() {
    /// Shape of the tensor, what is read of it, shape of the parameter, where it goes, bands it takes.
    type Case<'a> = (&'a [u64], Value, &'a [u64], Pattern, usize);
    let cases: [Case<'_>; 6] = [
        // Every other row, as interleaved gates and ups.
        (&[4, 8], json!(null), &[8, 8], pattern(8, &[4, 8], &[16, 1]), 1),
        // Expert 1 of a stack: rows of the last dimension.
        (&[3, 5], json!(null), &[2, 3, 5], pattern(15, &[3, 5], &[5, 1]), 1),
        // A slice of a stack that the checkpoint keeps too, all of it.
        (
            &[2, 3, 5],
            json!({ "slice": [[1, 2]] }),
            &[2, 3, 5],
            pattern(15, &[1, 3, 5], &[15, 5, 1]),
            1,
        ),
        // A bias, spread out.
        (&[6], json!({ "slice": [[2, 5]] }), &[9], pattern(1, &[3], &[3]), 1),
        // Columns.
        (&[4, 6], json!({ "slice": [[0, 4], [3, 6]] }), &[4, 3], pattern(0, &[4, 3], &[3, 1]), 1),
        // Heads of two rows each, four rows apart: rows of one head are neighbours, so each head is a band.
        (&[6, 5], json!(null), &[12, 5], pattern(0, &[3, 2, 5], &[20, 5, 1]), 3),
    ];
    for (tensor, from, param, to, bands_wanted) in cases {
        let layout = bands::read(&one_copy(tensor, param, &from, &to)).unwrap().ranks.remove(0);
        assert_eq!(layout.bands().count(), bands_wanted, "{to:?}");
    }
}

fn pattern(offset: u64, shape: &[u64], stride: &[u64]) -> Pattern {
    Pattern { offset, shape: shape.to_vec(), stride: stride.to_vec() }
}

/// A legal document that the mistakes below are made in.
fn document() -> Value {
    json!({
        "schema": 1, "side": "target",
        "tensors": { "t": [4, 6], "u": [2, 6] },
        "ranks": [{ "rank": 3, "params": {
            "w": { "dtype": "BF16", "shape": [6, 6],
                   "bands": [{ "tensor": "t" }, { "tensor": "u", "at": [4, 0] }] },
            "c": { "dtype": "BF16", "shape": [7, 6],
                   "copies": [{ "tensor": "t", "to": { "offset": 0, "shape": [4, 6], "stride": [6, 1] } },
                              { "tensor": "u", "to": { "offset": 24, "shape": [2, 6], "stride": [6, 1] } }],
                   "fill": [{ "offset": 36, "shape": [6], "stride": [1] }] },
        } }],
    })
}

#[test]
fn mistakes_are_named() {
    assert!(bands::read(&document().to_string()).is_ok());
    // A pointer into the document, what is put there, and what the error has to say.
    let w = "rank 3, parameter `w`";
    let c = "rank 3, parameter `c`";
    let mistakes: [(&str, Value, &[&str]); 31] = [
        ("/schema", json!(2), &["schema 2", "knows 1"]),
        ("/side", json!("left"), &["line 1", "`source` or `target`"]),
        ("/tensors/t", json!([4, 6, 1, 1, 1, 1, 1, 1, 1]), &["more than 8 entries"]),
        ("/tensors/t", json!([1u64 << 40, 1u64 << 40]), &["tensor `t`", "63 bits"]),
        (
            "/tensors/t",
            json!({ "shape": [4, 6], "view": [5, 5] }),
            &["tensor `t`", "5 x 5", "24 elements"],
        ),
        ("/tensors/t", json!("4x6"), &["a shape, or an object"]),
        ("/ranks/0/params/w/dtype", json!("bf16"), &[w, "`bf16`", "BF16"]),
        ("/ranks/0/params/w/shape", json!([6, -6]), &["line 1", "integer `-6`"]),
        ("/ranks/0/params/w/shape", json!([6, 6.5]), &["floating point `6.5`"]),
        ("/ranks/0/params/w/copies", json!([]), &[w, "either `bands` or `copies`"]),
        ("/ranks/0/params/w/bands", json!(null), &[w, "either `bands` or `copies`"]),
        ("/ranks/0/params/w/bands/0/row", json!([0, 1]), &["unknown field `row`", "`rows`"]),
        (
            "/ranks/0/params/w/bands/0/tensor",
            json!("v"),
            &[w, "bands[0] of tensor `v`", "add it there"],
        ),
        (
            "/ranks/0/params/w/bands/1/rows",
            json!([1, 3]),
            &[w, "bands[1] of tensor `u`", "outside tensor", "correct `rows`"],
        ),
        (
            "/ranks/0/params/w/bands/1/rows",
            json!([2, 1]),
            &[w, "bands[1] of tensor `u`", "leave empty bands out"],
        ),
        (
            "/ranks/0/params/w/bands/1/row_step",
            json!(0),
            &[w, "bands[1] of tensor `u`", "row step of 0"],
        ),
        (
            "/ranks/0/params/w/bands/1/at",
            json!([5, 0]),
            &[w, "bands[1] of tensor `u`", "outside parameter", "correct `at`"],
        ),
        (
            "/ranks/0/params/w/bands/1/at",
            json!([3, 0]),
            &[w, "row 3, column 0 of `t`", "row 0, column 0 of `u`", "row 3, column 0;"],
        ),
        ("/ranks/0/params/w/bands/1/cols", json!([0, 5]), &[w, "34 of its 36 elements", "`fill`"]),
        (
            "/ranks/0/params/w/fill",
            json!([{ "rows": [5, 7] }]),
            &[w, "fill[0]", "outside parameter"],
        ),
        ("/ranks/0/params/w/fill", json!([{ "offset": 0 }]), &["line 1", "either `rows`"]),
        ("/ranks/0/params/c/fill", json!([{ "rows": [6, 7] }]), &[c, "fill 0", "`offset`"]),
        ("/ranks/0/params/c/fill", json!([]), &[c, "36 of its 42 elements"]),
        (
            "/ranks/0/params/c/copies/0/to/stride",
            json!([1, 6]),
            &[c, "copies[0] of tensor `t`", "transposes", "go 6 apart"],
        ),
        (
            "/ranks/0/params/c/copies/1/to",
            json!({ "offset": 24, "shape": [2, 6], "stride": [7, 2] }),
            &[c, "copies[1] of tensor `u`", "columns 1 apart", "2 apart"],
        ),
        (
            "/ranks/0/params/c/copies/1/to/stride",
            json!([6]),
            &[c, "copies[1] of tensor `u`", "1 strides"],
        ),
        (
            "/ranks/0/params/c/copies/1/to/stride",
            json!([0, 1]),
            &[c, "copies[1] of tensor `u`", "stride is 0"],
        ),
        (
            "/ranks/0/params/c/copies/1/to/shape",
            json!([1, 6]),
            &[c, "copies[1] of tensor `u`", "reads 12", "writes 6"],
        ),
        (
            "/ranks/0/params/c/copies/1/to/offset",
            json!(31),
            &[c, "copies[1] of tensor `u`", "beyond the parameter's 42"],
        ),
        (
            "/ranks/0/params/c/copies/1/to/offset",
            json!(18),
            &[c, "row 3, column 0 of `t`", "row 0, column 0 of `u`"],
        ),
        (
            "/ranks/0/params/c/copies/1/from",
            json!({ "slice": [[0, 3]] }),
            &[c, "copies[1] of tensor `u`", "slice 0..3"],
        ),
    ];
    for (at, value, says) in mistakes {
        let mut document = document();
        let (parent, key) = at.rsplit_once('/').unwrap();
        match document.pointer_mut(parent).unwrap() {
            Value::Object(map) => drop(map.insert(key.to_owned(), value.clone())),
            other => panic!("{at} is inside {other}"),
        }
        let error = bands::read(&document.to_string()).unwrap_err().to_string();
        for part in says {
            assert!(error.contains(part), "{at} = {value}: `{error}` does not say `{part}`");
        }
    }
}

#[test]
fn names_that_occur_twice_are_refused() {
    let twice = |tensors: &str, params: &str, ranks: &str| {
        let rank = format!("{{\"rank\": 0, \"params\": {{{params}}}}}");
        let text = format!(
            "{{\"schema\": 1, \"side\": \"source\", \"tensors\": {{{tensors}}}, \"ranks\": [{rank}{ranks}]}}"
        );
        bands::read(&text).map(|_| ()).map_err(|error| error.to_string())
    };
    let param = r#""p": {"dtype": "U8", "shape": [2], "bands": []}"#;
    assert_eq!(twice("", param, ""), Ok(()));
    let error = twice(r#""t": [1], "t": [1]"#, param, "").unwrap_err();
    assert!(error.contains("tensor `t` is listed twice"), "{error}");
    let error = twice("", &format!("{param}, {param}"), "").unwrap_err();
    assert!(error.contains("rank 0 lists parameter `p` twice"), "{error}");
    let error = twice("", param, r#", {"rank": 0, "params": {}}"#).unwrap_err();
    assert!(error.contains("source rank 0 is given twice"), "{error}");
}

#[test]
fn texts_beyond_the_bounds_are_refused() {
    let refused = |text: &str, says: &str| {
        let error = bands::read(text).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    refused(&" ".repeat(MAX_TEXT_BYTES + 1), "several files");
    let deep = "[".repeat(1_000_000);
    refused(&deep, "invalid type: sequence");
    refused(&format!(r#"{{"schema": 1, "about": {deep}"#), "EOF");
    let closed = "]".repeat(1_000_000);
    refused(&format!(r#"{{"schema": 1, "about": {deep}{closed}}}"#), "expected a string");
    let long = "n".repeat(MAX_NAME_BYTES + 1);
    refused(
        &format!(r#"{{"schema": 1, "side": "source", "tensors": {{"{long}": [1]}}, "ranks": []}}"#),
        "a name of 1025 bytes",
    );
    refused(r#"{"schema": 1, "side": "source", "tensors": {"": [1]}, "ranks": []}"#, "empty");
    let ranks: Vec<String> = (0..=bands::MAX_RANKS)
        .map(|rank| format!(r#"{{"rank": {rank}, "params": {{}}}}"#))
        .collect();
    refused(
        &format!(
            r#"{{"schema": 1, "side": "source", "tensors": {{}}, "ranks": [{}]}}"#,
            ranks.join(",")
        ),
        "more than 65536 entries",
    );
    // A line of text that would become a band for each of two to the fortieth rows: a band's are consecutive.
    let to = pattern(0, &[1 << 40, 4], &[8, 1]);
    let from = json!({ "offset": 0, "shape": [1u64 << 40, 4], "stride": [16, 1] });
    refused(&one_copy(&[1 << 41, 8], &[1 << 40, 8], &from, &to), "it takes 1099511627776 bands");
}
