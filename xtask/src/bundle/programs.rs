//! Builds the programs of a bundle and finds where cargo put them.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::{licences::add_tree, runtime::Files};
use crate::{cargo, failure::Failure};

/// What measures the kernel by itself on a GPU: an example, and the crate it is of.
const RATES: (&str, &str) = ("refit-kernels", "rates");

/// The tests to whom a host's GPUs and NIXL make a difference. The others prove as much where they were built.
const TESTS: [&str; 3] = ["auto", "cuda", "nixl"];

/// The `refit` command, built for release.
pub(crate) fn command(root: &Path, features: &str) -> Result<Files, Failure> {
    let mut command = cargo::cargo(root);
    command.args(["build", "--release", "--package", "refit-cli", "--features", features]);
    let built = executables(root, command)?;
    let refit = built.into_iter().find(|path| path.file_name().is_some_and(|name| name == "refit"));
    let refit = refit.ok_or_else(|| Failure::new("cargo built no `refit`"))?;
    Ok(Files::from([(PathBuf::from("bin/refit"), refit)]))
}

/// Tests across crates, and what measures a GPU.
pub(crate) fn tests(root: &Path, features: &str) -> Result<Files, Failure> {
    let mut command = cargo::cargo(root);
    command.args(["test", "--no-run", "--package", "refit-tests", "--features", features]);
    command.args(TESTS.iter().flat_map(|test| ["--test", test]));
    let mut files = Files::new();
    for path in executables(root, command)? {
        files.insert(Path::new("tests/bin").join(plain_name(&path)), path);
    }
    if files.is_empty() {
        return Err(Failure::new("cargo built no tests"));
    }
    let (package, example) = RATES;
    let mut command = cargo::cargo(root);
    command.args(["build", "--release", "--package", package, "--example", example]);
    for path in executables(root, command)? {
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

/// Runs cargo and lists the executables that it built or found built.
fn executables(root: &Path, mut command: Command) -> Result<Vec<PathBuf>, Failure> {
    command.current_dir(root).args(["--locked", "--message-format", "json-render-diagnostics"]);
    command.stdout(Stdio::piped());
    let output = command
        .spawn()
        .and_then(std::process::Child::wait_with_output)
        .map_err(|error| Failure::new(format!("cargo: {error}")))?;
    if !output.status.success() {
        return Err(Failure::child(output.status.code()));
    }
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(executable)
        .map(|path| path.map(PathBuf::from))
        .collect()
}

/// The executable that one of cargo's messages speaks of: JSON on one line, written without spaces.
fn executable(message: &str) -> Option<Result<&str, Failure>> {
    let rest = message.strip_prefix("{\"reason\":\"compiler-artifact\",")?;
    let (_, path) = rest.split_once("\"executable\":\"")?;
    let (path, _) = path.split_once('"')?;
    if path.contains('\\') {
        // An escape: such a path would have to be decoded.
        return Some(Err(Failure::new(format!(
            "{path}: move the workspace to a path without quotes and backslashes"
        ))));
    }
    Some(Ok(path))
}

/// `deps/nixl-0123456789abcdef` -> `nixl`
fn plain_name(path: &Path) -> String {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    match name.rsplit_once('-') {
        Some((plain, hash)) if hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit()) => {
            plain.to_owned()
        }
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_found_in_cargos_messages() {
        let line = r#"{"reason":"compiler-artifact","target":{"name":"nixl"},"executable":"/w/deps/nixl-0123456789abcdef","fresh":true}"#;
        assert_eq!(executable(line).unwrap().unwrap(), "/w/deps/nixl-0123456789abcdef");
        for line in [
            r#"{"reason":"compiler-artifact","executable":null,"fresh":true}"#,
            r#"{"reason":"build-script-executed","executable":"/w/x"}"#,
            "",
        ] {
            assert!(executable(line).is_none(), "{line}");
        }
        assert!(
            executable(r#"{"reason":"compiler-artifact","executable":"/w/a\"b"}"#)
                .unwrap()
                .is_err()
        );
    }

    #[test]
    fn hashes_of_cargo_are_cut_off() {
        assert_eq!(plain_name(Path::new("/w/deps/nixl-0123456789abcdef")), "nixl");
        assert_eq!(plain_name(Path::new("/w/release/examples/rates")), "rates");
        assert_eq!(plain_name(Path::new("/w/a-b")), "a-b");
    }
}
