//! Rules for `Cargo.toml` files. The lines are read as text: our manifests keep one entry on one line.

use std::collections::BTreeMap;

use super::Finding;

pub(super) fn check(file: &str, content: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let is_root = file == "Cargo.toml";
    let is_library =
        file.starts_with("crates/") && !content.lines().any(|line| line.trim() == "[[bin]]");
    let features = features(content);
    if is_library && features.get("default").is_none_or(|list| !list.is_empty()) {
        findings.push(Finding::whole(
            file,
            "`default = []` is missing under [features]; a host chooses what it includes",
        ));
    }
    if !is_root && !section(content, "lints").any(|(_, line)| line == "workspace = true") {
        findings.push(Finding::whole(file, "`workspace = true` is missing under [lints]"));
    }
    if file.starts_with("crates/")
        && let Some(path) = path_to_stub_api(&features)
    {
        findings.push(Finding::whole(
            file,
            format!("feature `nixl` enables `{path}`; features unify, so this would turn a host's linked NIXL into a stub"),
        ));
    }
    for (index, line) in content.lines().enumerate() {
        if line.starts_with("nixl-sys") && line.contains("stub-api") {
            findings.push(Finding::at(
                file,
                index + 1,
                "`stub-api` belongs to the feature `nixl-dlopen` only",
            ));
        }
    }
    findings
}

/// The lines of one section, numbered from one, without comments and blank lines.
fn section<'a>(content: &'a str, name: &str) -> impl Iterator<Item = (usize, &'a str)> {
    let head = format!("[{name}]");
    let mut inside = false;
    content.lines().enumerate().filter_map(move |(index, line)| {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.starts_with('[') {
            inside = line == head;
            return None;
        }
        (inside && !line.is_empty()).then_some((index + 1, line))
    })
}

fn features(content: &str) -> BTreeMap<&str, Vec<&str>> {
    section(content, "features")
        .filter_map(|(_, line)| {
            let (name, list) = line.split_once('=')?;
            let list = list.trim().trim_start_matches('[').trim_end_matches(']');
            let entries = list
                .split(',')
                .map(|entry| entry.trim().trim_matches('"'))
                .filter(|entry| !entry.is_empty());
            Some((name.trim(), entries.collect()))
        })
        .collect()
}

/// What turns the stubs on, if `nixl` does so. The CLI is a program and may choose; there `nixl` means `nixl-dlopen`.
fn path_to_stub_api<'a>(features: &BTreeMap<&'a str, Vec<&'a str>>) -> Option<&'a str> {
    if !features.contains_key("nixl-dlopen") {
        return None;
    }
    let mut open = vec!["nixl"];
    let mut seen = Vec::new();
    while let Some(feature) = open.pop() {
        if seen.contains(&feature) {
            continue;
        }
        seen.push(feature);
        if feature.ends_with("stub-api") || feature.ends_with("nixl-dlopen") {
            return Some(feature);
        }
        open.extend(features.get(feature).into_iter().flatten());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
[package]
name = \"refit-transport\"

[features]
default = []
# A comment.
nixl = [\"dep:nixl-sys\"]
nixl-dlopen = [\"nixl\", \"nixl-sys/stub-api\"]

[dependencies]
nixl-sys = { workspace = true, optional = true }

[lints]
workspace = true
";

    fn count(file: &str, content: &str) -> usize {
        check(file, content).len()
    }

    #[test]
    fn good_manifests_pass() {
        assert_eq!(count("crates/transport/Cargo.toml", GOOD), 0);
        assert_eq!(count("Cargo.toml", "[workspace]\n"), 0);
        assert_eq!(
            count(
                "crates/cli/Cargo.toml",
                "[[bin]]\n[features]\nnixl = [\"refit/nixl-dlopen\"]\n[lints]\nworkspace = true\n"
            ),
            0
        );
    }

    #[test]
    fn each_rule_finds_its_case() {
        let file = "crates/transport/Cargo.toml";
        for (from, to) in [
            ("default = []", "default = [\"nixl\"]"),
            ("default = []\n", ""),
            ("workspace = true\n", "\n"),
            ("[\"dep:nixl-sys\"]", "[\"dep:nixl-sys\", \"nixl-sys/stub-api\"]"),
            ("[\"dep:nixl-sys\"]", "[\"other\"]\nother = [\"nixl-dlopen\"]"),
            ("optional = true", "features = [\"stub-api\"]"),
        ] {
            let bad = GOOD.replace(from, to);
            assert_ne!(bad, GOOD);
            assert_eq!(count(file, &bad), 1, "{from} -> {to}");
        }
    }
}
