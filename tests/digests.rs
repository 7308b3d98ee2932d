//! Digests: what has landed is what the sources hold, byte for byte, or the refit says where it is not.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::collections::BTreeMap;
use std::ptr;

use proptest::prelude::*;
use proptest::test_runner::Config;
use refit::planner::{
    Dim, LowerOptions, Mode, Plan, PlanOptions, RankLayout, SourceLayout, Transform, plan,
};
use refit::transport::local::{LocalTransport, Network};
use refit::{
    DigestRequest, DigestRequestError, Digests, Failed, InvalidTarget, Landed, Prepared,
    Publication, RefitError, Source, Target, TargetOptions,
};
use refit_tests::fuzz::mutate::Random;
use refit_tests::oracle::{self, Buffers};
use refit_tests::strategies::{Model, model};
use refit_tests::{models, ranks};
use twox_hash::XxHash3_64;

type Local = LocalTransport;

struct World {
    sources: Vec<Source<Local>>,
    published: Vec<Publication>,
    target: Target<Local>,
    /// Address and length of every parameter.
    held: Vec<(u64, usize)>,
}

fn world(sources: &[RankLayout], target: &RankLayout, options: TargetOptions) -> World {
    let network = Network::new();
    let (trainer, engine) = (ranks::agent(&network, "trainer"), ranks::agent(&network, "engine"));
    let sources: Vec<_> = sources.iter().map(|layout| ranks::source(&trainer, layout)).collect();
    let published = sources.iter().map(|source| source.publication().unwrap()).collect();
    let (target, _, _) = ranks::target(&engine, target, options);
    let held = target.params().map(|(_, memory)| (memory.address(), memory.len())).collect();
    World { sources, published, target, held }
}

fn answers(sources: &[Source<Local>], request: &DigestRequest) -> Vec<Digests> {
    let sent = DigestRequest::decode(&request.encode()).unwrap();
    assert_eq!((&sent, sent.encode()), (request, request.encode()));
    sources.iter().map(|source| source.digests(&sent).unwrap()).collect()
}

fn land(prepared: Prepared<Local>) -> Landed<Local> {
    prepared.pull().unwrap().wait(ranks::soon()).unwrap().land().unwrap()
}

/// The bytes of a strided piece, one after the other.
fn gathered(bytes: &[u8], start: u64, run: u64, dims: &[Dim], stride: fn(&Dim) -> u64) -> Vec<u8> {
    let Some((dim, inner)) = dims.split_first() else {
        let start = usize::try_from(start).unwrap();
        return bytes[start..start + usize::try_from(run).unwrap()].to_vec();
    };
    (0..dim.count)
        .flat_map(|step| gathered(bytes, start + step * stride(dim), run, inner, stride))
        .collect()
}

/// What every segment of a plan has to hash to, by source rank, taken from what the target has to hold.
fn expected(plan: &Plan, wanted: &Buffers) -> BTreeMap<u32, Vec<u64>> {
    let mut expected: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
    for (number, source) in plan.sources().iter().enumerate() {
        let of_source = plan.segments().iter().filter(|segment| segment.source as usize == number);
        for segment in of_source {
            let held = &wanted[&*plan.targets()[segment.target as usize].name];
            let dims = segment.dims.as_slice();
            let stride = |dim: &Dim| dim.target_stride;
            let run = segment.target_run();
            let bytes = gathered(held, segment.target_offset, run, dims, stride);
            expected.entry(source.rank).or_default().push(XxHash3_64::oneshot(&bytes));
        }
    }
    expected
}

