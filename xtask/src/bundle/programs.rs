//! Builds the programs of a bundle.

use std::path::{Path, PathBuf};

use super::{licences::add_tree, runtime::Files};
use crate::{
    built::{Built, executables, plain_name},
    cargo,
    failure::Failure,
};

/// What measures the kernel by itself on a GPU: an example, and the crate it is of.
const RATES: (&str, &str) = ("refit-kernels", "rates");

/// The tests to whom a host's GPUs and NIXL make a difference. The others prove as much where they were built.
const TESTS: [&str; 3] = ["auto", "cuda", "nixl"];

/// The `refit` command, built for release.
pub(crate) fn command(root: &Path, features: &str) -> Result<Files, Failure> {
    let mut command = cargo::cargo(root);
    command.args(["build", "--release", "--package", "refit-cli", "--features", features]);
    let built = executables(root, command)?;
    let mut paths = built.into_iter().map(|it| it.path);
    let refit = paths.find(|path| path.file_name().is_some_and(|name| name == "refit"));
    let refit = refit.ok_or_else(|| Failure::new("cargo built no `refit`"))?;
    Ok(Files::from([(PathBuf::from("bin/refit"), refit)]))
}

/// Tests across crates, and what measures a GPU.
pub(crate) fn tests(root: &Path, features: &str) -> Result<Files, Failure> {
    let mut command = cargo::cargo(root);
    command.args(["test", "--no-run", "--package", "refit-tests", "--features", features]);
    command.args(TESTS.iter().flat_map(|test| ["--test", test]));
    let mut files = Files::new();
    for Built { path, .. } in executables(root, command)? {
        files.insert(Path::new("tests/bin").join(plain_name(&path)), path);
    }
    if files.is_empty() {
        return Err(Failure::new("cargo built no tests"));
    }
    let (package, example) = RATES;
    let mut command = cargo::cargo(root);
    command.args(["build", "--release", "--package", package, "--example", example]);
    for Built { path, .. } in executables(root, command)? {
        files.insert(Path::new("tests/bin").join(plain_name(&path)), path);
    }
    Ok(files)
}

/// What the tests read, and the scripts that measure others.
pub(crate) fn data(root: &Path) -> Result<Files, Failure> {
    let mut files = Files::new();
    add_tree(&mut files, Path::new("tests/golden"), &root.join("tests/golden"))?;
    add_tree(&mut files, Path::new("benches/peers"), &root.join("benches/peers"))?;
    files.retain(|place, _| !place.components().any(|part| part.as_os_str() == "__pycache__"));
    Ok(files)
}
