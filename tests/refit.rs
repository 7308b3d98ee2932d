//! The glue: typestates, warm and cold, restarts and failures, over the in-process transport.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::time::{Duration, Instant};

use refit::planner::{Band, Dtype, LayoutBuilder, LowerOptions, Mode, Param, RankLayout};
use refit::pool::HostAllocator;
use refit::transport::Progress;
use refit::transport::local::Network;
use refit::{RefitError, Source, Target, TargetOptions, Unfinished, allocate};
use refit_tests::oracle::{self, Buffers};
use refit_tests::{models, ranks};
use refit_translate::PostAction;
use refit_translate::megatron::{SourceRank, TrainerOptions};
use refit_translate::vllm::{self, TargetRank};

fn staged() -> TargetOptions {
    TargetOptions::default().with_lower(LowerOptions::default().with_mode(Mode::Staged))
}

/// A trainer that keeps fp32: everything is cast, so everything is staged, whatever strides a transport takes.
fn fp32_source(tp: u32) -> Vec<RankLayout> {
    let options = TrainerOptions::default().with_dtype(Dtype::F32);
    let ranks = SourceRank::grid(models::tiny().num_layers, tp, 1, 1).unwrap();
    models::source_ranks(&models::tiny(), &ranks, &options)
}

/// Waves of less than most of the staged tensors.
fn in_waves() -> TargetOptions {
    TargetOptions::default().with_lower(LowerOptions::default().with_wave_bytes(1_000))
}

/// The same tensors with other values: every byte that is not padding changes.
fn next_version(buffers: &Buffers) -> Buffers {
    buffers
        .iter()
        .map(|(name, bytes)| (name.clone(), bytes.iter().map(|byte| byte ^ 0x3c).collect()))
        .collect()
}

#[test]
fn a_warm_refit_moves_bytes_and_does_nothing_else() {
    for (source_tp, target_tp, options) in [
        (1, 1, TargetOptions::default()),
        (4, 2, TargetOptions::default()),
        (2, 4, staged()),
        (1, 2, staged()),
    ] {
        let network = Network::new();
        let trainer = ranks::agent(&network, "trainer");
        let engine = ranks::agent(&network, "engine");
        let layouts = models::source(&models::tiny(), source_tp, 1, 1);
        let mut sources: Vec<_> =
            layouts.iter().map(|layout| ranks::source(&trainer, layout)).collect();
        let published: Vec<_> =
            sources.iter().map(|source| source.publication().unwrap()).collect();
        for layout in models::target(&models::tiny(), target_tp) {
            let wanted = oracle::buffers(&layout);
            let (target, pool, canaries) = ranks::target(&engine, &layout, options);
            let (mut target, cold) = ranks::refit(target, &published);
            assert_eq!(ranks::held(&target), wanted);
            assert_eq!(cold.plans, 1);
            assert!(cold.prepared_reads > 0 && cold.registrations > 0);
            let before = pool.stats();
            for _ in 0..3 {
                let (next, warm) = ranks::refit(target, &published);
                target = next;
                assert_eq!(
                    (warm.plans, warm.allocations, warm.registrations, warm.prepared_reads),
                    (0, 0, 0, 0),
                    "TP{source_tp} -> TP{target_tp}"
                );
                assert_eq!(warm.reads, cold.reads);
            }
            let after = pool.stats();
            assert_eq!(
                (after.allocations, after.registrations, after.misses),
                (before.allocations, before.registrations, before.misses)
            );
            assert_eq!(after.hits, before.hits + 3);

            // The bytes of the last refit are those the source holds now.
            let second: Vec<Buffers> =
                layouts.iter().map(|layout| next_version(&oracle::buffers(layout))).collect();
            sources
                .iter_mut()
                .zip(&second)
                .for_each(|(source, buffers)| ranks::write(source, buffers));
            let (target, _) = ranks::refit(target, &published);
            let changed = ranks::held(&target);
            for name in wanted.keys() {
                let fills = layout.param(name).unwrap().fill_boxes().count();
                assert!(fills > 0 || changed[name] == next_version(&wanted)[name], "{name}");
            }
            canaries.check();
            layouts
                .iter()
                .zip(&mut sources)
                .for_each(|(layout, source)| ranks::write(source, &oracle::buffers(layout)));
        }
    }
}