fn agree(model: &Model) {
    let layout = SourceLayout::new(model.source.clone()).unwrap();
    for target in &model.target {
        let plan = plan(&layout, target, &PlanOptions::default()).unwrap();
        let World { sources, published, target, .. } =
            world(&model.source, target, TargetOptions::default());
        let wanted = oracle::wanted(target.layout(), &model.source);
        let prepared = target.prepare(&published).unwrap();
        let request = prepared.digest_request();
        assert_eq!(request, DigestRequest::new(&plan));
        let answers = answers(&sources, &request);
        let expected = expected(&plan, &wanted);
        for answer in &answers {
            let wanted = expected.get(&answer.rank).cloned().unwrap_or_default();
            assert_eq!(answer.values, wanted, "rank {}", answer.rank);
        }
        let (target, _) = land(prepared).verify(&answers).unwrap().install().refreshed();
        assert_eq!(ranks::held(&target), wanted);
    }
}

proptest! {
    #![proptest_config(Config { failure_persistence: None, ..Config::with_cases(200) })]

    /// Sources, whose bytes are transformed and lie otherwise, and an oracle that has only the result, hash the same.
    #[test]
    fn both_sides_agree_on_every_pair_of_layouts(model in model()) {
        agree(&model);
    }
}

/// Changes landed bytes as no error of ours would be found doing it.
fn strike(address: u64, len: usize, how: impl FnOnce(&mut [u8])) {
    let start = ptr::with_exposed_provenance_mut::<u8>(usize::try_from(address).unwrap());
    // SAFETY: the parameter is allocated for as long as the test's target is there, nothing reads or writes it while a
    // refit has landed and is not installed, and this slice is gone when the function returns.
    how(unsafe { std::slice::from_raw_parts_mut(start, len) });
}

/// What a refit whose landed bytes were struck says; the target goes on.
fn struck(
    prepared: Prepared<Local>,
    answers: &[Digests],
    strike: impl FnOnce(),
) -> (RefitError, InvalidTarget<Local>) {
    let landed = land(prepared);
    strike();
    match landed.verify(answers) {
        Ok(_) => panic!("corrupt bytes were not found"),
        Err(Failed { error, state }) => (error, state),
    }
}

/// Swaps two words of two bytes, and says whether that changed anything.
fn swap_words(a: u64, b: u64) -> bool {
    let mut changed = false;
    if a != b {
        strike(a, 2, |a| {
            strike(b, 2, |b| {
                changed = a != b;
                a.swap_with_slice(b);
            });
        });
    }
    changed
}

/// P13: 10,000 single-bit flips, and 10,000 words swapped: half of them within 4 KiB, half with any word of any parameter.
#[test]
fn p13_flipped_bits_and_swapped_words_are_found() {
    let layouts = models::source(&models::tiny(), 2, 1, 1);
    let wanted = models::target(&models::tiny(), 1).remove(0);
    let World { sources, published, target, held } =
        world(&layouts, &wanted, TargetOptions::default());
    let names: Vec<String> = target.params().map(|(name, _)| name.to_owned()).collect();
    let prepared = target.prepare(&published).unwrap();
    let answers = answers(&sources, &prepared.digest_request());
    let (target, _) = land(prepared).verify(&answers).unwrap().install().refreshed();
    let total: usize = held.iter().map(|(_, len)| len).sum();
    println!("{total} bytes in {} parameters", held.len());

    let mut random = Random::new(13);
    let mut state = None;
    let mut first = Some(target);
    let mut missed = 0;
    for case in 0..20_000 {
        let prepared = match (first.take(), state.take()) {
            (Some(target), _) => target.prepare(&published).unwrap(),
            (None, Some(target)) => InvalidTarget::prepare(target, &published).unwrap(),
            (None, None) => unreachable!("the target comes back"),
        };
        let (number, at) = place(&mut random, &held);
        let (address, len) = held[number];
        let landed = land(prepared);
        // Words lie at even places, and every parameter has whole ones.
        let word = address + at as u64 / 2 * 2;
        let (mut other, mut changed) = (number, true);
        match case % 4 {
            0 | 2 => strike(address, len, |bytes| bytes[at] ^= 1 << random.below(8)),
            1 => {
                let window = at / 4096 * 4096..(at / 4096 * 4096 + 4096).min(len);
                let near = window.start + 2 * random.below(window.len() / 2);
                changed = swap_words(word, address + near as u64);
            }
            _ => {
                let (far, at) = place(&mut random, &held);
                changed = swap_words(word, held[far].0 + at as u64 / 2 * 2);
                other = far;
            }
        }
        match landed.verify(&answers) {
            Ok(landed) => {
                missed += usize::from(changed);
                first = Some(landed.install().refreshed().0);
            }
            Err(Failed { error, state: target }) => {
                let RefitError::Corrupt { param, start, end, .. } = &error else {
                    panic!("{error}")
                };
                let found = names.iter().position(|name| name == param).unwrap();
                assert!(changed && (found == number || found == other), "{error}");
                assert!(start < end && *end <= held[found].1 as u64, "{error}");
                state = Some(target);
            }
        }
    }
    assert_eq!(missed, 0);
}

