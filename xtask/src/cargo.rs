//! Runs cargo, its output passed through.

use std::{
    collections::BTreeMap,
    env, fmt,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{extra::Extra, failure::Failure, setup};

/// The packages that have something to build or test with NIXL, and the feature that turns it on.
const NIXL_FEATURES: [(&str, &str); 4] = [
    ("refit-transport", "nixl-dlopen"),
    ("refit", "nixl-dlopen"),
    ("refit-cli", "nixl"),
    ("refit-tests", "nixl"),
];

/// The same with CUDA, which needs nothing at build time; what needs a GPU says at run time that there is none.
const CUDA_FEATURES: [(&str, &str); 6] = [
    ("refit-pool", "cuda"),
    ("refit-transport", "cuda"),
    ("refit", "cuda"),
    ("refit-service", "cuda"),
    ("refit-cli", "cuda"),
    ("refit-tests", "cuda"),
];

/// The same with etcd.
const ETCD_FEATURES: [(&str, &str); 3] =
    [("refit-service", "etcd"), ("refit-cli", "etcd"), ("refit-tests", "etcd")];

/// The folder of the workspace, wherever the task was called from.
pub(crate) fn workspace_root() -> PathBuf {
    let manifest = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let manifest = manifest.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")));
    manifest.parent().map(Path::to_path_buf).unwrap_or(manifest)
}

/// The cargo that runs this task.
pub(crate) fn cargo(root: &Path) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    if let Some(path) = setup::include_path(root, env::var("CPLUS_INCLUDE_PATH").ok().as_deref()) {
        command.env("CPLUS_INCLUDE_PATH", path);
    }
    command
}

/// The `--features` for a run over `packages`, or over the workspace when that is empty: CUDA, and NIXL and etcd where
/// they are.
pub(crate) fn features(packages: &[String], nixl: bool, etcd: bool) -> Vec<String> {
    let chosen = |name: &str| packages.is_empty() || packages.iter().any(|package| package == name);
    let nixl = if nixl { &NIXL_FEATURES[..] } else { &[] };
    let etcd = if etcd { &ETCD_FEATURES[..] } else { &[] };
    let features: Vec<String> = CUDA_FEATURES
        .iter()
        .chain(nixl)
        .chain(etcd)
        .filter(|(package, _)| chosen(package))
        .map(|(package, feature)| format!("{package}/{feature}"))
        .collect();
    if features.is_empty() { Vec::new() } else { vec!["--features".to_owned(), features.join(",")] }
}

/// Runs a command to its end.
pub(crate) fn status(mut command: Command) -> Result<(), Failure> {
    let status = command.status().map_err(|error| cannot_start(&command, &error))?;
    if status.success() { Ok(()) } else { Err(Failure::child(status.code())) }
}

/// `cargo test`, with a total at the end.
pub(crate) fn test(
    root: &Path,
    nixl: &Extra,
    etcd: &Extra,
    args: &[String],
) -> Result<(), Failure> {
    let mut command = cargo(root);
    // The default members: all but the benches, which have no tests and would cost the compilation of criterion.
    command.current_dir(root).arg("test");
    if !args.iter().any(|arg| arg == "--no-fail-fast") {
        // "Every test": cargo would stop after the first binary with a failure.
        command.arg("--no-fail-fast");
    }
    command.args(features(&packages(args), nixl.is_ready(), etcd.is_ready()));
    if nixl.is_ready() {
        command.env("REFIT_REQUIRE_NIXL", "1");
    }
    if etcd.is_ready() {
        command.env("REFIT_REQUIRE_ETCD", "1");
    }
    command.args(args).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(|error| cannot_start(&command, &error))?;
    let mut total = Total::default();
    if let Some(stdout) = child.stdout.take() {
        total
            .pass_through(stdout)
            .map_err(|error| Failure::new(format!("the output of cargo: {error}")))?;
    }
    let status = child.wait().map_err(|error| cannot_start(&command, &error))?;
    total.print();
    nixl.remind();
    etcd.remind();
    if status.success() { Ok(()) } else { Err(Failure::child(status.code())) }
}

/// `refit bench`; over the in-process transport where NIXL is missing and nothing else was asked for.
pub(crate) fn bench(root: &Path, nixl: &Extra, args: &[String]) -> Result<(), Failure> {
    let mut all = vec!["bench".to_owned()];
    let chosen = args.iter().any(|arg| arg == "--transport" || arg.starts_with("--transport="));
    if !nixl.is_ready() && !chosen {
        all.extend(["--transport".to_owned(), "local".to_owned()]);
    }
    all.extend_from_slice(args);
    refit(root, nixl, &all)
}

