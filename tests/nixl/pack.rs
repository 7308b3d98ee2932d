//! Packing over real NIXL: both sides in one process, two agents.

use std::sync::Arc;

use refit_tests::packing::{self, Outcome, Rank};
use refit_tests::{models, oracle};
use refit_transport::nixl::{NixlOptions, NixlTransport};

use crate::isolated::library;

fn ranks(layouts: Vec<refit::planner::RankLayout>) -> Vec<Rank> {
    layouts.into_iter().map(|layout| (layout.clone(), oracle::buffers(&layout))).collect()
}

/// Row-parallel parameters of a finer engine arrive whole, by one read each, and nothing else does.
pub(crate) fn packed(source_tp: u32, target_tp: u32) {
    let agent = |role| Arc::new(NixlTransport::new(library(), NixlOptions::new(role)).unwrap());
    let sources = ranks(models::source(&models::tiny(), source_tp, 1, 1));
    let targets = ranks(models::target(&models::tiny(), target_tp));
    let outcomes = packing::packed(&agent("trainer"), &agent("engine"), &sources, &targets);
    assert!(outcomes.slots.iter().all(|bytes| *bytes > 0));
    for Outcome { before, after, slices } in outcomes.targets {
        assert!(slices > 0 && after.reads <= before.reads);
        assert!(after.wire_bytes < before.wire_bytes);
    }
}