/// P13: 1,000 times one shard of a parameter in the place of another of its size.
#[test]
fn p13_swapped_shards_are_found() {
    const SWAPS: usize = 1_000;
    let mut config = models::tiny();
    config.num_layers = 16;
    let layouts = models::source(&config, 2, 1, 1);
    let wanted = models::target(&config, 1).remove(0);
    let World { sources, published, target, held } =
        world(&layouts, &wanted, TargetOptions::default());
    let prepared = target.prepare(&published).unwrap();
    let answers = answers(&sources, &prepared.digest_request());
    let (error, mut target) = struck(prepared, &answers, || {
        strike(held[0].0, 1, |bytes| bytes[0] ^= 1);
    });
    assert!(matches!(error, RefitError::Corrupt { .. }), "{error}");
    let pairs = held
        .iter()
        .enumerate()
        .flat_map(|(at, a)| held[at + 1..].iter().filter(|b| a.1 == b.1).map(|b| (*a, *b)));
    let mut pairs: Vec<_> = pairs.collect();
    println!("{} pairs of one size among {} parameters", pairs.len(), held.len());
    // Large and small ones alike.
    let mut random = Random::new(14);
    assert!(pairs.len() >= SWAPS);
    for _ in 0..SWAPS {
        let ((from, len), (into, _)) = pairs.swap_remove(random.below(pairs.len()));
        let prepared = target.prepare(&published).unwrap();
        let (error, state) = struck(prepared, &answers, || {
            strike(from, len, |a| strike(into, len, |b| a.swap_with_slice(b)));
        });
        assert!(matches!(error, RefitError::Corrupt { rank: Some(_), .. }), "{error}");
        target = state;
    }
    let landed = land(target.prepare(&published).unwrap()).verify(&answers).unwrap();
    let (target, _) = landed.install().refreshed();
    assert_eq!(ranks::held(&target), oracle::buffers(&wanted));
}

/// A byte of all parameters: in which of them, and where.
fn place(random: &mut Random, held: &[(u64, usize)]) -> (usize, usize) {
    let mut at = random.below(held.iter().map(|(_, len)| len).sum());
    for (number, (_, len)) in held.iter().enumerate() {
        match at.checked_sub(*len) {
            Some(rest) => at = rest,
            None => return (number, at),
        }
    }
    unreachable!("it is below the sum")
}

#[test]
fn zeros_have_to_be_zero() {
    // The padding of a vocabulary that three ranks share is nobody's.
    let layouts = models::source(&models::tiny(), 1, 1, 1);
    let mut found = 0;
    for wanted in models::target(&models::tiny(), 4) {
        let World { sources, published, target, held } =
            world(&layouts, &wanted, TargetOptions::default());
        let filled: Vec<usize> = (0..held.len())
            .filter(|number| wanted.params()[*number].fill_boxes().count() > 0)
            .collect();
        let prepared = target.prepare(&published).unwrap();
        let answers = answers(&sources, &prepared.digest_request());
        let Some(&number) = filled.first() else { continue };
        let (address, len) = held[number];
        // Filled rows are the last.
        let (error, _) =
            struck(prepared, &answers, || strike(address, len, |bytes| bytes[len - 1] = 1));
        let RefitError::Corrupt { rank: None, param, end, .. } = error else { panic!("{error}") };
        assert_eq!((&*param, end), (&**wanted.params()[number].name(), len as u64));
        found += 1;
    }
    assert!(found > 0, "no rank has padding");
}

