//! A whole refit without packing, the exchange that leads to it, and refits with it, between ranks of one process.

use std::sync::Arc;
use std::time::Duration;

use refit::planner::RankLayout;
use refit::transport::Transport;
use refit::{Directory, PackedSource, Report, TargetOptions};

use crate::oracle::Buffers;
use crate::ranks;

/// How long ranks wait for each other's files, which are there.
const PATIENCE: Duration = Duration::from_secs(10);

/// One rank: its layout, and what it holds or is to hold.
pub type Rank = (RankLayout, Buffers);

/// What one target rank did.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Without packing.
    pub before: Report,
    /// With it.
    pub after: Report,
    /// Boxes that it asked for.
    pub slices: usize,
}

/// What all of them did, and what it took.
#[derive(Debug)]
pub struct Outcomes {
    /// By target rank.
    pub targets: Vec<Outcome>,
    /// Bytes of slots, by source rank.
    pub slots: Vec<u64>,
}

/// Other values: every byte changes.
#[must_use]
pub fn next(buffers: &Buffers) -> Buffers {
    let changed = |bytes: &Vec<u8>| bytes.iter().map(|byte| byte ^ 0x3c).collect();
    buffers.iter().map(|(name, bytes)| (name.clone(), changed(bytes))).collect()
}

/// Refits without packing; asks, packs and publishes anew; refits with it, before and after the weights change. Every
/// byte is compared every time.
pub fn packed<T: Transport>(
    trainer: &Arc<T>,
    engine: &Arc<T>,
    sources: &[Rank],
    targets: &[Rank],
) -> Outcomes {
    let folder = tempfile::tempdir().unwrap();
    let directory = Directory::new(folder.path()).unwrap();
    let (source_ranks, target_ranks) = (0..sources.len(), 0..targets.len());
    let source_ranks = || source_ranks.clone().map(|rank| u32::try_from(rank).unwrap());
    let target_ranks = target_ranks.map(|rank| u32::try_from(rank).unwrap());

    let mut plain = Vec::new();
    for (layout, held) in sources {
        let mut source = ranks::source(trainer, layout);
        ranks::write(&mut source, held);
        plain.push(source);
    }
    for source in &plain {
        directory.publish(&source.publication().unwrap()).unwrap();
    }
    let published = directory.wait(source_ranks(), PATIENCE).unwrap();
    let mut running = Vec::new();
    for (layout, wanted) in targets {
        let (mut target, pool, canaries) = ranks::target(engine, layout, TargetOptions::default());
        let request = target.pack_request(&published).unwrap();
        directory.ask(&request).unwrap();
        let (target, before) = ranks::refit(target, &published);
        assert_same(&ranks::held(&target), wanted);
        running.push((target, pool, canaries, request, before));
    }

    let requests = directory.wait_for_requests(target_ranks, PATIENCE).unwrap();
    let mut packed: Vec<PackedSource<T>> = Vec::new();
    for source in plain {
        packed.push(source.pack(&ranks::pool(trainer), &requests, u64::MAX).unwrap());
    }
    for source in &packed {
        directory.publish(&source.publication().unwrap()).unwrap();
    }
    let mut outcomes =
        Outcomes { targets: vec![], slots: packed.iter().map(PackedSource::slot_bytes).collect() };
    let mut refitted = Vec::new();
    for ((target, pool, canaries, request, before), (_, wanted)) in running.into_iter().zip(targets)
    {
        let published = directory.wait_until_packed(source_ranks(), &request, PATIENCE).unwrap();
        for publication in &published {
            assert!(request.is_answered_by(publication).unwrap());
        }
        let (mut target, after) = ranks::refit(target, &published);
        assert_same(&ranks::held(&target), wanted);
        assert!(target.pack_request(&published).unwrap().is_empty(), "nothing is left to ask for");
        outcomes.targets.push(Outcome { before, after, slices: request.slices().len() });
        refitted.push((target, pool, canaries, published));
    }

    for (source, (_, held)) in packed.iter_mut().zip(sources) {
        let held = next(held);
        let names = source.update(3, |params| {
            params
                .map(|(name, memory)| {
                    memory.host_bytes_mut().unwrap().copy_from_slice(&held[name]);
                })
                .count()
        });
        assert_eq!(names.unwrap(), source.unpacked_layout().params().len());
    }
    for ((target, pool, canaries, published), (layout, wanted)) in refitted.into_iter().zip(targets)
    {
        let before = pool.stats();
        let (target, warm) = ranks::refit(target, &published);
        let counts = (warm.plans, warm.allocations, warm.registrations, warm.prepared_reads);
        assert_eq!(counts, (0, 0, 0, 0));
        assert_eq!(pool.stats().allocations, before.allocations);
        let (held, wanted) = (ranks::held(&target), next(wanted));
        for param in layout.params() {
            // What is filled does not come from a source, and what is cast is not what was changed.
            let copied =
                param.fill_boxes().next().is_none() && is_copied(layout, param.name(), sources);
            let name = param.name().as_ref();
            assert!(!copied || held[name] == wanted[name], "`{name}` is not what the sources hold");
        }
        canaries.check();
    }
    outcomes
}

/// Whether the tensors of this parameter have its type everywhere.
fn is_copied(target: &RankLayout, name: &str, sources: &[Rank]) -> bool {
    let wanted = target.bands().filter(|(param, ..)| **param.name() == *name);
    let mut held = sources.iter().flat_map(|(layout, _)| layout.bands());
    let wanted: Vec<_> = wanted
        .map(|(param, tensor, _)| (&tensor.name, param.dtype(), param.element_map()))
        .collect();
    held.all(|(param, tensor, _)| {
        wanted.iter().all(|(name, dtype, map)| {
            tensor.name != **name || (param.dtype(), param.element_map()) == (*dtype, *map)
        })
    })
}

/// Names the tensor instead of printing it.
fn assert_same(got: &Buffers, wanted: &Buffers) {
    assert!(got.keys().eq(wanted.keys()));
    for (name, bytes) in wanted {
        assert!(got[name] == *bytes, "{name} differs");
    }
}
