//! What CI runs.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use crate::{cargo, failure::Failure, ptx, python, setup, tidy};

/// Runs every step, so that one run shows everything that is wrong, and fails if one of them did.
pub(crate) fn run(root: &Path, test: bool) -> Result<(), Failure> {
    let mut steps = Steps::default();
    let clippy = |args: &[&str], features: &[String]| {
        let mut command = locked(root, "clippy");
        command
            .args(args)
            .args(["--all-targets", "--keep-going"])
            .args(features)
            .args(["--", "--deny", "warnings"]);
        cargo::status(command)
    };
    let mut all = cargo::features(&[], true, true);
    all.extend(["--features", python::FEATURES].map(str::to_owned));

    steps.run("fmt", || {
        let mut command = cargo::cargo(root);
        command.current_dir(root).args(["fmt", "--all", "--check"]);
        cargo::status(command)
    });
    steps.run("tidy", || tidy::run(root));
    steps.run("ptx", || ptx::check_where_possible(root));
    steps.run("loom", || cargo::loom(root));
    // By themselves, since in the workspace other crates turn features of theirs on, `serde` and `std` among them.
    steps.run("clippy, pure crates alone", || {
        clippy(&["--package", "refit-planner", "--package", "refit-translate"], &[])
    });
    steps.run("clippy, default features", || clippy(&["--workspace"], &[]));
    // What follows needs NIXL and etcd, and would only say the same again without.
    let fetch = || {
        setup::run(root).map_err(|why| Failure::new(format!("nixl: {why}")))?;
        setup::etcd(root).map_err(|why| Failure::new(format!("etcd: {why}")))
    };
    if steps.run("setup", fetch) {
        steps.run("clippy, with CUDA, NIXL and etcd", || clippy(&["--workspace"], &all));
        // As readers will see them: without private items, and with no link to one.
        steps.run("docs", || {
            let mut command = locked(root, "doc");
            command.args(["--workspace", "--no-deps"]).args(&all);
            command.env("RUSTDOCFLAGS", "--deny warnings");
            cargo::status(command)
        });
        if test {
            // The command of the README, not a shortcut to it.
            steps.run("cargo xtask test", || {
                let mut command = cargo::cargo(root);
                command.current_dir(root).args(["xtask", "test"]);
                command.envs([("REFIT_REQUIRE_NIXL", "1"), ("REFIT_REQUIRE_ETCD", "1")]);
                cargo::status(command)
            });
            steps.run("cargo xtask python", || python::run(root, &[]));
        }
    }
    steps.finish()
}

fn locked(root: &Path, subcommand: &str) -> Command {
    let mut command = cargo::cargo(root);
    command.current_dir(root).args([subcommand, "--locked"]);
    command
}

/// What was run: name, duration, and whether it passed.
#[derive(Default)]
struct Steps(Vec<(&'static str, Duration, bool)>);

impl Steps {
    /// Runs a step and says whether it passed.
    fn run(&mut self, name: &'static str, step: impl FnOnce() -> Result<(), Failure>) -> bool {
        println!("== {name}");
        let start = Instant::now();
        let passed = match step() {
            Ok(()) => true,
            Err(failure) => {
                failure.report();
                false
            }
        };
        self.0.push((name, start.elapsed(), passed));
        passed
    }

    fn finish(self) -> Result<(), Failure> {
        println!("== ci");
        for (name, took, passed) in &self.0 {
            let mark = if *passed { "ok" } else { "FAILED" };
            println!("{:>7.1} s  {mark:<6}  {name}", took.as_secs_f64());
        }
        let total: Duration = self.0.iter().map(|(_, took, _)| *took).sum();
        println!("{:>7.1} s  in all", total.as_secs_f64());
        let failed: Vec<_> =
            self.0.iter().filter(|(_, _, passed)| !passed).map(|(name, _, _)| *name).collect();
        if failed.is_empty() {
            Ok(())
        } else {
            Err(Failure::new(format!("ci: failed: {}", failed.join("; "))))
        }
    }
}
