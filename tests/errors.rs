//! P18: errors are actionable. What can go wrong between a trainer and an engine is a table of 24 failures, A to X; each
//! is provoked through the public API and has to be one typed error, of its own kind, that names who, what and where as
//! far as that applies, and says what to do.
//!
//! A failure of NIXL's own is provoked over NIXL, in `tests/nixl/errors.rs`, and one that only a GPU has stands here with
//! its reason: the table says of every row which it is.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "the lints spare test functions, not what they call"
)]

#[path = "service/versions/fleet.rs"]
#[allow(dead_code, reason = "the tests of versions use the rest")]
mod fleet;
#[path = "errors/memory.rs"]
mod memory;
#[path = "errors/plans.rs"]
mod plans;
#[path = "errors/refits.rs"]
mod refits;
#[path = "errors/services.rs"]
mod services;

use std::collections::BTreeSet;

/// What a failure came to.
struct Said {
    /// The pattern that the error matched.
    kind: &'static str,
    text: String,
}

/// The error, if it is of this kind.
macro_rules! said {
    ($error:expr, $kind:pat) => {
        match $error {
            error => {
                assert!(matches!(error, $kind), "another kind: {error}");
                $crate::Said { kind: stringify!($kind), text: error.to_string() }
            }
        }
    };
}
pub(crate) use said;

/// How a row of the table is tried.
enum Tried {
    /// In this process: the error, and what its text has to contain, the remedy last.
    Here(fn() -> Said, &'static [&'static str]),
    /// By this test of `tests/nixl`.
    OverNixl(&'static str),
    /// Not without a GPU, for this reason.
    OnADevice(&'static str),
}

use Tried::{Here, OnADevice, OverNixl};

const TABLE: [(char, &str, Tried); 24] = [
    (
        'A',
        "parameters are written while they are read",
        Here(refits::torn, &["source rank 0", "version 1", "being written", "pull again"]),
    ),
    (
        'B',
        "reads that were given up may still write",
        Here(
            memory::quarantined,
            &["2000 bytes in 1 entries", "more than 1000", "end the silent peer"],
        ),
    ),
    (
        'C',
        "memory is deregistered that is to be read",
        Here(memory::deregistered, &["`trainer`", "`engine`", "read 0", "from fresh metadata"]),
    ),
    (
        'D',
        "a trainer restarts",
        Here(refits::restarted, &["source rank 0", "incarnation", "take its new publication"]),
    ),
    (
        'E',
        "a peer dies in the middle of a pull",
        Here(refits::died, &["`trainer`", "`engine`", "connect to its next incarnation"]),
    ),
    (
        'F',
        "a peer falls silent",
        Here(refits::silent, &["source ranks [0]", "`engine`", "have the silent peer ended"]),
    ),
    (
        'G',
        "reads are dropped that have not settled",
        Here(memory::abandoned, &["`engine`", "make a new agent"]),
    ),
    (
        'H',
        "what an agent made is used with another",
        Here(memory::foreign, &["`other`", "4096 bytes", "host memory", "the agent that made it"]),
    ),
    (
        'I',
        "many threads want one agent",
        Here(services::busy, &["`puller`", "`pull`", "in `post`", "renew the worker"]),
    ),
    (
        'J',
        "something below panics",
        Here(services::panicked, &["`puller`", "`pull`", "out of cheese", "renew the worker"]),
    ),
    (
        'K',
        "memory to register runs out",
        Here(memory::exhausted, &["4096 bytes", "budget of 1000", "raise the budget"]),
    ),
    (
        'L',
        "two pieces claim the same bytes",
        Here(plans::overlap, &["`w`", "row 4, column 0", "correct its layout"]),
    ),
    (
        'M',
        "metadata is changed on its way",
        Here(memory::metadata, &["`engine`", "`trainer`", "digest", "publish it again"]),
    ),
    (
        'N',
        "the sides disagree what an element is",
        Here(plans::dtype, &["`w` is U8", "`w` on rank 3 is BF16", "in one type on both sides"]),
    ),
    (
        'O',
        "a parameter is covered by nobody",
        Here(
            plans::uncovered,
            &["`w`", "rows 8..16", "columns 0..4", "byte 64", "a source rank is missing"],
        ),
    ),
    (
        'P',
        "bytes change on their way",
        Here(refits::corrupt, &["bytes 0 to 128 of `w`", "source rank 0", "pull again"]),
    ),
    (
        'Q',
        "bytes have arrived and a GPU does not see them",
        OnADevice("the order of flush and read is the device's"),
    ),
    ('R', "files run out over many joins", OverNixl("errors::p18_files_run_out")),
    (
        'S',
        "a rank of a group is not there",
        Here(
            services::incomplete,
            &["version from 1", "group `trainer`", "of its 2 ranks [1]", "start them"],
        ),
    ),
    (
        'T',
        "some ranks of a replica have a version, others not",
        Here(
            services::half,
            &["`engine`", "version 1", "ranks [0, 1]", "have all of them refresh"],
        ),
    ),
    (
        'U',
        "a version that has been comes back",
        Here(services::rollback, &["version 4", "newer than 5", "count on"]),
    ),
    (
        'V',
        "a graph holds addresses that change",
        OnADevice("graphs are the device's; addresses are P15's"),
    ),
    (
        'W',
        "an engine is asleep when its weights are written",
        Here(
            services::asleep,
            &[
                "version 1",
                "group `trainer`",
                "could not pause",
                "weights are not mapped",
                "before a refresh has succeeded",
            ],
        ),
    ),
    ('X', "another transport is picked", OverNixl("errors::p18_another_transport_is_picked")),
];

#[test]
fn p18_every_failure_is_one_error_that_says_what_to_do() {
    let letters: String = TABLE.iter().map(|row| row.0).collect();
    assert_eq!(letters, ('A'..='X').collect::<String>());
    let mut kinds = BTreeSet::new();
    let (mut here, mut elsewhere) = (0, 0);
    for (letter, failure, tried) in &TABLE {
        match tried {
            Here(provoke, parts) => {
                let Said { kind, text } = provoke();
                println!("{letter}  {failure}\n   {kind}\n   {text}");
                for part in *parts {
                    assert!(text.contains(part), "{letter}, {failure}: no `{part}` in: {text}");
                }
                assert!(kinds.insert(kind), "{letter}, {failure}: {kind} is another's");
                here += 1;
            }
            OverNixl(test) => {
                println!("{letter}  {failure}\n   over NIXL, by `{test}`");
                elsewhere += 1;
            }
            OnADevice(why) => {
                println!("{letter}  {failure}\n   not without a GPU: {why}");
                elsewhere += 1;
            }
        }
    }
    assert_eq!((here, elsewhere), (20, 4));
}
