//! P5: no arithmetic on a peer's numbers wraps. Whatever a peer writes as a number is 0, 1, 2³¹, 2³², 2⁶³, 2⁶⁴ - 1 or a
//! neighbour here, one to four of them at a time: nothing panics, and what is accepted is in range, counted in 128 bits.
//!
//! The mirrors below spell numbers as the formats do, so that none of a type's own checks is in the way.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "the lints spare test functions, not what they call"
)]

#[path = "corners/messages.rs"]
mod messages;
#[path = "corners/metadata.rs"]
mod metadata;
#[path = "corners/publications.rs"]
mod publications;
#[path = "corners/requests.rs"]
mod requests;

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};
use refit::transport::local::Network;
use refit_tests::{corners, ranks};

/// How many times each format is tried, beside every number at every corner alone.
fn cases() -> u32 {
    std::env::var("REFIT_CORNER_CASES").map_or(4_000, |cases| cases.parse().unwrap())
}

/// Calls `check` with `numbers` of which one is replaced by each corner, and with some of which a few are.
fn each(numbers: usize, check: impl Fn(&[(usize, u64)])) {
    println!("{} inputs", numbers * corners::CORNERS.len() + cases() as usize);
    for at in 0..numbers {
        corners::CORNERS.iter().for_each(|&value| check(&[(at, value)]));
    }
    let config = Config { failure_persistence: None, ..Config::with_cases(cases()) };
    let replaced = |all: Vec<(Index, u64)>| -> Vec<(usize, u64)> {
        all.into_iter().map(|(at, value)| (at.index(numbers), value)).collect()
    };
    TestRunner::new(config)
        .run(&corners::replacements().prop_map(replaced), |replaced| {
            check(&replaced);
            Ok(())
        })
        .unwrap();
}

/// Bytes under the magic of `like` and a digest that is right.
fn sealed(like: &[u8], body: &[u8]) -> Vec<u8> {
    [&like[..8], blake3::hash(body).as_bytes(), body].concat()
}

#[test]
fn p05_reads_at_the_corners() {
    let network = Network::new();
    let (source, target) = (ranks::agent(&network, "source"), ranks::agent(&network, "target"));
    let (accepted, refused) = corners::reads(&*source, &*target, 4 * cases());
    println!("{accepted} accepted, {refused} refused");
    assert!(accepted > 10 && refused > 1_000, "{accepted} accepted, {refused} refused");
}

/// Where numbers of a peer enter, `clippy::arithmetic_side_effects` is denied, and `docs/promises.md` says so.
#[test]
fn p05_the_lint_is_denied_where_numbers_enter() {
    const LINT: &str = "#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]\n";
    const DOORS: [&str; 22] = [
        "planner/src/raw.rs",
        "planner/src/layout.rs",
        "planner/src/dims.rs",
        "planner/src/transform.rs",
        "translate/src/bands/json.rs",
        "translate/src/bands/shape.rs",
        "translate/src/bands/written.rs",
        "transport/src/envelope.rs",
        "transport/src/registry.rs",
        "transport/src/reads.rs",
        "transport/src/nixl/transport.rs",
        "transport/src/peer/blob.rs",
        "transport/src/auto/blob.rs",
        "refit/src/publication.rs",
        "refit/src/request.rs",
        "refit/src/digest.rs",
        "refit/src/header.rs",
        "refit/src/bind.rs",
        "service/src/message.rs",
        "service/src/groups.rs",
        "service/src/keys.rs",
        "service/src/rendezvous/sealed/envelope.rs",
    ];
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    let table = read("docs/promises.md");
    for door in DOORS {
        assert!(read(&format!("crates/{door}")).contains(LINT), "{door} does not deny the lint");
        let (krate, module) = door.split_once("/src/").unwrap();
        let module = module.trim_end_matches(".rs");
        let line = table.lines().find(|line| line.starts_with(&format!("| `{krate}` |")));
        let named = line.is_some_and(|line| line.contains(&format!("`{module}`")));
        assert!(named, "`{module}` of `{krate}` is not in docs/promises.md");
    }
}