#[test]
fn every_pair_of_sizes_ends_with_the_oracle_s_bytes() {
    let config = models::tiny();
    for source_tp in [1, 2, 4] {
        for pp in [1, 2] {
            for target_tp in [1, 2, 4] {
                let network = Network::new();
                let (trainer, engine) =
                    (ranks::agent(&network, "trainer"), ranks::agent(&network, "engine"));
                let sources: Vec<_> = models::source(&config, source_tp, pp, 2)
                    .iter()
                    .map(|layout| ranks::source(&trainer, layout))
                    .collect();
                let published: Vec<_> =
                    sources.iter().map(|source| source.publication().unwrap()).collect();
                for layout in models::target(&config, target_tp) {
                    let (target, _, canaries) =
                        ranks::target(&engine, &layout, TargetOptions::default());
                    let (target, report) = ranks::refit(target, &published);
                    assert_eq!(
                        ranks::held(&target),
                        oracle::buffers(&layout),
                        "TP{source_tp} PP{pp} -> TP{target_tp}"
                    );
                    assert!(report.wire_bytes >= report.needed_bytes);
                    canaries.check();
                }
            }
        }
    }
}

#[test]
fn waves_end_with_the_same_bytes_and_need_less_memory() {
    let network = Network::new();
    let (trainer, engine) = (ranks::agent(&network, "trainer"), ranks::agent(&network, "engine"));
    let sources: Vec<_> =
        fp32_source(4).iter().map(|layout| ranks::source(&trainer, layout)).collect();
    let published: Vec<_> = sources.iter().map(|source| source.publication().unwrap()).collect();
    for layout in models::target(&models::tiny(), 2) {
        let wanted = oracle::buffers(&layout);
        let (target, _, canaries) = ranks::target(&engine, &layout, TargetOptions::default());
        let (mut target, at_once) = ranks::refit(target, &published);
        target.set_options(in_waves());
        let prepared = target.prepare(&published).unwrap();
        let waves = prepared.program().waves().len();
        assert!(waves > 10, "{waves} waves");
        // Driven by polls, as an event loop would.
        let mut pulling = prepared.pull().unwrap();
        let mut polls = 1;
        while pulling.poll() == Progress::Pending {
            polls += 1;
        }
        assert!(polls >= waves, "{polls} polls for {waves} waves: one lands at most one");
        let (target, report) =
            pulling.wait(ranks::soon()).unwrap().land().unwrap().install().refreshed();
        assert_eq!(ranks::held(&target), wanted);
        assert!(report.staging_bytes <= 1_000 && at_once.staging_bytes > 10_000);
        assert_eq!(report.wire_bytes, at_once.wire_bytes);
        assert!(report.land > Duration::ZERO && report.total >= report.pull + report.land);
        canaries.check();

        let (mut target, warm) = ranks::refit(target, &published);
        assert_eq!(
            (warm.plans, warm.allocations, warm.registrations, warm.prepared_reads),
            (0, 0, 0, 0)
        );
        assert_eq!((warm.reads, warm.wire_bytes), (report.reads, report.wire_bytes));

        let lower = in_waves().lower.with_slots(3);
        target.set_options(in_waves().with_lower(lower));
        let (target, in_turn) = ranks::refit(target, &published);
        assert_eq!(ranks::held(&target), wanted);
        assert!((2_000..=3 * 1_024).contains(&in_turn.staging_bytes), "{}", in_turn.staging_bytes);
    }
}

