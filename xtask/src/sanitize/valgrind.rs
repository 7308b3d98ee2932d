//! Memcheck: whether memory is read that nobody has written or that is nobody's, and whether any is written past its end.

use std::{
    io::ErrorKind,
    path::Path,
    process::{Command, Stdio},
};

use super::{Program, Tool, chosen, control, targets, watch, whole};
use crate::{built, cargo, failure::Failure};

/// What has memory in its hands, and is not the same test with other numbers.
const PROGRAMS: [Program; 23] = [
    whole("crates/pool"),
    whole("crates/transport"),
    whole("crates/refit"),
    whole("crates/service"),
    whole("pool_behaviour"),
    whole("pool_model"),
    whole("pool_warm"),
    whole("conformance"),
    whole("pull"),
    whole("refit"),
    whole("order"),
    whole("errors"),
    whole("faults"),
    whole("corners"),
    whole("digests"),
    Program {
        name: "pack",
        skips: &[
            (
                "a_packed_source_gives_the_same_bytes",
                "a thousand models are not done within five minutes",
            ),
            (
                "experts_are_packed_in_the_order_in_which_they_are_fused",
                "large experts are not done within five minutes",
            ),
        ],
    },
    whole("versions"),
    whole("relay"),
    whole("meeting"),
    whole("rendezvous"),
    whole("sealed"),
    whole("service_cut_over"),
    whole("service_deaths"),
];

/// Programs that are left out as a whole, and why.
const LEFT_OUT: [(&str, &str); 1] = [(
    "service_versions",
    "its attempts last 100 to 200 ms, in which nothing is read this slowly; `cargo xtask tsan` runs it",
)];

const TOOL: Tool = Tool { name: "valgrind", command, errors };

/// Builds the tests, without NIXL, etcd and CUDA, and runs them.
pub(crate) fn run(root: &Path, names: &[String]) -> Result<(), Failure> {
    let programs = chosen(&PROGRAMS, names)?;
    there()?;
    for (program, why) in LEFT_OUT {
        println!("left out: {program}: {why}");
    }
    control::check(root, &TOOL, "tests/sanitize/stale.rs", Command::new("rustc"))?;
    let mut command = cargo::cargo(root);
    command.args(targets(&programs));
    watch(root, &TOOL, &programs, &built::executables(root, command)?)
}

/// Whether there is a valgrind.
fn there() -> Result<(), Failure> {
    let mut command = Command::new("valgrind");
    match command.arg("--version").stdout(Stdio::null()).status() {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(Failure::new(
            "valgrind is not installed; install the package `valgrind` of your distribution, version 3.19 or later",
        )),
        Err(error) => Err(Failure::new(format!("valgrind: {error}"))),
    }
}

fn command(_root: &Path, program: &Path, log: &Path) -> Command {
    let mut command = Command::new("valgrind");
    // What it calls lost was leaked on purpose. A process that only forks writes nothing of its own.
    command.args(["--leak-check=no", "--error-exitcode=9", "--fair-sched=yes"]);
    command.arg("--child-silent-after-fork=yes");
    command.arg(format!("--log-file={}.%p", log.display()));
    command.arg(program);
    command
}

/// `==1234== ERROR SUMMARY: 2 errors from 1 contexts (suppressed: 0 from 0)`
fn errors(logs: &[String]) -> Option<u64> {
    let of = |log: &String| -> Option<u64> {
        let (_, rest) = log.rsplit_once("ERROR SUMMARY: ")?;
        rest.split_whitespace().next()?.parse().ok()
    };
    let found: Option<Vec<u64>> = logs.iter().map(of).collect();
    found.filter(|found| !found.is_empty()).map(|found| found.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(errors: u64) -> String {
        format!(
            "==7== Invalid read\n==7== \n==7== ERROR SUMMARY: {errors} errors from 1 contexts\n"
        )
    }

    #[test]
    fn errors_are_summed_where_all_is_said() {
        assert_eq!(errors(&[log(0)]), Some(0));
        assert_eq!(errors(&[log(2), log(3)]), Some(5));
        // Killed before it could sum up, or not started at all.
        assert_eq!(errors(&[log(2), "==7== Memcheck\n".to_owned()]), None);
        assert_eq!(errors(&[]), None);
    }
}
