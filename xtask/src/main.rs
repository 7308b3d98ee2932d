//! Project tasks: `cargo xtask --help` lists them.
//!
//! Only the standard library is used, so that the first task of a fresh clone starts within seconds.

// A command line tool prints.
#![allow(clippy::print_stdout)]

mod args;
mod bundle;
mod cargo;
mod ci;
mod failure;
mod help;
mod nixl;
mod ptx;
mod setup;
mod tidy;

use std::process::ExitCode;

use args::Task;
use failure::Failure;

fn main() -> ExitCode {
    let task = match Task::parse(std::env::args().skip(1)) {
        Ok(task) => task,
        Err(hint) => {
            eprintln!("error: {hint}");
            return ExitCode::from(2);
        }
    };
    match run(task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(task: Task) -> Result<(), Failure> {
    let root = cargo::workspace_root();
    match task {
        Task::Help(text) => {
            print!("{text}");
            Ok(())
        }
        Task::Setup => {
            setup::run(&root).map_err(|why| Failure::new(why.to_string()))?;
            println!("setup: {} and {} are in place", setup::LIBCLANG, setup::NIXL);
            Ok(())
        }
        Task::Test(args) => cargo::test(&root, &nixl::Nixl::prepare(&root)?, &args),
        Task::Bench(args) => cargo::bench(&root, &nixl::Nixl::prepare(&root)?, &args),
        Task::Refit(args) => cargo::refit(&root, &nixl::Nixl::prepare(&root)?, &args),
        Task::Criterion(args) => cargo::criterion(&root, &args),
        Task::Chart(args) => cargo::chart(&root, &args),
        Task::Bundle(options) => bundle::run(&root, &options),
        Task::Ptx { check } => ptx::run(&root, check),
        Task::Loom => cargo::loom(&root),
        Task::Tidy => tidy::run(&root),
        Task::Ci { test } => ci::run(&root, test),
    }
}
