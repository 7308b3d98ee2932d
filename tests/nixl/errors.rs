//! P18 where NIXL has to be there: the rows of `tests/errors.rs` that say so, and a library that is not there at all.

use refit_transport::nixl::{
    Demands, LaneError, NixlLibrary, NixlOptions, NixlTransport, NixlUnavailable, PreflightError,
    preflight,
};
use refit_transport::{Cause, TransportError};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::ONE_SIDED;
use crate::isolated::{isolated, library};

fn says(text: &str, parts: &[&str]) {
    println!("{text}");
    for part in parts {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
}

/// R: every join of a peer costs files, so that they are counted before the first.
#[test]
fn p18_files_run_out() {
    isolated("errors::p18_files_run_out", ONE_SIDED, || {
        let most = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(300), ..most }).unwrap();
        let options = NixlOptions::new("preflight");
        let error = preflight(&[], &options, Demands::new(0, 64)).unwrap_err();
        assert!(matches!(error, PreflightError::OpenFiles { .. }), "{error}");
        says(&error.to_string(), &["300 open files", "64 peers", "raise the limit"]);
    });
}

/// X: silently taking TCP is slow, and lets whoever connects read and write.
#[test]
fn p18_another_transport_is_picked() {
    let variables = [("UCX_TLS", "cma,tcp"), ("UCX_NET_DEVICES", "lo,eth0")];
    isolated("errors::p18_another_transport_is_picked", &variables, || {
        let error = NixlTransport::new(library(), NixlOptions::new("engine")).unwrap_err();
        let lanes = matches!(&error, TransportError::Start { cause: Cause::Lanes(cause), .. }
            if matches!(**cause, LaneError::Tcp { .. }));
        assert!(lanes, "{error}");
        let parts = ["`engine`", "UCX_TLS=`cma,tcp`", "unset the variables", "Lanes::InsecureTcp"];
        says(&error.to_string(), &parts);
    });
}

/// J: without its library NIXL ends the process at the first call.
#[test]
fn p18_there_is_no_library() {
    let absent = [("REFIT_NIXL_LIBRARY", "/nonexistent/libnixl_capi.so"), ("LD_LIBRARY_PATH", "")];
    isolated("errors::p18_there_is_no_library", &absent, || {
        let error: NixlUnavailable = NixlLibrary::load(&[]).unwrap_err();
        says(&error.to_string(), &["/nonexistent/libnixl_capi.so", "REFIT_NIXL_LIBRARY"]);
    });
}
