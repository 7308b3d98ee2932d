//! The short version of `cargo xtask chaos`: the same processes, faults and promises, for some seconds each.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::process::Command;

use refit_tests::skip;

fn chaos(test: &str, args: &[&str]) {
    let library = std::env::var_os("REFIT_NIXL_LIBRARY").map(std::path::PathBuf::from);
    let file = |path: std::path::PathBuf| {
        if path.is_dir() { path.join("libnixl_capi.so") } else { path }
    };
    if !library.map(file).is_some_and(|path| path.exists()) {
        let required = std::env::var_os("REFIT_REQUIRE_NIXL").is_some_and(|value| value == "1");
        assert!(!required, "nixl: REFIT_NIXL_LIBRARY names no library; run cargo xtask setup");
        return skip::skipped("NIXL", test, "REFIT_NIXL_LIBRARY names no library");
    }
    let none = ["--trials", "0", "--schedules", "0", "--flat", "0", "--neighbours", "0"];
    let output = Command::new(env!("CARGO_BIN_EXE_chaos")).args(none).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{said}\n{errors}", output.status);
    assert!(said.contains("every promise held"), "{said}");
}

/// P1, P3, P7, P10, P11: killed, stopped and restarted at random and at named points.
#[test]
fn p11_processes_that_die_and_stop() {
    chaos("p11_processes_that_die_and_stop", &["--trials", "10"]);
}

/// P1: over real NIXL, with leases kept and ignored.
#[test]
fn p01_a_writer_that_writes_while_it_is_read() {
    chaos("p01_a_writer_that_writes_while_it_is_read", &["--schedules", "40"]);
}

/// P9.
#[test]
fn p09_nothing_grows_over_refits() {
    chaos("p09_nothing_grows_over_refits", &["--flat", "500"]);
}

/// One process, two models, four targets; and a peer that stands still.
#[test]
fn p03_neighbours_do_not_cross_and_do_not_wait() {
    chaos("p03_neighbours_do_not_cross_and_do_not_wait", &["--neighbours", "2"]);
}
