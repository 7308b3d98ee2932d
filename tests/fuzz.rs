//! The fuzz targets as a plain test: the saved corpus, and mutations of it. No input may panic, take more memory than
//! its target states, or much time.
//!
//! `REFIT_FUZZ_RUNS` is how many mutations each target gets, `REFIT_FUZZ_SEED` where they start, `REFIT_FUZZ_CORPUS` a
//! folder with another corpus to take besides, as libFuzzer leaves one in `fuzz/corpus`. What fails is written to a file,
//! which belongs into `tests/fuzz/corpus` with the fix.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "the lints spare test functions, not what they call"
)]

use std::fs;
use std::panic;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use refit::planner::{Band, Dtype, LayoutBuilder, Param, RankLayout};
use refit::{DigestRequest, PackRequest, Place, Publication, PublishedHeader, PublishedRegion};
use refit_tests::allocations::{self, Counting};
use refit_tests::fuzz::mutate::{Random, mutate};
use refit_tests::fuzz::{TARGETS, Target};
use refit_translate::bands;

#[global_allocator]
static GLOBAL: Counting = Counting;

/// Mutations of each target, a few seconds' worth.
const RUNS: u64 = 20_000;

/// Of files of so many bytes, every truncation and every flipped bit is tried.
const SMALL: usize = 256;

/// Far more than any input takes on a slow machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// What an input came to.
struct Outcome {
    peak: usize,
    took: Duration,
}

/// Runs one input; where it fails, saves it and says so.
fn check(target: Target, data: &[u8], what: &str) -> Outcome {
    let started = Instant::now();
    let (result, peak) = allocations::peak(|| panic::catch_unwind(|| (target.run)(data)));
    let took = started.elapsed();
    let bound = target.bound(data.len());
    let failure = match result {
        Err(_) => "it panicked".to_owned(),
        Ok(()) if peak > bound => format!("it took {peak} bytes, more than {bound}"),
        Ok(()) if took > PATIENCE => format!("it took {took:?}"),
        Ok(()) => return Outcome { peak, took },
    };
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{}", target.name));
    fs::write(&file, data).unwrap();
    panic!(
        "{} of {} bytes, {what}: {failure}; it is in {}",
        target.name,
        data.len(),
        file.display()
    );
}

/// The saved inputs of a target, by name.
fn corpus(target: Target) -> Vec<(String, Vec<u8>)> {
    inputs(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target.name))
}

fn inputs(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "no input in {}", folder.display());
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    files.iter().map(|path| (name(path), fs::read(path).unwrap())).collect()
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name} is `{text}`, not a number"))
    })
}

fn fuzz(name: &str) {
    let target = *TARGETS.iter().find(|target| target.name == name).unwrap();
    let mut corpus = corpus(target);
    if let Some(folder) = std::env::var_os("REFIT_FUZZ_CORPUS") {
        corpus.extend(inputs(&Path::new(&folder).join(target.name)));
    }
    let (mut peak, mut slowest) = (0, Duration::ZERO);
    let mut record = |outcome: Outcome| {
        peak = peak.max(outcome.peak);
        slowest = slowest.max(outcome.took);
    };
    for (name, data) in &corpus {
        record(check(target, data, &format!("corpus file {name}")));
        if data.len() > SMALL {
            continue;
        }
        for end in 0..data.len() {
            record(check(target, &data[..end], &format!("{name}, its first {end} bytes")));
        }
        for bit in 0..8 * data.len() {
            let mut flipped = data.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            record(check(target, &flipped, &format!("{name}, bit {bit} flipped")));
        }
    }
    let (runs, seed) = (setting("REFIT_FUZZ_RUNS", RUNS), setting("REFIT_FUZZ_SEED", 1));
    for run in 0..runs {
        // A seed for each run: any of them can be repeated alone.
        let mut random = Random::new(seed.wrapping_mul(1 << 32).wrapping_add(run));
        let ((name, base), (_, other)) = (random.pick(&corpus), random.pick(&corpus));
        let data = mutate(&mut random, base, other);
        record(check(target, &data, &format!("run {run} of seed {seed}, from {name}")));
    }
    println!(
        "{name}: {} files and {runs} mutations, at most {peak} bytes and {slowest:?}",
        corpus.len()
    );
}

#[test]
fn configurations() {
    fuzz("config");
}

#[test]
fn cases() {
    fuzz("case");
}

#[test]
fn layouts_from_outside() {
    fuzz("bands");
}

