//! Layouts as text.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ops::Range;

use refit_planner::{Band, ElementMap, Param, RankLayout, Tensor};

use super::{SCHEMA, Side};

/// One side's layouts in the format that [`read`](super::read) takes, a band a line. `about` is for people.
///
/// Reading it back gives equal layouts.
#[must_use]
pub fn write(side: Side, about: &str, ranks: &[RankLayout]) -> String {
    let tensors: BTreeMap<&str, &Tensor> = ranks
        .iter()
        .flat_map(RankLayout::tensors)
        .map(|tensor| (tensor.name.as_ref(), tensor))
        .collect();
    let mut text = format!("{{\n  \"schema\": {SCHEMA},\n");
    if !about.is_empty() {
        text += &format!("  \"about\": {},\n", quoted(about));
    }
    text += &format!("  \"side\": \"{side}\",\n  \"tensors\": {{");
    let tensors = tensors.values().map(|tensor| {
        format!("\n    {}: {}", quoted(&tensor.name), shape(tensor.rows, tensor.cols))
    });
    join(&mut text, tensors);
    text += "\n  },\n  \"ranks\": [";
    join(&mut text, ranks.iter().map(rank));
    text += "\n  ]\n}\n";
    text
}

fn rank(layout: &RankLayout) -> String {
    let mut bands = BTreeMap::<&str, Vec<String>>::new();
    for (owner, tensor, it) in layout.bands() {
        bands.entry(owner.name()).or_default().push(band(tensor, it));
    }
    let params = layout
        .params()
        .iter()
        .map(|it| param(it, &bands.remove(it.name().as_ref()).unwrap_or_default()));
    let mut text = format!("\n    {{\n      \"rank\": {},\n      \"params\": {{", layout.rank());
    join(&mut text, params);
    text += "\n      }\n    }";
    text
}

fn param(param: &Param, bands: &[String]) -> String {
    let mut text = format!(
        "\n        {}: {{\n          \"dtype\": \"{}\", \"shape\": {},{}\n          \"bands\": [",
        quoted(param.name()),
        param.dtype(),
        shape(param.rows(), param.cols()),
        map(param.element_map()),
    );
    let line = |entry: &String| format!("\n            {{ {entry} }}");
    join(&mut text, bands.iter().map(line));
    text += if bands.is_empty() { "]" } else { "\n          ]" };
    let fills: Vec<String> = param
        .fill_boxes()
        .map(|(rows, cols)| extents(&rows, &cols, param.cols()).join(", "))
        .collect();
    if !fills.is_empty() {
        text += ",\n          \"fill\": [";
        join(&mut text, fills.iter().map(line));
        text += "\n          ]";
    }
    text += "\n        }";
    text
}

/// Left out where the logical values are what is stored.
fn map(map: ElementMap) -> String {
    match serde_json::to_string(&map) {
        Ok(name) if map != ElementMap::Identity => format!(" \"map\": {name},"),
        _ => String::new(),
    }
}

fn band(tensor: &Tensor, band: &Band) -> String {
    let mut parts = Vec::from([format!("\"tensor\": {}", quoted(&tensor.name))]);
    parts.extend(extents(&band.logical_rows(), &band.logical_cols(), tensor.cols));
    if band.origin() != (0, 0) {
        parts.push(format!("\"at\": [{}, {}]", band.origin().0, band.origin().1));
    }
    if band.step() != 1 {
        parts.push(format!("\"row_step\": {}", band.step()));
    }
    parts.join(", ")
}

/// Rows always, because a reader looks for them; columns where they are not all there are.
fn extents(rows: &Range<u64>, cols: &Range<u64>, all_cols: u64) -> Vec<String> {
    let mut parts = Vec::from([format!("\"rows\": [{}, {}]", rows.start, rows.end)]);
    if *cols != (0..all_cols) {
        parts.push(format!("\"cols\": [{}, {}]", cols.start, cols.end));
    }
    parts
}

/// Vectors have one column, and are written as vectors.
fn shape(rows: u64, cols: u64) -> String {
    if cols == 1 { format!("[{rows}]") } else { format!("[{rows}, {cols}]") }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn join(text: &mut String, parts: impl Iterator<Item = String>) {
    for (index, part) in parts.enumerate() {
        if index > 0 {
            text.push(',');
        }
        *text += &part;
    }
}
