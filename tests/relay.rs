//! Targets that lend what they hold: one more replica, of the same bytes.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use proptest::prelude::*;
use proptest::test_runner::Config;
use refit::planner::{Dtype, PlanError, RankLayout};
use refit::transport::Progress;
use refit::transport::local::{LocalOptions, LocalTransport, Network};
use refit::{Expected, Lent, Publication, RefitError, Source, TargetOptions, Unfinished};
use refit_tests::oracle::{self, Buffers};
use refit_tests::strategies::{Model, model};
use refit_tests::{models, packing, ranks};
use refit_translate::megatron::{SourceRank, TrainerOptions};

type Local = LocalTransport;

fn sources(network: &Network, layouts: &[RankLayout]) -> Vec<Source<Local>> {
    let trainer = ranks::agent(network, "trainer");
    layouts.iter().map(|layout| ranks::source(&trainer, layout)).collect()
}

fn published(sources: &[Source<Local>]) -> Vec<Publication> {
    sources.iter().map(|source| source.publication().unwrap()).collect()
}

/// The target ranks of a layout each, refitted from these and lent as ranks from `first` on.
fn lent(
    network: &Network,
    layouts: &[RankLayout],
    from: &[Publication],
    first: u32,
) -> Vec<Lent<Local>> {
    let lend = |layout: &RankLayout| {
        let engine = ranks::agent(network, &format!("engine-{}", layout.rank()));
        let (target, _, _) = ranks::target(&engine, layout, TargetOptions::default());
        let (target, _) = ranks::refit(target, from);
        target.lend(first + layout.rank()).unwrap()
    };
    layouts.iter().map(lend).collect()
}

fn offered(lent: &[Lent<Local>]) -> Vec<Expected> {
    lent.iter().map(|lent| lent.offered().unwrap()).collect()
}

/// Refits a target from these, and takes what it holds.
fn pulled(network: &Network, name: &str, layout: &RankLayout, from: &[Publication]) -> Buffers {
    let engine = ranks::agent(network, name);
    let (target, _, canaries) = ranks::target(&engine, layout, TargetOptions::default());
    let (target, _) = ranks::refit(target, from);
    canaries.check();
    ranks::held(&target)
}

