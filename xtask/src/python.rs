//! The Python package: built as a wheel, installed into a Python of its own, and tested there.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{cargo, failure::Failure, setup};

/// What the wheel is built and tested with.
const REQUIREMENTS: &str = "python/tests/requirements.txt";

/// A Python of the project's own, in `target/setup`, with packages of a file.
pub(crate) struct Environment<'a> {
    /// Its folder in `target/setup`.
    pub(crate) folder: &'a str,
    /// The Python it is made from.
    pub(crate) base: &'a Path,
    /// What it has, in the workspace.
    pub(crate) requirements: &'a str,
    /// Whether that is complete, so that pip looks for nothing else.
    pub(crate) complete: bool,
    /// What is said before it is fetched.
    pub(crate) notice: &'a str,
}

/// Builds, installs and tests. `args` go to pytest.
pub(crate) fn run(root: &Path, args: &[String]) -> Result<(), Failure> {
    let wheel = wheel(root)?;
    let python = builder(root)?;
    install(&python, &wheel)?;
    pytest(root, &python, args)
}

/// Builds the wheel.
pub(crate) fn wheel(root: &Path) -> Result<PathBuf, Failure> {
    setup::run(root).map_err(|why| Failure::new(format!("nixl: {why}")))?;
    setup::etcd(root).map_err(|why| Failure::new(format!("etcd: {why}")))?;
    build(root, &builder(root)?)
}

/// Installs the wheel, in place of the one that is there.
pub(crate) fn install(python: &Path, wheel: &Path) -> Result<(), Failure> {
    let mut install = pip(python);
    install.args(["install", "--quiet", "--force-reinstall", "--no-deps"]).arg(wheel);
    cargo::status(install)
}

/// Runs tests of python/tests.
pub(crate) fn pytest(root: &Path, python: &Path, args: &[String]) -> Result<(), Failure> {
    let mut test = Command::new(python);
    // From outside of the sources, so that what is imported is the wheel.
    test.current_dir(root.join("python/tests")).args(["-m", "pytest"]).args(args);
    cargo::status(test)
}

/// The Python that the wheel is built and tested with.
fn builder(root: &Path) -> Result<PathBuf, Failure> {
    let notice = "python: fetching maturin, numpy and pytest (30 MB) into target/setup";
    let environment = Environment {
        folder: "python",
        base: Path::new("python3"),
        requirements: REQUIREMENTS,
        complete: false,
        notice,
    };
    environment.prepare(root)
}

impl Environment<'_> {
    /// Its interpreter; everything is fetched where it is not there yet, or something else is.
    pub(crate) fn prepare(&self, root: &Path) -> Result<PathBuf, Failure> {
        let folder = root.join("target/setup").join(self.folder);
        let (python, stamp) = (folder.join("bin/python"), folder.join(".stamp"));
        let requirements = root.join(self.requirements);
        let wanted = fs::read_to_string(&requirements)
            .map_err(|error| Failure::new(format!("{}: {error}", self.requirements)))?;
        let works = Command::new(&python).arg("--version").output();
        if works.is_ok_and(|it| it.status.success())
            && fs::read_to_string(&stamp).is_ok_and(|there| there == wanted)
        {
            return Ok(python);
        }
        eprintln!("{}", self.notice);
        let mut make = Command::new(self.base);
        // Without a pip of its own, which Debian keeps in another package; the caller's does as well.
        make.args(["-m", "venv", "--clear", "--without-pip"]).arg(&folder);
        cargo::status(make)?;
        let mut fetch = pip(&python);
        fetch.args(["install", "--quiet"]).args(self.complete.then_some("--no-deps"));
        fetch.arg("--requirement").arg(requirements);
        cargo::status(fetch)?;
        fs::write(&stamp, wanted)
            .map_err(|error| Failure::new(format!("{}: {error}", stamp.display())))?;
        Ok(python)
    }
}

/// The caller's pip, for another Python.
fn pip(python: &Path) -> Command {
    let mut command = setup::pip();
    command.arg("--python").arg(python);
    command
}

/// The wheel, built as tests are: with assertions and overflow checks. `pip install .` builds one for release.
fn build(root: &Path, python: &Path) -> Result<PathBuf, Failure> {
    let out = root.join("target/wheels/test");
    // So that the one that is there afterwards is the one that was built.
    let _ = fs::remove_dir_all(&out);
    let mut command = Command::new(python.with_file_name("maturin"));
    command.current_dir(root).args(["build", "--profile", "dev", "--compatibility", "linux"]);
    command.arg("--out").arg(&out).env("PYO3_PYTHON", python);
    let include = std::env::var("CPLUS_INCLUDE_PATH").ok();
    if let Some(path) = setup::include_path(root, include.as_deref()) {
        command.env("CPLUS_INCLUDE_PATH", path);
    }
    cargo::status(command)?;
    let built = fs::read_dir(&out).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut wheels: Vec<PathBuf> = built.filter(|path| is_wheel(path)).collect();
    match (wheels.pop(), wheels.is_empty()) {
        (Some(wheel), true) => Ok(wheel),
        _ => Err(Failure::new(format!("maturin left no wheel, or several, in {}", out.display()))),
    }
}

fn is_wheel(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "whl")
}

/// The features that the wheel is built with, for checks of the whole workspace.
pub(crate) const FEATURES: &str = "refit-python/cuda,refit-python/etcd,refit-python/nixl";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_see_the_features_of_the_wheel() {
        let manifest = include_str!("../../pyproject.toml");
        let line = manifest.lines().find(|line| line.starts_with("features = ")).unwrap();
        for feature in FEATURES.split(',') {
            let name = feature.strip_prefix("refit-python/").unwrap();
            assert!(line.contains(&format!("\"{name}\"")), "{name}: {line}");
        }
        assert_eq!(line.matches('"').count(), 2 * FEATURES.split(',').count());
    }

    #[test]
    fn every_other_crate_is_tested_by_plain_cargo() {
        let root = cargo::workspace_root();
        let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap();
        let (_, members) = manifest.split_once("default-members = [").unwrap();
        let (members, _) = members.split_once(']').unwrap();
        for entry in fs::read_dir(root.join("crates")).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let listed = members.contains(&format!("\"crates/{name}\""));
            assert_eq!(listed, name != "python", "crates/{name} in default-members of Cargo.toml");
        }
    }

    #[test]
    fn the_tests_do_not_travel_in_the_wheel() {
        assert!(include_str!("../../pyproject.toml").contains("exclude = [\"python/tests/**\""));
        assert!(is_wheel(Path::new("a.whl")) && !is_wheel(Path::new("a.tar.gz")));
    }
}