#[test]
fn neighbours_in_the_trainer_s_memory_are_read_together() {
    let network = Network::new();
    let (trainer, engine) = (ranks::agent(&network, "trainer"), ranks::agent(&network, "engine"));
    let (rows, cols) = (64, 64);
    let rank = |rank: u32, mine: std::ops::Range<u64>| {
        let mut layout = LayoutBuilder::new(rank);
        for number in 0..40 {
            let name = format!("w{number}");
            let tensor = layout.tensor(name.as_str(), rows, cols).unwrap();
            let param = Param::new(name, Dtype::Bf16, mine.end - mine.start, cols);
            layout.param(param.band(Band::new(tensor, mine.clone(), 0..cols))).unwrap();
        }
        layout.build()
    };
    let (mut published, mut sources) = (Vec::new(), Vec::new());
    for layout in [rank(0, 0..32), rank(1, 32..64)] {
        // One arena, as trainers have one buffer.
        let params = allocate(&layout, &HostAllocator).unwrap();
        let mut source =
            Source::new(trainer.clone(), &ranks::pool(&trainer), layout.clone(), params).unwrap();
        ranks::write(&mut source, &oracle::buffers(&layout));
        published.push(source.publication().unwrap());
        sources.push(source);
    }
    let apart = LowerOptions::default().with_landing_rate(u64::MAX);
    for layout in [rank(0, 0..64), rank(0, 16..48)] {
        let wanted = oracle::buffers(&layout);
        let options = TargetOptions::default().with_lower(apart);
        let (target, _, canaries) = ranks::target(&engine, &layout, options);
        let (mut target, apart) = ranks::refit(target, &published);
        target.set_options(options.with_lower(options.lower.with_slots(2)));
        let (mut target, together) = ranks::refit(target, &published);
        assert_eq!(ranks::held(&target), wanted);
        // Whole parameters touch each other; halves of them lie apart.
        let whole = wanted["w0"].len() == 64 * 64 * 2;
        assert_eq!((apart.reads, together.reads), (80, if whole { 2 } else { 80 }));
        assert_eq!(together.wire_bytes, apart.wire_bytes);
        // Poisoned and again, from the same memory.
        for (_, memory) in target.params_mut() {
            memory.host_bytes_mut().unwrap().fill(0xa5);
        }
        let (target, warm) = ranks::refit(target, &published);
        assert_eq!(ranks::held(&target), wanted);
        assert_eq!((warm.plans, warm.prepared_reads), (0, 0));
        canaries.check();
    }
}

#[test]
fn a_source_that_leaves_between_waves_leaves_an_invalid_target() {
    let network = Network::new();
    let engine = ranks::agent(&network, "engine");
    let layout = models::target(&models::tiny(), 1).remove(0);
    let publish = |name: &str| {
        let trainer = ranks::agent(&network, name);
        let sources: Vec<_> =
            fp32_source(2).iter().map(|layout| ranks::source(&trainer, layout)).collect();
        let published: Vec<_> =
            sources.iter().map(|source| source.publication().unwrap()).collect();
        (sources, published)
    };
    let (sources, published) = publish("trainer-1");
    let (target, _, canaries) = ranks::target(&engine, &layout, in_waves());
    let mut pulling = target.prepare(&published).unwrap().pull().unwrap();
    assert_eq!(pulling.poll(), Progress::Pending);
    drop(sources);
    let failed = pulling.wait(ranks::soon()).unwrap_err();
    assert!(matches!(failed.error, RefitError::Transport(_)), "{}", failed.error);
    let Unfinished::Invalid(target) = failed.state else { panic!("some waves have landed") };

    let (_sources, published) = publish("trainer-2");
    let pulling = target.prepare(&published).unwrap().pull().unwrap();
    let (target, _) = pulling.wait(ranks::soon()).unwrap().land().unwrap().install().refreshed();
    assert_eq!(ranks::held(&target), oracle::buffers(&layout));
    canaries.check();
}

#[test]
fn an_engine_that_has_not_derived_its_state_anew_is_not_whole() {
    let network = Network::new();
    let (trainer, engine) = (ranks::agent(&network, "trainer"), ranks::agent(&network, "engine"));
    let config = models::tiny();
    let sources: Vec<_> = models::source(&config, 1, 1, 1)
        .iter()
        .map(|layout| ranks::source(&trainer, layout))
        .collect();
    let published: Vec<_> = sources.iter().map(|source| source.publication().unwrap()).collect();
    let rank = TargetRank::new(0, 0, 1);
    let wanted = vllm::layout(&config, &rank, &vllm::expected(&config, &rank).unwrap()).unwrap();
    let (params, canaries) = ranks::memory(&wanted.layout);
    let pool = ranks::pool(&engine);
    let options = TargetOptions::default();
    let target = Target::new(engine, pool, wanted.clone(), params, options).unwrap();
    let land = |prepared: refit::Prepared<_>| {
        prepared.pull().unwrap().wait(ranks::soon()).unwrap().land().unwrap().install()
    };

    let installed = land(target.prepare(&published).unwrap());
    assert_eq!(installed.post_actions(), wanted.post_actions);
    assert_eq!(installed.post_actions(), [PostAction::DropCaches]);
    assert!(installed.params().all(|(_, memory)| memory.host_bytes().is_some()));
    assert_eq!(installed.report().plans, 1);
    // What could not be derived leaves a target that only another refit makes whole.
    let invalid = installed.stale();
    let (target, report) = land(invalid.prepare(&published).unwrap()).refreshed();
    assert_eq!((report.plans, ranks::held(&target)), (0, oracle::buffers(&wanted.layout)));
    canaries.check();
}