#[test]
fn a_fleet_fills_as_a_tree() {
    let network = Network::new();
    let mut trainer = sources(&network, &models::source(&models::tiny(), 4, 1, 1));
    let from_trainer = published(&trainer);
    let halves = models::target(&models::tiny(), 2);
    let whole = models::target(&models::tiny(), 1).remove(0);
    let mut relays = lent(&network, &halves, &from_trainer, 100);
    assert!(relays.iter().all(|relay| relay.withheld().count() == 0));
    let from_relays: Vec<_> = relays.iter().map(|relay| relay.publication().unwrap()).collect();

    // From relays alone: nothing is read of the trainer.
    let engine = ranks::agent(&network, "second");
    let (target, _, canaries) = ranks::target(&engine, &whole, TargetOptions::default());
    let prepared = target.prepare(&from_relays).unwrap().expecting(&offered(&relays)).unwrap();
    assert!(prepared.program().sources().iter().all(|source| source.rank >= 100));
    let request = prepared.digest_request();
    let answers: Vec<_> = relays.iter().map(|relay| relay.digests(&request).unwrap()).collect();
    let landed = prepared.pull().unwrap().wait(ranks::soon()).unwrap().land().unwrap();
    let (mut target, report) = landed.verify(&answers).unwrap().install().refreshed();
    assert_eq!((ranks::held(&target), report.version), (oracle::buffers(&whole), Some(1)));

    // From both: where they hold as much of what is wanted, they are replicas of one another.
    let both = [from_trainer.clone(), from_relays.clone()].concat();
    let mut asked = Vec::new();
    for layout in models::target(&models::tiny(), 4) {
        let engine = ranks::agent(&network, &format!("third-{}", layout.rank()));
        let (mixed, _, _) = ranks::target(&engine, &layout, TargetOptions::default());
        let prepared = mixed.prepare(&both).unwrap();
        asked.extend(prepared.program().sources().iter().map(|source| source.rank));
        let pulled = prepared.pull().unwrap().wait(ranks::soon()).unwrap();
        let (mixed, _) = pulled.land().unwrap().install().refreshed();
        assert_eq!(ranks::held(&mixed), oracle::buffers(&layout));
    }
    assert!(asked.iter().any(|rank| *rank < 4) && asked.iter().any(|rank| *rank >= 100));

    // The next versions pass through the same reads: nothing is planned, registered or bound anew.
    for version in 2..5 {
        let mut next = Vec::new();
        for (source, layout) in trainer.iter_mut().zip(models::source(&models::tiny(), 4, 1, 1)) {
            let held = oracle::buffers(&layout);
            ranks::write(source, &if version % 2 == 0 { packing::next(&held) } else { held });
        }
        for relay in relays {
            let rank = relay.layout().rank();
            let (target, warm) = ranks::refit(relay.take_back().unwrap(), &from_trainer);
            let counts = (warm.plans, warm.registrations, warm.prepared_reads, warm.version);
            assert_eq!(counts, (0, 0, 0, Some(version)));
            next.push(target.lend(rank).unwrap());
        }
        relays = next;
        for (relay, before) in relays.iter().zip(&from_relays) {
            assert_eq!(relay.publication().unwrap().digest(), before.digest());
        }
        let prepared = target.prepare(&from_relays).unwrap().expecting(&offered(&relays)).unwrap();
        let pulled = prepared.pull().unwrap().wait(ranks::soon()).unwrap();
        let (next, warm) = pulled.land().unwrap().install().refreshed();
        let counts = (warm.plans, warm.registrations, warm.prepared_reads, warm.version);
        assert_eq!(counts, (0, 0, 0, Some(version)));
        let wanted = oracle::buffers(&whole);
        let wanted = if version % 2 == 0 { packing::next(&wanted) } else { wanted };
        for (name, bytes) in ranks::held(&next) {
            let filled = whole.param(&name).unwrap().fill_boxes().count() > 0;
            assert!(filled || bytes == wanted[&name], "{name}");
        }
        target = next;
    }
    canaries.check();
}

#[test]
fn what_is_taken_back_while_it_is_read_is_torn() {
    let network = Network::new();
    let trainer = sources(&network, &models::source(&models::tiny(), 1, 1, 1));
    let layout = models::target(&models::tiny(), 1).remove(0);
    let relay = lent(&network, std::slice::from_ref(&layout), &published(&trainer), 7).remove(0);
    let from = [relay.publication().unwrap()];
    let options = LocalOptions::default().with_bytes_per_poll(1_000);
    let engine = LocalTransport::with_options(&network, "second", options).unwrap();
    let (target, _, _) =
        ranks::target(&std::sync::Arc::new(engine), &layout, TargetOptions::default());
    let prepared = target.prepare(&from).unwrap().expecting(&[relay.offered().unwrap()]).unwrap();
    let mut pulling = prepared.pull().unwrap();
    assert_eq!(pulling.poll(), Progress::Pending);
    let _target = relay.take_back().unwrap();
    let failed = pulling.wait(ranks::soon()).unwrap_err();
    assert!(matches!(failed.error, RefitError::Torn { rank: 7, .. }), "{}", failed.error);
    assert!(matches!(failed.state, Unfinished::Invalid(_)));
}

