//! Project tasks: `cargo xtask --help` lists them.
//!
//! Only the standard library is used, so that the first task of a fresh clone starts within seconds.

// A command line tool prints.
#![allow(clippy::print_stdout)]

mod args;
mod built;
mod bundle;
mod cargo;
mod ci;
mod e2e;
mod extra;
mod failure;
mod help;
mod ptx;
mod python;
mod sanitize;
mod setup;
mod tidy;

use std::process::ExitCode;

use args::Task;
use extra::Extra;
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
            setup::run(&root).map_err(|why| Failure::new(format!("nixl: {why}")))?;
            setup::etcd(&root).map_err(|why| Failure::new(format!("etcd: {why}")))?;
            let all = [setup::LIBCLANG, setup::NIXL, setup::PROTOC, setup::ETCD];
            println!("setup: {} are in place", all.map(|wheel| wheel.to_string()).join(", "));
            Ok(())
        }
        Task::Test(args) => cargo::test(&root, &Extra::nixl(&root)?, &Extra::etcd(&root)?, &args),
        Task::Bench(args) => cargo::bench(&root, &Extra::nixl(&root)?, &args),
        Task::Refit(args) => cargo::refit(&root, &Extra::nixl(&root)?, &args),
        Task::Criterion(args) => cargo::criterion(&root, &args),
        Task::Chart(args) => cargo::chart(&root, &args),
        Task::Bundle(options) => bundle::run(&root, &options),
        Task::Ptx { check } => ptx::run(&root, check),
        Task::Python(args) => python::run(&root, &args),
        Task::E2e(args) => e2e::run(&root, &args),
        Task::Loom => cargo::loom(&root),
        Task::Valgrind(args) => sanitize::valgrind::run(&root, &args),
        Task::Tsan(args) => sanitize::tsan::run(&root, &args),
        Task::Chaos(args) => cargo::chaos(&root, &args),
        Task::Tidy => tidy::run(&root),
        Task::Ci { test } => ci::run(&root, test),
    }
}
