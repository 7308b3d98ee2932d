//! Without the library, or with a wrong one, there is an error and the process lives.

use std::path::Path;

use libloading::os::unix::Library;
use refit_transport::nixl::{NixlLibrary, NixlUnavailable, Origin, Problem};

use crate::isolated::{find_library, isolated};

const NOWHERE: &str = "/nonexistent/libnixl_capi.so";
const WHEEL: &str = "REFIT_TEST_WHEEL";

/// Runs the body where the variable names nothing, with the real path under another name.
fn without_variable(test: &str, body: fn(&Path)) {
    let wheel = find_library().unwrap_or_default();
    let variables = [
        ("REFIT_NIXL_LIBRARY", NOWHERE),
        ("LD_LIBRARY_PATH", ""),
        (WHEEL, wheel.to_str().unwrap()),
    ];
    isolated(test, &variables, || body(Path::new(&std::env::var_os(WHEEL).unwrap())));
}

fn refused(result: Result<NixlLibrary, NixlUnavailable>) -> NixlUnavailable {
    let error = result.expect_err("there is a NIXL on the loader's own path");
    println!("{error}");
    error
}

#[test]
fn absent() {
    without_variable("guard::absent", |wheel| {
        let error = refused(NixlLibrary::load(&[Path::new("/nonexistent/too.so"), Path::new("")]));
        let origins: Vec<Origin> = error.attempts().iter().map(|attempt| attempt.origin).collect();
        assert_eq!(origins, [Origin::Variable, Origin::Candidate, Origin::Loader]);
        assert!(error.to_string().contains(NOWHERE));
        // A failure is not final: the question that would be was never asked.
        NixlLibrary::load(&[wheel.parent().unwrap()]).unwrap();
        NixlLibrary::load(&[]).unwrap();
    });
}

#[test]
fn wrong() {
    without_variable("guard::wrong", |_| {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let libc = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
        let libc = libc
            .into_iter()
            .find(|path| path.contains("libc.so") || path.contains("libc-"))
            .unwrap();
        let error = refused(NixlLibrary::load(&[Path::new(libc)]));
        let problem = &error
            .attempts()
            .iter()
            .find(|attempt| attempt.origin == Origin::Candidate)
            .unwrap()
            .problem;
        assert!(matches!(problem, Problem::MissingSymbol(_)), "{problem:?}");
    });
}

#[test]
fn mapped() {
    without_variable("guard::mapped", |wheel| {
        // As an engine's own NIXL would be: its core library is mapped, the C API is not.
        // SAFETY: NIXL's initialisers are as safe here as where the guard opens it.
        let core = unsafe { Library::new(wheel.with_file_name("libnixl.so")) }.unwrap();
        NixlLibrary::load(&[]).unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let copies: std::collections::BTreeSet<_> = maps
            .lines()
            .filter(|line| line.contains("/libnixl"))
            .filter_map(|line| line.split('/').next_back())
            .collect();
        assert!(copies.contains("libnixl.so") && copies.contains("libnixl_capi.so"), "{copies:?}");
        std::mem::forget(core);
    });
}
