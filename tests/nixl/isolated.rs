//! A process for each test.

use std::io::{Read, Seek};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use refit_tests::skip;
use refit_transport::nixl::NixlLibrary;

/// Names the test that a child process is to run.
const CHILD: &str = "REFIT_NIXL_TEST";
/// In place of a value: the variable is not there.
pub(crate) const UNSET: &str = "(unset)";
/// Only what hangs takes as long: the longest of them takes a minute, and three on a machine with nine others on each core.
const LIMIT: Duration = Duration::from_secs(600);

/// Runs the body in a child process with these variables, and fails if that fails, crashes or hangs.
pub(crate) fn isolated(test: &str, variables: &[(&str, &str)], body: impl FnOnce()) {
    if std::env::var_os(CHILD).is_some() {
        return body();
    }
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(why) = find_library() {
        assert!(
            std::env::var_os("REFIT_REQUIRE_NIXL").is_none_or(|value| value != "1"),
            "nixl: {why}"
        );
        skip::skipped("NIXL", test, &why);
        return;
    }
    // Its report would read as a second one of ours, and be counted as such; a panic goes to stderr. A file, because
    // processes that it starts may keep a pipe open for longer than it lives.
    let mut said = tempfile::tempfile().unwrap();
    let stdout = said.try_clone().unwrap();
    let mut child = command(test, variables).stdout(stdout).spawn().unwrap();
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if started.elapsed() > LIMIT {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{test} did not end within {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(status.success(), "{test}: {status}");
    let mut bytes = Vec::new();
    said.rewind().unwrap();
    said.read_to_end(&mut bytes).unwrap();
    skip::repeat(&String::from_utf8_lossy(&bytes));
}

/// This program, running one test as a child would.
pub(crate) fn command(test: &str, variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(CHILD, test);
    for (key, value) in
        [("UCX_NET_DEVICES", "lo"), ("UCX_LOG_LEVEL", "fatal"), ("NIXL_LOG_LEVEL", "FATAL")]
    {
        if std::env::var_os(key).is_none() {
            command.env(key, value);
        }
    }
    for &(key, value) in variables {
        if value == UNSET {
            command.env_remove(key);
        } else {
            command.env(key, value);
        }
    }
    command.stdin(Stdio::null());
    command
}

/// The test that this process runs as a child.
pub(crate) fn current() -> String {
    std::env::var(CHILD).unwrap()
}

/// Where the library is, found without loading it: the parent process stays as it is.
pub(crate) fn find_library() -> Result<PathBuf, String> {
    let path = std::env::var_os("REFIT_NIXL_LIBRARY")
        .map(PathBuf::from)
        .ok_or("REFIT_NIXL_LIBRARY is not set")?;
    let path = if path.is_dir() { path.join("libnixl_capi.so") } else { path };
    if path.exists() {
        Ok(path)
    } else {
        Err(format!("{} does not exist; run cargo xtask setup", path.display()))
    }
}

/// The library, in a child.
pub(crate) fn library() -> NixlLibrary {
    NixlLibrary::load(&[]).unwrap()
}

/// Kills a child when the test ends, however it ends.
pub(crate) struct Guarded(pub(crate) Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
