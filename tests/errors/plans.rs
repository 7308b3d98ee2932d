//! Layouts that do not belong together.

use refit::planner::{
    Band, Dtype, LayoutBuilder, Param, PlanError, PlanOptions, RankLayout, SourceLayout, plan,
};

use super::{Said, said};

/// A parameter `w` that holds these rows of a tensor of 16 rows and 4 columns, each at a row of its own.
fn layout(rank: u32, dtype: Dtype, rows: u64, held: &[(std::ops::Range<u64>, u64)]) -> RankLayout {
    let mut layout = LayoutBuilder::new(rank);
    let tensor = layout.tensor("t", 16, 4).unwrap();
    let bands = held.iter().map(|(rows, at)| Band::new(tensor, rows.clone(), 0..4).at(*at, 0));
    layout.param(Param::new("w", dtype, rows, 4).bands(bands)).unwrap();
    layout.build()
}

fn refused(source: RankLayout, target: &RankLayout) -> PlanError {
    let source = SourceLayout::new([source]).unwrap();
    plan(&source, target, &PlanOptions::default()).unwrap_err()
}

pub(super) fn overlap() -> Said {
    let twice = layout(0, Dtype::Bf16, 16, &[(0..8, 0), (0..12, 4)]);
    let whole = layout(0, Dtype::Bf16, 16, &[(0..16, 0)]);
    said!(refused(whole, &twice), PlanError::Overlap { .. })
}

pub(super) fn dtype() -> Said {
    let (bytes, floats) = (Dtype::U8, Dtype::Bf16);
    let error = refused(layout(3, floats, 16, &[(0..16, 0)]), &layout(0, bytes, 16, &[(0..16, 0)]));
    said!(error, PlanError::Dtype { .. })
}

pub(super) fn uncovered() -> Said {
    let half = layout(0, Dtype::Bf16, 8, &[(0..8, 0)]);
    let error = refused(half, &layout(0, Dtype::Bf16, 16, &[(0..16, 0)]));
    said!(error, PlanError::Uncovered { .. })
}
