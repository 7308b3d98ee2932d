//! Everything a wire can do wrong, in any order: whose memory changes, who waits for how long, what comes back.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

#[path = "faults/memory.rs"]
mod memory;
#[path = "faults/time.rs"]
mod time;

use std::time::Duration;

use proptest::prelude::*;
use refit_tests::faults::{End, Post, Script};

/// Scripts whose calls block for up to so many milliseconds.
fn scripts(block: u64) -> impl Strategy<Value = Script> {
    let post = prop_oneof![
        20 => Just(Post::Starts),
        2 => Just(Post::Finishes),
        2 => Just(Post::Refuses),
        1 => Just(Post::Breaks),
    ];
    let end = prop_oneof![
        8 => Just(End::Done),
        3 => (0..9_usize).prop_map(End::Short),
        4 => Just(End::Never),
        1 => (0..9_usize).prop_map(End::Lost),
    ];
    let block = prop_oneof![6 => Just(0), 1 => 0..=block].prop_map(Duration::from_millis);
    (post, 0..6_u32, 1..5_usize, any::<bool>(), any::<bool>(), end, block).prop_map(
        |(post, delay, pace, backwards, twice, end, block)| Script {
            post,
            delay,
            pace,
            backwards,
            twice,
            end,
            block,
        },
    )
}
