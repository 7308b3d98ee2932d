//! Tests that lack what they need, and say so.

use std::io::Write;

/// Says that a test was skipped for want of something, as in `a GPU`. The harness counts it as passed; `cargo xtask test`
/// reads this line and does not.
///
/// # Panics
/// When stdout cannot be written.
pub fn skipped(what: &str, test: &str, why: &str) {
    pass_on(&format!("skipped for want of {what}: {test}: {why}"));
}

/// Repeats the lines of that kind which a test said in a process of its own.
///
/// # Panics
/// When stdout cannot be written.
pub fn repeat(said: &str) {
    said.lines().filter(|line| line.contains("skipped for want of ")).for_each(pass_on);
}

/// Past the harness, which keeps to itself what passing tests print.
fn pass_on(line: &str) {
    let written = std::io::stdout().write_all(format!("{line}\n").as_bytes());
    assert!(written.is_ok(), "stdout: {written:?}");
}
