use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;

/// With or without CUDA on the machine: an answer, the same each time, and no panic.
#[test]
fn a_machine_without_cuda_is_told_so() {
    let answer = Driver::load();
    assert_eq!(answer, Driver::load());
    match (open(), answer) {
        (Err(missing), answer) => {
            assert!(missing.to_string().contains("install the NVIDIA driver"), "{missing}");
            assert_eq!(answer, Err(missing));
        }
        (Ok(_), Ok(driver)) => {
            assert!(driver.version() >= OLDEST && driver.device_count().is_ok());
        }
        (Ok(_), Err(error)) => {
            assert!(!matches!(error, CudaError::NotPresent { .. }), "{error}");
        }
    }
}

/// As far as they are called by name; those that the bindings wrap are listed by hand.
#[test]
fn functions_called_are_on_the_list() {
    let sources = [
        include_str!("../adopt.rs"),
        include_str!("../copy.rs"),
        include_str!("../device.rs"),
        include_str!("../driver.rs"),
        include_str!("../stream.rs"),
        include_str!("../../../../kernels/src/mover.rs"),
        include_str!("../../../../transport/src/peer/driver.rs"),
    ];
    let calls: Vec<_> = sources
        .iter()
        .flat_map(|source| source.split("sys::").skip(1))
        .filter_map(|rest| rest.split_once('(').map(|(name, _)| name))
        .filter(|name| {
            name.starts_with("cu") && name.chars().all(|c| c.is_alphanumeric() || c == '_')
        })
        .collect();
    assert!(calls.contains(&"cuPointerGetAttributes"), "{calls:?}");
    for call in calls {
        assert!(REQUIRED.contains(&call), "{call} is missing in REQUIRED");
    }
}

/// Tells a child process to say what it finds.
const CHILD: &str = "REFIT_FAKE_CUDA";

/// What the children of the next test run. By itself it does nothing.
#[test]
fn says_what_it_finds() {
    if env::var_os(CHILD).is_some() {
        let answer = Driver::load().map_or_else(|error| error.to_string(), |_| "a driver".into());
        eprintln!("found: {answer}");
    }
}

/// Drivers that are not what they should be, compiled here: each ends in an error, none in a panic.
#[test]
fn drivers_that_are_none_are_told_from_one_another() {
    use std::io::Write as _;
    const TEST: &str = "drivers_that_are_none_are_told_from_one_another";
    let cases = [
        ("old", 0, 11_080, "", "CUDA 11.8"),
        ("partial", 0, 12_080, "cuPointerGetAttributes", "lacks `cuPointerGetAttributes`"),
        ("empty", 100, 12_080, "", "cuInit answered CUDA_ERROR_NO_DEVICE"),
        ("stub", 34, 12_080, "", "take its folder out of LD_LIBRARY_PATH"),
        ("whole", 0, 13_000, "", "a driver"),
    ];
    for (name, init, version, without, expected) in cases {
        let folder = Folder::new(name);
        if let Err(why) = compile(&folder.0, init, version, without) {
            // Past the harness, for `cargo xtask test` to count.
            let line = format!("skipped for want of a C compiler: {TEST}: {why}\n");
            std::io::stdout().write_all(line.as_bytes()).unwrap();
            return;
        }
        let output = Command::new(env::current_exe().unwrap())
            .args(["--exact", "cuda::driver::tests::says_what_it_finds", "--nocapture"])
            .env(CHILD, "1")
            .env("LD_LIBRARY_PATH", &folder.0)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains(expected), "{name}: {said}");
    }
}

/// Removed with what is in it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = env::temp_dir().join(format!("refit-cuda-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A `libcuda` whose functions all fail, but for the two that say how it starts and how old it is.
fn compile(folder: &Path, init: u32, version: u32, without: &str) -> std::io::Result<()> {
    let mut code = format!(
        "int cuInit(unsigned flags) {{ return {init}; }}\n\
         int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}\n"
    );
    let rest = REQUIRED
        .into_iter()
        .filter(|name| !["cuInit", "cuDriverGetVersion", without].contains(name));
    for name in rest {
        writeln!(code, "int {name}(void) {{ return 999; }}").unwrap();
    }
    let source = folder.join("fake.c");
    fs::write(&source, code)?;
    for library in LIBRARIES {
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-w", "-o"]).arg(folder.join(library)).arg(&source);
        assert!(compiler.status()?.success());
    }
    Ok(())
}