/// `refit`, built for release. Paths among the arguments stay relative to where the user is.
pub(crate) fn refit(root: &Path, nixl: &Extra, args: &[String]) -> Result<(), Failure> {
    let mut command = cargo(root);
    command
        .args(["run", "--release", "--package", "refit-cli", "--manifest-path"])
        .arg(root.join("Cargo.toml"));
    // CUDA is looked for at run time only: a build with it works everywhere.
    command.args(["--features", if nixl.is_ready() { "cuda,nixl" } else { "cuda" }]);
    let done = status(with(command, args));
    nixl.remind();
    done
}

/// `refit chart`, which needs neither NIXL nor speed. Paths stay relative to where the user is.
pub(crate) fn chart(root: &Path, args: &[String]) -> Result<(), Failure> {
    let mut command = cargo(root);
    command
        .args(["run", "--quiet", "--package", "refit-cli", "--manifest-path"])
        .arg(root.join("Cargo.toml"));
    status(with(command, &[&["chart".to_owned()], args].concat()))
}

/// The criterion benches.
pub(crate) fn criterion(root: &Path, args: &[String]) -> Result<(), Failure> {
    let mut command = cargo(root);
    command.current_dir(root).args(["bench", "--package", "refit-benches"]).args(args);
    status(command)
}

pub(crate) fn loom(root: &Path) -> Result<(), Failure> {
    let mut command = cargo(root);
    command.current_dir(root).args(["test", "--package", "refit-pool", "--lib", "models::"]);
    command.env("RUSTFLAGS", "--cfg loom").env("CARGO_TARGET_DIR", root.join("target/loom"));
    status(command)
}

/// Faults in real processes. Paths among the arguments stay relative to where the user is.
pub(crate) fn chaos(root: &Path, args: &[String]) -> Result<(), Failure> {
    // It is about NIXL: there is nothing to do without.
    setup::run(root).map_err(|why| Failure::new(format!("nixl: {why}")))?;
    let mut command = cargo(root);
    command
        .args(["run", "--package", "refit-tests", "--bin", "chaos", "--features", "nixl"])
        .arg("--manifest-path")
        .arg(root.join("Cargo.toml"));
    status(with(command, args))
}

fn with(mut command: Command, args: &[String]) -> Command {
    command.arg("--").args(args);
    command
}

fn cannot_start(command: &Command, error: &io::Error) -> Failure {
    Failure::new(format!("{}: {error}", command.get_program().display()))
}

/// The packages that the arguments of `cargo test` choose.
fn packages(args: &[String]) -> Vec<String> {
    let mut packages = Vec::new();
    let mut args = args.iter().take_while(|arg| *arg != "--");
    while let Some(arg) = args.next() {
        if arg == "-p" || arg == "--package" {
            packages.extend(args.next().cloned());
        } else if let Some(package) =
            arg.strip_prefix("--package=").or_else(|| arg.strip_prefix("-p"))
        {
            packages.push(package.to_owned());
        }
    }
    packages
}

/// How the line begins by which a test says what it lacked; the harness counts such a test as passed. The lines are
/// those of `tests/support/skip.rs`: `skipped for want of a GPU: TEST: WHY`.
const SKIPPED: &str = "skipped for want of ";

/// Sums the closing lines of the test binaries, of which cargo prints one for each.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Total {
    seen: bool,
    passed: u64,
    failed: u64,
    ignored: u64,
    /// Tests that passed for want of something, by that.
    wanting: BTreeMap<String, u64>,
    /// Those of the binary that runs, by name: they may say it more than once.
    running: BTreeMap<String, String>,
}

impl Total {
    /// Prints what a program prints, and counts.
    pub(crate) fn pass_through(&mut self, mut from: impl Read) -> io::Result<()> {
        let mut to = io::stdout().lock();
        let mut line = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            let n = from.read(&mut chunk)?;
            if n == 0 {
                return Ok(());
            }
            to.write_all(&chunk[..n])?;
            to.flush()?;
            for &byte in &chunk[..n] {
                if byte == b'\n' {
                    self.line(&String::from_utf8_lossy(&line));
                    line.clear();
                } else {
                    line.push(byte);
                }
            }
        }
    }

    pub(crate) fn passed(&self) -> u64 {
        self.passed
    }

    pub(crate) fn failed(&self) -> u64 {
        self.failed
    }

    /// `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s`
    pub(crate) fn line(&mut self, line: &str) {
        // What the harness prints of a test may stand in front.
        if let Some((_, skipped)) = line.split_once(SKIPPED) {
            let mut parts = skipped.splitn(3, ": ");
            if let (Some(what), Some(test), Some(_)) = (parts.next(), parts.next(), parts.next()) {
                self.running.insert(test.to_owned(), what.to_owned());
            }
            return;
        }
        let Some((_, counts)) =
            line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        self.seen = true;
        for count in counts.split(';') {
            let mut words = count.split_whitespace();
            let (Some(Ok(n)), Some(what)) = (words.next().map(str::parse::<u64>), words.next())
            else {
                continue;
            };
            match what {
                "passed" => self.passed += n,
                "failed" => self.failed += n,
                "ignored" => self.ignored += n,
                _ => {}
            }
        }
        for what in std::mem::take(&mut self.running).into_values() {
            self.passed = self.passed.saturating_sub(1);
            *self.wanting.entry(what).or_default() += 1;
        }
    }

    fn print(&self) {
        if self.seen {
            println!("\n{self}");
        }
    }
}

