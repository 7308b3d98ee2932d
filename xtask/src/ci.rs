//! What CI runs.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use crate::{cargo, failure::Failure, setup, tidy};

/// Runs each step in order and stops at the first that fails.
pub(crate) fn run(root: &Path, test: bool) -> Result<(), Failure> {
    let mut steps = Steps::default();
    let clippy = |args: &[&str], features: &[String]| {
        let mut command = locked(root, "clippy");
        command.args(args).arg("--all-targets").args(features).args(["--", "--deny", "warnings"]);
        command
    };
    let nixl = cargo::nixl_features(&[]);

    steps.run("fmt", || {
        let mut command = cargo::cargo(root);
        command.current_dir(root).args(["fmt", "--all", "--check"]);
        cargo::status(command)
    })?;
    // By themselves, since in the workspace other crates turn features of theirs on, `serde` and `std` among them.
    steps.run("clippy, pure crates alone", || {
        cargo::status(clippy(&["--package", "refit-planner", "--package", "refit-translate"], &[]))
    })?;
    steps.run("clippy, default features", || cargo::status(clippy(&["--workspace"], &[])))?;
    steps.run("setup", || setup::run(root).map_err(|why| Failure::new(why.to_string())))?;
    steps.run("clippy, with NIXL", || cargo::status(clippy(&["--workspace"], &nixl)))?;
    steps.run("docs", || {
        let mut command = locked(root, "doc");
        command.args(["--workspace", "--no-deps", "--document-private-items"]).args(&nixl);
        command.env("RUSTDOCFLAGS", "--deny warnings");
        cargo::status(command)
    })?;
    steps.run("tidy", || tidy::run(root))?;
    if test {
        // The command of the README, not a shortcut to it.
        steps.run("cargo xtask test", || {
            let mut command = cargo::cargo(root);
            command.current_dir(root).args(["xtask", "test"]).env("REFIT_REQUIRE_NIXL", "1");
            cargo::status(command)
        })?;
    }
    steps.print();
    Ok(())
}

fn locked(root: &Path, subcommand: &str) -> Command {
    let mut command = cargo::cargo(root);
    command.current_dir(root).args([subcommand, "--locked"]);
    command
}

/// How long each step took.
#[derive(Default)]
struct Steps(Vec<(&'static str, Duration)>);

impl Steps {
    fn run(
        &mut self,
        name: &'static str,
        step: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        println!("== {name}");
        let start = Instant::now();
        let done = step();
        let took = start.elapsed();
        if done.is_err() {
            println!("== {name}: failed after {:.1} s", took.as_secs_f64());
        }
        self.0.push((name, took));
        done
    }

    fn print(&self) {
        let total: Duration = self.0.iter().map(|(_, took)| *took).sum();
        for (name, took) in &self.0 {
            println!("{:>7.1} s  {name}", took.as_secs_f64());
        }
        println!("{:>7.1} s  in all", total.as_secs_f64());
    }
}