/// A layout of one tensor, held whole.
fn whole(rank: u32, dtype: Dtype) -> RankLayout {
    let mut layout = LayoutBuilder::new(rank);
    let tensor = layout.tensor("w", 40, 6).unwrap();
    let band = Band::new(tensor, 0..40, 0..6);
    layout.param(Param::new("w", dtype, 40, 6).band(band)).unwrap();
    layout.build()
}

#[test]
fn a_restarted_source_costs_a_binding_and_no_plan() {
    let network = Network::new();
    let engine = ranks::agent(&network, "engine");
    let layout = whole(0, Dtype::Bf16);
    let (target, _, _) = ranks::target(&engine, &layout, TargetOptions::default());

    let first = ranks::agent(&network, "trainer-1");
    let source = ranks::source(&first, &layout);
    let (target, report) = ranks::refit(target, &[source.publication().unwrap()]);
    assert_eq!((report.plans, report.prepared_reads), (1, 1));
    drop(source);
    drop(first);

    let second = ranks::agent(&network, "trainer-2");
    let mut source = ranks::source(&second, &layout);
    ranks::write(&mut source, &next_version(&oracle::buffers(&layout)));
    let (target, report) = ranks::refit(target, &[source.publication().unwrap()]);
    assert_eq!((report.plans, report.prepared_reads), (0, 1));
    assert_eq!(ranks::held(&target), next_version(&oracle::buffers(&layout)));
}

#[test]
fn other_element_types_are_cast_on_the_way() {
    for (from, into) in [(Dtype::F32, Dtype::Bf16), (Dtype::Bf16, Dtype::F32)] {
        let network = Network::new();
        let (trainer, engine) =
            (ranks::agent(&network, "trainer"), ranks::agent(&network, "engine"));
        let source = ranks::source(&trainer, &whole(0, from));
        let (target, _, canaries) =
            ranks::target(&engine, &whole(0, into), TargetOptions::default());
        let (target, report) = ranks::refit(target, &[source.publication().unwrap()]);
        assert_eq!(ranks::held(&target), oracle::buffers(&whole(0, into)));
        assert_eq!(report.allocations, 1, "a cast lands from staging");
        canaries.check();
    }
}

#[test]
fn a_missing_rank_leaves_the_target_as_it_was() {
    let network = Network::new();
    let (trainer, engine) = (ranks::agent(&network, "trainer"), ranks::agent(&network, "engine"));
    let sources: Vec<_> = models::source(&models::tiny(), 2, 1, 1)
        .iter()
        .map(|layout| ranks::source(&trainer, layout))
        .collect();
    let published: Vec<_> = sources.iter().map(|source| source.publication().unwrap()).collect();
    let layout = models::target(&models::tiny(), 1).remove(0);
    let (target, _, _) = ranks::target(&engine, &layout, TargetOptions::default());
    let before = ranks::held(&target);
    let failed = target.prepare(&published[..1]).unwrap_err();
    assert!(matches!(failed.error, RefitError::Plan(_)), "{}", failed.error);
    assert_eq!(ranks::held(&failed.state), before);
    let (target, _) = ranks::refit(failed.state, &published);
    assert_eq!(ranks::held(&target), oracle::buffers(&layout));
}

/// A source that goes away after the target has prepared.
fn source_that_leaves(
    options: TargetOptions,
) -> (Unfinished<impl refit::transport::Transport>, Buffers, Buffers) {
    let network = Network::new();
    let engine = ranks::agent(&network, "engine");
    let trainer = ranks::agent(&network, "trainer-1");
    let layout = whole(0, Dtype::Bf16);
    let source = ranks::source(&trainer, &layout);
    let published = [source.publication().unwrap()];
    let (target, _, _) = ranks::target(&engine, &layout, options);
    let before = ranks::held(&target);
    let offered = source.offered().unwrap();
    // With nothing to look up first, the first reads are those of data.
    let prepared = target.prepare(&published).unwrap().expecting(&[offered]).unwrap();
    drop(source);
    let failed = match prepared.pull() {
        Err(failed) => failed,
        Ok(pulling) => pulling.wait(ranks::soon()).unwrap_err(),
    };
    assert!(matches!(failed.error, RefitError::Transport(_)), "{}", failed.error);

    // Whatever is left can be refitted from another source.
    let other = ranks::agent(&network, "trainer-2");
    let source = ranks::source(&other, &layout);
    let published = [source.publication().unwrap()];
    let prepared = match failed.state {
        Unfinished::Invalid(target) => target.prepare(&published).unwrap(),
        Unfinished::Whole(target) => {
            assert_eq!(
                ranks::held(&target),
                before,
                "a staged pull that failed wrote live parameters"
            );
            return (Unfinished::Whole(target), before, oracle::buffers(&layout));
        }
        Unfinished::Pulling(_) | Unfinished::Lost => panic!("the reads have settled"),
    };
    let (target, _) =
        prepared.pull().unwrap().wait(ranks::soon()).unwrap().land().unwrap().install().refreshed();
    let held = ranks::held(&target);
    (Unfinished::Whole(target), held, oracle::buffers(&layout))
}

