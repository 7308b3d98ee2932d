//! Which files there are, and which there must be.

use std::{path::Path, process::Command};

use super::Finding;
use crate::failure::Failure;

const REQUIRED: [&str; 7] = [
    "Cargo.lock",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "crates/planner/src/lib.rs",
    "crates/translate/src/lib.rs",
];

/// Every file that is tracked, or would be by `git add .`.
pub(super) fn list(root: &Path) -> Result<Vec<String>, Failure> {
    let output = Command::new("git")
        .arg("-C")
        .arg(root)
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .output()
        .map_err(|error| Failure::new(format!("git: {error}")))?;
    if !output.status.success() {
        return Err(Failure::new(format!(
            "git ls-files: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    let names = String::from_utf8_lossy(&output.stdout);
    let mut files: Vec<String> = names
        .split('\0')
        .filter(|name| !name.is_empty() && root.join(name).is_file())
        .map(str::to_owned)
        .collect();
    files.sort();
    files.dedup();
    Ok(files)
}

/// What every clone must have.
pub(super) fn required(files: &[String]) -> Vec<Finding> {
    REQUIRED
        .iter()
        .filter(|name| !files.iter().any(|file| file == *name))
        .map(|name| Finding::whole(name, "this file must exist"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_licence_is_found() {
        let files: Vec<String> =
            REQUIRED.iter().filter(|name| **name != "LICENSE-MIT").map(|&n| n.to_owned()).collect();
        assert_eq!(required(&files), [Finding::whole("LICENSE-MIT", "this file must exist")]);
    }
}
