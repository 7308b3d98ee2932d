//! Rules for dependency trees, transitive dependencies included.

use std::path::Path;

use super::Finding;
use crate::{cargo, failure::Failure};

/// What the pure crates may be built from, on any platform and with all features: nothing here can do IO by itself.
/// `libc` comes with blake3's look at the processor on aarch64.
const PLANNER: [&str; 16] = [
    "arrayvec",
    "blake3",
    "cfg-if",
    "constant_time_eq",
    "cpufeatures",
    "libc",
    "proc-macro2",
    "quote",
    "serde",
    "serde_core",
    "serde_derive",
    "smallvec",
    "syn",
    "thiserror",
    "thiserror-impl",
    "unicode-ident",
];

/// Besides those: the planner, half-precision values, `exp`, and reading a `config.json`.
const TRANSLATE: [&str; 10] = [
    "refit-planner",
    "half",
    "libm",
    "crunchy",
    "zerocopy",
    "zerocopy-derive",
    "serde_json",
    "itoa",
    "memchr",
    "zmij",
];

pub(super) fn check(root: &Path) -> Result<Vec<Finding>, Failure> {
    let mut findings = allowed("planner", &tree(root, "refit-planner")?, &[&PLANNER]);
    findings.extend(allowed("translate", &tree(root, "refit-translate")?, &[&PLANNER, &TRANSLATE]));
    findings.extend(blind("pool", &tree(root, "refit-pool")?));
    Ok(findings)
}

/// The names of everything that `package` is built from, itself included.
fn tree(root: &Path, package: &str) -> Result<Vec<String>, Failure> {
    let mut command = cargo::cargo(root);
    command.current_dir(root).args([
        "tree",
        "--quiet",
        "--locked",
        "--package",
        package,
        "--edges",
        "normal",
    ]);
    command.args(["--all-features", "--target", "all", "--prefix", "none", "--format", "{p}"]);
    let output = command.output().map_err(|error| Failure::new(format!("cargo tree: {error}")))?;
    if !output.status.success() {
        return Err(Failure::new(format!(
            "cargo tree: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    Ok(names(&String::from_utf8_lossy(&output.stdout)))
}

/// `blake3 v1.8.7 (*)` -> `blake3`
fn names(tree: &str) -> Vec<String> {
    let mut names: Vec<_> =
        tree.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect();
    names.sort();
    names.dedup();
    names
}

fn allowed(folder: &str, names: &[String], lists: &[&[&str]]) -> Vec<Finding> {
    let own = format!("refit-{folder}");
    names
        .iter()
        .filter(|name| **name != own && !lists.iter().any(|list| list.contains(&name.as_str())))
        .map(|name| {
            let advice = format!(
                "depends on `{name}`; this crate is pure, see the list in xtask/src/tidy/tree.rs"
            );
            Finding::whole(&format!("crates/{folder}/Cargo.toml"), advice)
        })
        .collect()
}

/// The pool's keys are opaque bytes: it must not learn what a plan is.
fn blind(folder: &str, names: &[String]) -> Vec<Finding> {
    let knows = names
        .iter()
        .filter(|name| name.starts_with("refit") && **name != format!("refit-{folder}"));
    knows
        .map(|name| {
            let advice =
                format!("depends on `{name}`; the pool knows no other crate of this workspace");
            Finding::whole(&format!("crates/{folder}/Cargo.toml"), advice)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_once() {
        assert_eq!(names("b v1.0.0 (*)\na v2.0.0 (/x/a)\nb v1.0.0\n\n"), ["a", "b"]);
    }

    #[test]
    fn what_is_not_on_a_list_is_found() {
        let tree = names("refit-planner v0.1.0\nblake3 v1.0.0\nrand v0.9.0\n");
        assert_eq!(allowed("planner", &tree, &[&PLANNER]).len(), 1);
        assert_eq!(allowed("translate", &tree, &[&PLANNER, &TRANSLATE, &["rand"]]).len(), 0);
    }

    #[test]
    fn the_pool_knows_no_plan() {
        assert_eq!(blind("pool", &names("refit-pool v0.1.0\nparking_lot v0.12.0\n")).len(), 0);
        assert_eq!(blind("pool", &names("refit-pool v0.1.0\nrefit-planner v0.1.0\n")).len(), 1);
    }
}
