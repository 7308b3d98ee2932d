//! The table of promises names tests that exist.

use std::{collections::BTreeSet, fs, path::Path};

use super::Finding;
use crate::failure::Failure;

/// The document.
const TABLE: &str = "docs/promises.md";

/// How many promises there are, counted from P1.
const PROMISES: usize = 18;

/// Every promise has a row, and every `` `test` in `file` `` of a row is a test of that file.
pub(super) fn check(root: &Path, files: &[String]) -> Result<Vec<Finding>, Failure> {
    if !files.iter().any(|file| file == TABLE) {
        return Ok(vec![Finding::whole(TABLE, "the table of promises must exist")]);
    }
    let read = |file: &str| {
        fs::read_to_string(root.join(file))
            .map_err(|error| Failure::new(format!("{file}: {error}")))
    };
    let table = read(TABLE)?;
    let mut findings = rows(&table);
    for (line, test, file) in named(&table) {
        let found = files.iter().any(|it| it == file) && is_test(&read(file)?, test);
        if !found {
            findings.push(Finding::at(TABLE, line, format!("`{file}` has no test `{test}`")));
        }
    }
    Ok(findings)
}

/// Promises without a row, or with a row that names no test.
fn rows(table: &str) -> Vec<Finding> {
    let with_tests: BTreeSet<usize> = named(table).map(|(line, ..)| line).collect();
    let mut findings = Vec::new();
    for promise in 1..=PROMISES {
        let start = format!("| P{promise} |");
        let mut lines = table.lines().enumerate();
        match lines.find(|(_, line)| line.starts_with(&start)) {
            None => findings.push(Finding::whole(TABLE, format!("P{promise} has no row"))),
            Some((at, _)) if !with_tests.contains(&(at + 1)) => {
                findings.push(Finding::at(TABLE, at + 1, format!("P{promise} names no test")));
            }
            Some(_) => {}
        }
    }
    findings
}

/// Every `` `test` in `file` ``, with its line.
fn named(table: &str) -> impl Iterator<Item = (usize, &str, &str)> {
    table.lines().enumerate().flat_map(|(at, line)| {
        line.match_indices("` in `").filter_map(move |(middle, mark)| {
            let test = line[..middle].rsplit('`').next()?;
            let file = line[middle + mark.len()..].split('`').next()?;
            Some((at + 1, test, file))
        })
    })
}

/// Whether this source has a function of this name right behind attributes of which one says that it is a test.
fn is_test(source: &str, name: &str) -> bool {
    let start = format!("fn {name}(");
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    lines.iter().enumerate().any(|(at, line)| {
        let above = lines[..at].iter().rev();
        let mut above = above.take_while(|line| line.starts_with("#[") || line.starts_with("//"));
        line.starts_with(&start) && above.any(|line| *line == "#[test]")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_told_from_other_functions() {
        let source =
            "#[test]\n#[ignore]\nfn held() {}\n\nfn helper() {}\n#[cfg(test)]\nfn other() {}\n";
        assert!(is_test(source, "held"));
        assert!(!is_test(source, "helper") && !is_test(source, "other") && !is_test(source, "hel"));
    }

    #[test]
    fn rows_name_tests() {
        let row = "| P1 | whole | `one` in `tests/a.rs`, `two` in `tests/b.rs` |";
        let found: Vec<_> = named(row).collect();
        assert_eq!(found, [(1, "one", "tests/a.rs"), (1, "two", "tests/b.rs")]);
        let findings = rows("| P1 | nothing |\n| P2 | `one` in `tests/a.rs` |\n");
        assert_eq!(findings[0], Finding::at(TABLE, 1, "P1 names no test"));
        assert_eq!(findings[1], Finding::whole(TABLE, "P3 has no row"));
        assert_eq!(findings.len(), PROMISES - 1);
    }
}