#[test]
fn answers_are_to_this_request_and_of_this_version() {
    let layouts = models::source(&models::tiny(), 2, 1, 1);
    let wanted = models::target(&models::tiny(), 1).remove(0);
    let options =
        TargetOptions::default().with_lower(LowerOptions::default().with_mode(Mode::Staged));
    let World { mut sources, published, target, .. } = world(&layouts, &wanted, options);
    let prepared = target.prepare(&published).unwrap();
    let request = prepared.digest_request();
    let good = answers(&sources, &request);
    assert!(good.iter().all(|answer| answer.values.len() > 3));
    let mut target = match land(prepared).verify(&good[..1]) {
        Err(Failed { error: RefitError::NoDigests { rank: 1 }, state }) => state,
        other => panic!("{other:?}"),
    };
    let change = |how: fn(&mut Digests)| {
        let mut changed = good.clone();
        how(&mut changed[1]);
        changed
    };
    type Is = fn(&RefitError) -> bool;
    let cases: [(Vec<Digests>, Is); 5] = [
        (change(|answer| answer.request[0] ^= 1), |e| {
            matches!(e, RefitError::OtherDigests { rank: 1 })
        }),
        (change(|answer| answer.values.truncate(2)), |e| {
            matches!(e, RefitError::OtherDigests { rank: 1 })
        }),
        (change(|answer| answer.incarnation ^= 1), |e| {
            matches!(e, RefitError::StaleIncarnation { rank: 1, .. })
        }),
        (change(|answer| answer.stamp.epoch += 2), |e| {
            matches!(e, RefitError::Torn { rank: 1, .. })
        }),
        (change(|answer| answer.values[2] ^= 1), |e| {
            matches!(e, RefitError::Corrupt { rank: Some(1), .. })
        }),
    ];
    for (answers, is) in cases {
        let landed = land(target.prepare(&published).unwrap());
        let Err(Failed { error, state }) = landed.verify(&answers) else { panic!("accepted") };
        assert!(is(&error), "{error}");
        target = state;
    }
    land(target.prepare(&published).unwrap()).verify(&good).unwrap();

    drop(sources[0].begin_update().unwrap());
    let error = sources[0].digests(&request).unwrap_err();
    assert!(matches!(error, RefitError::BeingWritten { rank: 0 }), "{error}");
    // A rank that holds less than was asked of it says so, and one that was not asked has nothing to say.
    let network = Network::new();
    let other = ranks::agent(&network, "other");
    let halves = models::source(&models::tiny(), 4, 1, 1);
    let error = ranks::source(&other, &halves[0]).digests(&request).unwrap_err();
    assert!(matches!(error, RefitError::AskedOutside { rank: 0, .. }), "{error}");
    assert!(ranks::source(&other, &halves[3]).digests(&request).unwrap().values.is_empty());
}

#[test]
fn requests_are_whole_or_refused() {
    let source = SourceLayout::new(models::source(&models::tiny(), 2, 1, 1)).unwrap();
    let target = models::target(&models::tiny(), 1).remove(0);
    let plan = plan(&source, &target, &PlanOptions::default()).unwrap();
    let sent = DigestRequest::new(&plan);
    assert_eq!(sent.ranks().map(|(_, pieces)| pieces).sum::<usize>(), plan.segments().len());
    let bytes = sent.encode();
    for end in 0..bytes.len() {
        assert!(DigestRequest::decode(&bytes[..end]).is_err(), "cut off after {end} bytes");
    }
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(DigestRequest::decode(&damaged).is_err(), "bit {bit} flipped");
    }
    assert_eq!(DigestRequest::decode(b"refit").unwrap_err(), DigestRequestError::Magic);
    assert!(plan.segments().iter().any(|segment| segment.transform == Transform::Copy));
}
