//! What sources would offer once they have packed what every engine rank asks for.

use refit::RefitError;
use refit::planner::{
    Capabilities, LowerOptions, PlanOptions, RankLayout, SourceLayout, Wish, lower, pack, plan,
    wish,
};
use refit::translate::TargetLayout;
use serde::Serialize;

/// The slots of one source rank.
#[derive(Serialize)]
pub(super) struct Slots {
    pub(super) source: u32,
    pub(super) slots: usize,
    /// What they take, and what has to be copied whenever the weights change.
    pub(super) bytes: u64,
}

/// The packed layouts, and the slots of those that have some.
pub(super) fn packed(
    sources: &[RankLayout],
    targets: &[TargetLayout],
    capabilities: &Capabilities,
    options: &LowerOptions,
) -> Result<(Vec<RankLayout>, Vec<Slots>), RefitError> {
    let joined = SourceLayout::new(sources)?;
    let mut wishes = Vec::with_capacity(targets.len());
    for target in targets.iter().map(|target| &target.layout) {
        let plan = plan(&joined, target, &PlanOptions::default())?;
        let program = lower(&plan, capabilities, options)?;
        wishes.push(wish(&program, target, sources, |_| *capabilities)?);
    }
    let (mut layouts, mut slots) = (Vec::with_capacity(sources.len()), Vec::new());
    for layout in sources {
        let source = layout.rank();
        let asked = |wish: &&Wish| wish.ranks.binary_search(&source).is_ok();
        let packed = pack(layout, wishes.iter().filter(asked).flat_map(|wish| &wish.slices))?;
        let bytes = packed.slots().iter().map(|slot| slot.bytes).sum();
        if bytes > 0 {
            slots.push(Slots { source, slots: packed.slots().len(), bytes });
        }
        layouts.push(packed.layout().clone());
    }
    Ok((layouts, slots))
}