#[test]
fn what_is_not_the_trainer_s_is_not_lent() {
    let network = Network::new();
    let layout = models::target(&models::tiny(), 1).remove(0);
    // Nothing was refitted.
    let engine = ranks::agent(&network, "engine");
    let (target, _, _) = ranks::target(&engine, &layout, TargetOptions::default());
    let failed = target.lend(9).unwrap_err();
    assert!(matches!(failed.error, RefitError::NothingInstalled), "{}", failed.error);
    // The engine has loaded its own.
    let trainer = sources(&network, &models::source(&models::tiny(), 1, 1, 1));
    let (mut target, _) = ranks::refit(failed.state, &published(&trainer));
    drop(target.params_mut());
    let failed = target.lend(9).unwrap_err();
    assert!(matches!(failed.error, RefitError::NothingInstalled), "{}", failed.error);
    assert_eq!(ranks::held(&failed.state), oracle::buffers(&layout));

    // All of it was rounded on the way: those who want all digits would get other ones.
    let options = TrainerOptions::default().with_dtype(Dtype::F32);
    let ranks = SourceRank::grid(models::tiny().num_layers, 1, 1, 1).unwrap();
    let network = Network::new();
    let trainer = sources(&network, &models::source_ranks(&models::tiny(), &ranks, &options));
    let engine = ranks::agent(&network, "engine");
    let (target, _, _) = ranks::target(&engine, &layout, TargetOptions::default());
    let (target, _) = ranks::refit(target, &published(&trainer));
    let failed = target.lend(9).unwrap_err();
    let all = layout.params().len();
    assert!(matches!(failed.error, RefitError::NothingToLend { params } if params == all));
    assert_eq!(ranks::held(&failed.state), oracle::buffers(&layout));
}

/// Every rank relays, and each is then read by another with and without the trainer.
fn through_relays(model: &Model) {
    let network = Network::new();
    let trainer = sources(&network, &model.source);
    let from_trainer = published(&trainer);
    let mut relays = Vec::new();
    for layout in &model.target {
        let engine = ranks::agent(&network, &format!("engine-{}", layout.rank()));
        let (target, _, _) = ranks::target(&engine, layout, TargetOptions::default());
        let (target, _) = ranks::refit(target, &from_trainer);
        let held = ranks::held(&target);
        match target.lend(100 + layout.rank()) {
            Ok(relay) => {
                let lent = relay
                    .params()
                    .map(|(name, memory)| (name.to_owned(), memory.host_bytes().unwrap().to_vec()));
                assert_eq!(lent.collect::<Buffers>(), held);
                assert_eq!(relay.layout().params().len() + relay.withheld().count(), held.len());
                let publication = relay.publication().unwrap();
                Publication::decode(&publication.encode()).unwrap();
                relays.push(relay);
            }
            Err(failed) => {
                let named = matches!(
                    failed.error,
                    RefitError::NothingToLend { .. } | RefitError::NothingInstalled
                );
                assert!(named, "{}", failed.error);
                assert_eq!(ranks::held(&failed.state), held);
            }
        }
    }
    let from_relays: Vec<_> = relays.iter().map(|relay| relay.publication().unwrap()).collect();
    let both = [from_trainer, from_relays.clone()].concat();
    for layout in &model.target {
        let wanted = oracle::wanted(layout, &model.source);
        let name = format!("both-{}", layout.rank());
        assert_eq!(pulled(&network, &name, layout, &both), wanted);

        let engine = ranks::agent(&network, &format!("relays-{}", layout.rank()));
        let (target, _, _) = ranks::target(&engine, layout, TargetOptions::default());
        match target.prepare(&from_relays) {
            Ok(prepared) => {
                let pulled = prepared.pull().unwrap().wait(ranks::soon()).unwrap();
                let (target, _) = pulled.land().unwrap().install().refreshed();
                assert_eq!(ranks::held(&target), wanted);
            }
            // Some of it was withheld by all of them.
            Err(failed) => {
                let uncovered =
                    matches!(failed.error, RefitError::Plan(PlanError::Uncovered { .. }));
                assert!(uncovered, "{}", failed.error);
            }
        }
    }
    relays.into_iter().for_each(|relay| drop(relay.take_back().unwrap()));
}

proptest! {
    #![proptest_config(Config { failure_persistence: None, ..Config::with_cases(150) })]

    /// Whoever is read, the trainer, relays or both: the bytes are the same, or there is an error with a name.
    #[test]
    fn relays_hold_what_the_trainer_holds(model in model()) {
        through_relays(&model);
    }
}