#[test]
fn a_failed_direct_pull_can_only_be_pulled_again() {
    let (_, held, wanted) = source_that_leaves(TargetOptions::default());
    assert_eq!(held, wanted);
}

#[test]
fn a_failed_staged_pull_leaves_live_parameters_alone() {
    let (state, _, _) = source_that_leaves(staged());
    assert!(matches!(state, Unfinished::Whole(_)));
}

#[test]
fn a_deadline_gives_the_pull_back() {
    let network = Network::new();
    let (trainer, engine) = (ranks::agent(&network, "trainer"), ranks::agent(&network, "engine"));
    let layout = whole(0, Dtype::Bf16);
    let source = ranks::source(&trainer, &layout);
    let published = [source.publication().unwrap()];
    let (target, _, _) = ranks::target(&engine, &layout, TargetOptions::default());
    let pulling = target.prepare(&published).unwrap().pull().unwrap();
    let target = match pulling.wait(Instant::now() - Duration::from_secs(1)) {
        // The reads may have settled on the first look; a deadline is not a reason to throw them away.
        Ok(pulled) => pulled.land().unwrap().install().refreshed().0,
        Err(failed) => {
            assert!(matches!(failed.error, RefitError::Deadline { .. }), "{}", failed.error);
            let Unfinished::Pulling(pulling) = failed.state else { panic!("the pull is not over") };
            pulling.wait(ranks::soon()).unwrap().land().unwrap().install().refreshed().0
        }
    };
    assert_eq!(ranks::held(&target), oracle::buffers(&layout));
}

#[test]
fn memory_and_layout_must_agree() {
    let network = Network::new();
    let trainer = ranks::agent(&network, "trainer");
    let pool = ranks::pool(&trainer);
    let layout = whole(3, Dtype::Bf16);
    let new = |params| {
        Source::new(trainer.clone(), &pool, layout.clone(), params).map(|_| ()).unwrap_err()
    };

    let (params, _) = ranks::memory(&whole(3, Dtype::F32));
    assert!(matches!(new(params), RefitError::Size { rank: 3, memory: 960, layout: 480, .. }));
    assert!(matches!(new(Vec::new()), RefitError::NoMemory { rank: 3, .. }));
    let (mut params, _) = ranks::memory(&layout);
    params.push(("v".to_owned(), ranks::memory(&layout).0.remove(0).1));
    assert!(matches!(new(params), RefitError::StrayMemory { rank: 3, .. }));
}

/// A target that goes from one copy of a trainer to another and back finds everything as it left it. Once it has gone to
/// very many others, it meets the first again.
#[test]
fn a_target_goes_back_to_a_source_it_has_left() {
    let network = Network::new();
    let layout = &models::source(&models::tiny(), 1, 1, 1)[0];
    let wanted = models::target(&models::tiny(), 1).remove(0);
    let copies: Vec<_> = (0..70)
        .map(|copy| ranks::source(&ranks::agent(&network, &format!("trainer-{copy}")), layout))
        .collect();
    let published: Vec<_> = copies.iter().map(|copy| [copy.publication().unwrap()]).collect();
    let engine = ranks::agent(&network, "engine");
    let (mut target, _, _) = ranks::target(&engine, &wanted, TargetOptions::default());
    for (copy, built) in [(0, true), (1, true), (0, false), (1, false), (0, false)] {
        let (next, report) = ranks::refit(target, &published[copy]);
        target = next;
        assert_eq!(report.prepared_reads > 0, built, "copy {copy}");
    }
    for copy in published.iter().chain(&published[..2]) {
        (target, _) = ranks::refit(target, copy);
        assert_eq!(ranks::held(&target), oracle::buffers(&wanted));
    }
}