#[test]
fn publications() {
    fuzz("publication");
}

#[test]
fn requests() {
    fuzz("request");
}

#[test]
fn requests_for_digests() {
    fuzz("digests");
}

#[test]
fn messages_of_the_service() {
    fuzz("messages");
}

#[test]
fn sealed_values() {
    fuzz("seal");
}

#[test]
fn metadata_of_agents() {
    fuzz("metadata");
}

#[test]
fn the_corpus_is_small() {
    let sizes = TARGETS.iter().flat_map(|&target| corpus(target));
    let bytes: usize = sizes.map(|(_, data)| data.len()).sum();
    assert!(bytes < 300 << 10, "{bytes} bytes of corpus");
}

/// One more than a list that grows by doubling holds.
const MANY: usize = (1 << 16) + 1;

/// Texts that are nothing but many of one thing, said as shortly as can be.
fn dense_texts() -> Vec<(&'static str, String)> {
    let side = |tensors: &str, ranks: &str| {
        format!(r#"{{"schema":1,"side":"source","tensors":{{{tensors}}},"ranks":[{ranks}]}}"#)
    };
    let rank =
        |number: usize, params: &str| format!(r#"{{"rank":{number},"params":{{{params}}}}}"#);
    let many = |count: usize, entry: &dyn Fn(usize) -> String| {
        (0..count).map(entry).collect::<Vec<_>>().join(",")
    };
    let param = |list: &str| format!(r#""p":{{"dtype":"U8","shape":[2],{list}}}"#);
    let band = |_| r#"{"tensor":"t"}"#.to_owned();
    // One element each, so that no two are written twice.
    let copy = |at| format!(r#"{{"tensor":"t","to":{{"offset":{at},"shape":[],"stride":[]}}}}"#);
    let copies = format!(r#""copies":[{}]"#, many(MANY, &copy));
    let spread = r#""p":{"dtype":"U8","shape":[131072],"copies":[{"tensor":"t",
        "from":{"offset":0,"shape":[65536],"stride":[2]},"to":{"offset":0,"shape":[65536],"stride":[1]}}]}"#;
    let empty = |at| format!(r#""{at:x}":{{"dtype":"U8","shape":[],"bands":[]}}"#);
    vec![
        (
            "bands",
            side(r#""t":[1]"#, &rank(0, &param(&format!(r#""bands":[{}]"#, many(MANY, &band))))),
        ),
        (
            "fills",
            side(
                "",
                &rank(
                    0,
                    &param(&format!(
                        r#""bands":[],"fill":[{}]"#,
                        many(MANY, &|_| r#"{"rows":[0,1]}"#.into())
                    )),
                ),
            ),
        ),
        (
            "copies",
            side(r#""t":[]"#, &rank(0, &param(&copies).replace("[2]", &format!("[{MANY}]")))),
        ),
        ("a copy that becomes many bands", side(r#""t":[131072]"#, &rank(0, spread))),
        ("tensors", side(&many(MANY, &|at| format!(r#""{at:x}":[]"#)), "")),
        ("params", side("", &rank(0, &many(MANY, &empty)))),
        ("ranks", side("", &many(MANY / 2 + 1, &|at| rank(at, "")))),
        ("escaped names", side(&many(MANY, &|at| format!(r#""\u0061{at:x}":[]"#)), "")),
        ("shapes", side(&many(MANY, &|at| format!(r#""{at:x}":[1,1,1,1,1,1,1,1]"#)), "")),
    ]
}

/// What the documentation of `refit_translate::bands` promises.
#[test]
fn reading_bands_takes_what_it_says() {
    for (what, text) in dense_texts() {
        let (read, peak) = allocations::peak(|| bands::read(&text));
        let read = read.unwrap_or_else(|error| panic!("{what}: {error}"));
        let captured = if what.contains("cop") {
            read.ranks.iter().flat_map(RankLayout::bands).count()
        } else {
            0
        };
        let bound = 32 * text.len() + 256 * captured + (64 << 10);
        println!("{what}: {} bytes of text took {peak}, {bound} allowed", text.len());
        assert!(peak <= bound, "{what}: {} bytes of text took {peak}, {bound} allowed", text.len());
    }
}

/// Publications of many small things; decoding makes numbers of one byte into numbers of eight.
fn dense_publications() -> Vec<(&'static str, RankLayout)> {
    let (mut bands, mut params, mut tensors) =
        (LayoutBuilder::new(0), LayoutBuilder::new(0), LayoutBuilder::new(0));
    let tensor = bands.tensor("t", 1, 1).unwrap();
    let band = || Band::new(tensor, 0..1, 0..1);
    let one = Param::new("p", Dtype::U8, 1, 1);
    bands.param(one.bands((0..MANY).map(|_| band()))).unwrap();
    for at in 0..MANY {
        params.param(Param::new(format!("{at:x}"), Dtype::U8, 0, 0)).unwrap();
    }
    let mut all = Param::new("p", Dtype::U8, 1, 1);
    for at in 0..MANY {
        let tensor = tensors.tensor(&format!("{at:x}"), 1, 1).unwrap();
        all = all.band(Band::new(tensor, 0..1, 0..1));
    }
    tensors.param(all).unwrap();
    vec![("bands", bands.build()), ("params", params.build()), ("tensors", tensors.build())]
}

/// What the documentation of `refit::Publication::decode` promises.
#[test]
fn decoding_publications_takes_what_it_says() {
    for (what, layout) in dense_publications() {
        let places = layout.params().iter().map(|_| Place { address: 1, cuda: None }).collect();
        let region = PublishedRegion { address: 0, len: 2, cuda: None };
        let own = PublishedRegion { address: 64, len: 64, cuda: None };
        let header = PublishedHeader { incarnation: 0, place: Place { address: 64, cuda: None } };
        let regions = vec![region, own];
        let publication = Publication::new("a".into(), vec![], layout, header, places, regions);
        let bytes = publication.unwrap().encode();
        let (decoded, peak) = allocations::peak(|| Publication::decode(&bytes));
        assert!(decoded.is_ok(), "{what}");
        let bound = 40 * bytes.len() + (4 << 10);
        println!("a publication of {what}: {} bytes took {peak}, {bound} allowed", bytes.len());
        assert!(peak <= bound, "{what}: {} bytes took {peak}, {bound} allowed", bytes.len());
    }
}

/// What the documentation of `refit::PackRequest::decode` promises.
#[test]
fn decoding_requests_takes_what_it_says() {
    for name in ["", "t", "a tensor"] {
        // Target 0, no ranks, then boxes: a name, rows 0..1, columns 0..1.
        let slice = [&[u8::try_from(name.len()).unwrap()], name.as_bytes(), &[0, 1, 0, 1]].concat();
        // 2^16 + 1 as a varint.
        let mut body = vec![0, 0, 0x81, 0x80, 0x04];
        (0..MANY).for_each(|_| body.extend_from_slice(&slice));
        let magic = &PackRequest::nothing(0).encode()[..8];
        let bytes = [magic, blake3::hash(&body).as_bytes(), &body].concat();
        let (decoded, peak) = allocations::peak(|| PackRequest::decode(&bytes));
        assert_eq!(decoded.unwrap().slices().len(), MANY);
        let bound = 40 * bytes.len() + (4 << 10);
        println!("a request of `{name}`: {} bytes took {peak}, {bound} allowed", bytes.len());
        assert!(peak <= bound, "`{name}`: {} bytes took {peak}, {bound} allowed", bytes.len());
    }
}

/// What the documentation of `refit::DigestRequest::decode` promises.
#[test]
fn decoding_requests_for_digests_takes_what_it_says() {
    for (what, piece) in [
        ("copies", &[0_u8, 1, 0, 0][..]),
        ("rows", &[0, 1, 1, 2, 0, 0, 0]),
        ("boxes", &[0, 1, 3, 2, 0, 0, 2, 0, 0, 2, 0, 0, 0]),
    ] {
        // Target 0, one rank 0, one parameter `w`, then 2^16 + 1 pieces.
        let mut body = vec![0, 1, 0, 1, 1, b'w', 0x81, 0x80, 0x04];
        (0..MANY).for_each(|_| body.extend_from_slice(piece));
        let magic = b"refit\0d1".as_slice();
        let bytes = [magic, blake3::hash(&body).as_bytes(), &body].concat();
        let (decoded, peak) = allocations::peak(|| DigestRequest::decode(&bytes));
        assert_eq!(decoded.unwrap().ranks().next(), Some((0, MANY)));
        let bound = 96 * bytes.len() + (4 << 10);
        println!("a request of {what}: {} bytes took {peak}, {bound} allowed", bytes.len());
        assert!(peak <= bound, "{what}: {} bytes took {peak}, {bound} allowed", bytes.len());
    }
}
