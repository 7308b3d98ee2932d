//! ThreadSanitizer: whether two threads use one place of memory, one of them writing, with nothing that orders them.

use std::{
    env,
    path::Path,
    process::{Command, Stdio},
};

use super::{Program, Tool, chosen, control, targets, watch, whole};
use crate::{built, failure::Failure};

/// Where threads share something.
const PROGRAMS: [Program; 14] = [
    whole("crates/pool"),
    whole("crates/transport"),
    whole("crates/service"),
    whole("pool_behaviour"),
    whole("conformance"),
    whole("pull"),
    whole("refit"),
    Program {
        name: "faults",
        skips: &[(
            "time::p03_every_call_is_answered_by_its_deadline",
            "it holds calls to milliseconds, of which the sanitizer takes many",
        )],
    },
    whole("versions"),
    whole("relay"),
    whole("meeting"),
    whole("rendezvous"),
    whole("service_deaths"),
    whole("service_versions"),
];

const TOOL: Tool = Tool { name: "tsan", command, errors };

/// The sanitizer is in our crates and in those they are built from, and not in the standard library, which comes built.
/// It has to see what is mapped and unmapped, so that rustix may not ask the kernel itself.
const FLAGS: [&str; 3] =
    ["-Zsanitizer=thread", "-Cunsafe-allow-abi-mismatch=sanitizer", "--cfg=rustix_use_libc"];

/// What it tells of the standard library, and why that is no race.
const SUPPRESSIONS: &str = "tests/sanitize/tsan.supp";

/// Builds the tests, without NIXL, etcd and CUDA, and runs them.
pub(crate) fn run(root: &Path, names: &[String]) -> Result<(), Failure> {
    let programs = chosen(&PROGRAMS, names)?;
    there()?;
    let mut rustc = nightly("rustc");
    rustc.args(FLAGS);
    control::check(root, &TOOL, "tests/sanitize/race.rs", rustc)?;
    let mut command = nightly("cargo");
    // Build scripts are not for the target, and go without.
    let target = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    command.args(targets(&programs)).args(["--target", &target]);
    command.env("RUSTFLAGS", FLAGS.join(" ")).env("CARGO_TARGET_DIR", root.join("target/tsan"));
    watch(root, &TOOL, &programs, &built::executables(root, command)?)
}

/// Whether there is a nightly Rust.
fn there() -> Result<(), Failure> {
    let status =
        nightly("rustc").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if status.is_ok_and(|status| status.success()) {
        return Ok(());
    }
    Err(Failure::new("nightly Rust is not installed; run `rustup toolchain install nightly`"))
}

fn nightly(program: &str) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", program]);
    command
}

fn command(root: &Path, program: &Path, log: &Path) -> Command {
    let mut command = Command::new(program);
    let (known, log) = (root.join(SUPPRESSIONS), log.display());
    let options = format!("suppressions='{}' log_path='{log}' exitcode=66", known.display());
    command.env("TSAN_OPTIONS", options);
    // A trace takes locks of the standard library, of which nothing is seen. One test at a time: two share nothing of ours.
    command.env("RUST_BACKTRACE", "0").arg("--test-threads=1");
    command
}

/// Files are written of what is found only.
fn errors(logs: &[String]) -> Option<u64> {
    let found = logs.iter().map(|log| log.matches("WARNING: ThreadSanitizer: ").count());
    u64::try_from(found.sum::<usize>()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_report_is_counted() {
        let report = "==================\nWARNING: ThreadSanitizer: data race (pid=7)\n";
        assert_eq!(errors(&[report.repeat(2), report.to_owned()]), Some(3));
        assert_eq!(errors(&[]), Some(0));
    }
}