impl fmt::Display for Total {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut why: Vec<String> =
            self.wanting.iter().map(|(what, n)| format!("{n} for want of {what}")).collect();
        let skipped = self.ignored + self.wanting.values().sum::<u64>();
        if self.ignored > 0 {
            why.push(format!("{} ignored", self.ignored));
        }
        write!(f, "total: {} passed, {} failed, {skipped} skipped", self.passed, self.failed)?;
        if why.is_empty() { Ok(()) } else { write!(f, " ({})", why.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn features_are_asked_only_of_chosen_packages() {
        let of = |line, nixl| features(&packages(&strings(line)), nixl, false);
        assert_eq!(of("-p refit-planner", true), Vec::<String>::new());
        assert_eq!(of("-p refit-pool", true), ["--features", "refit-pool/cuda"]);
        assert_eq!(
            of("-p refit-tests --package=refit-cli", true),
            ["--features", "refit-cli/cuda,refit-tests/cuda,refit-cli/nixl,refit-tests/nixl"]
        );
        assert_eq!(of("-p refit-cli", false), ["--features", "refit-cli/cuda"]);
        assert_eq!(
            features(&packages(&strings("-p refit-service")), false, true),
            ["--features", "refit-service/cuda,refit-service/etcd"]
        );
        assert_eq!(of("some_test -- -p refit-planner", true).len(), 2);
    }

    #[test]
    fn totals_are_summed() {
        let mut total = Total::default();
        for line in [
            "running 3 tests",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "test result: FAILED. 4 passed; 2 failed; 0 ignored; 0 measured; 9 filtered out; finished in 0.01s",
        ] {
            total.line(line);
        }
        let expected = Total { seen: true, passed: 7, failed: 2, ignored: 1, ..Total::default() };
        assert_eq!(total, expected);
        assert_eq!(total.to_string(), "total: 7 passed, 2 failed, 1 skipped (1 ignored)");
        assert_eq!(Total::default().to_string(), "total: 0 passed, 0 failed, 0 skipped");
    }

    #[test]
    fn tests_that_lacked_something_are_not_counted_as_passed() {
        let mut total = Total::default();
        for line in [
            "skipped for want of a GPU: pool::one: the driver is not there: libcuda.so",
            "test two ... skipped for want of NIXL: two: REFIT_NIXL_LIBRARY is not set",
            "skipped for want of a GPU: pool::one: again",
            "skipped for want of nothing that is said",
            "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            // Of another binary, so another test.
            "skipped for want of a GPU: pool::one: 2 devices are needed, there are 1",
            "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s",
        ] {
            total.line(line);
        }
        let text = "total: 3 passed, 0 failed, 4 skipped (1 for want of NIXL, 2 for want of a GPU, 1 ignored)";
        assert_eq!(total.to_string(), text);
    }

    #[test]
    fn tests_say_it_as_it_is_read_here() {
        for source in [
            include_str!("../../tests/support/skip.rs"),
            include_str!("../../crates/cli/tests/live/process.rs"),
            include_str!("../../crates/pool/src/cuda/driver/tests.rs"),
        ] {
            assert!(source.contains(SKIPPED));
        }
    }

    #[test]
    fn every_feature_exists() {
        for (package, manifest) in [
            ("refit-pool", include_str!("../../crates/pool/Cargo.toml")),
            ("refit-transport", include_str!("../../crates/transport/Cargo.toml")),
            ("refit", include_str!("../../crates/refit/Cargo.toml")),
            ("refit-service", include_str!("../../crates/service/Cargo.toml")),
            ("refit-cli", include_str!("../../crates/cli/Cargo.toml")),
            ("refit-tests", include_str!("../../tests/Cargo.toml")),
        ] {
            let all = CUDA_FEATURES.iter().chain(&NIXL_FEATURES).chain(&ETCD_FEATURES);
            for (_, feature) in all.filter(|(name, _)| *name == package) {
                assert!(
                    manifest.contains(&format!("\n{feature} = [")),
                    "{package} has no feature `{feature}`"
                );
            }
        }
    }
}
