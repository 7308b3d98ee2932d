//! The `refit` command. Everything is in the library, so that tests reach it.

use std::process::ExitCode;

fn main() -> ExitCode {
    refit_cli::main()
}
