//! Rules for every text file.

use super::Finding;
use crate::help;

/// Folders that exist on one machine only. Joined here, so that this file passes its own check.
const PRIVATE: [&str; 3] = [concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/wo", "rk/")];

/// Written by other programs and used byte by byte: how its lines end is not ours to choose.
const FOREIGN: [&str; 2] = ["tests/golden/", "tests/fuzz/corpus/"];

pub(super) fn check(file: &str, content: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let ours = !FOREIGN.iter().any(|folder| file.starts_with(folder));
    for (number, line) in numbered(content) {
        if ours && line.ends_with([' ', '\t', '\r']) {
            findings.push(Finding::at(
                file,
                number,
                "white space at the end of the line; remove it",
            ));
        }
        for folder in PRIVATE.iter().filter(|folder| names_folder(line, folder)) {
            findings.push(Finding::at(
                file,
                number,
                format!("`{folder}` exists on one machine only; use a path inside the workspace"),
            ));
        }
    }
    if ours && !content.is_empty() && !content.ends_with('\n') {
        findings.push(Finding::whole(file, "no newline at the end of the file; add it"));
    }
    findings
}

/// Documents name only tasks that exist.
pub(super) fn check_commands(file: &str, content: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (number, line) in numbered(content) {
        for (at, mention) in line.match_indices("cargo xtask ") {
            let rest = &line[at + mention.len()..];
            let of_a_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
            let end = rest.find(|c| !of_a_name(c)).unwrap_or(rest.len());
            let task = &rest[..end];
            if !task.is_empty() && task != "help" && !help::NAMES.contains(&task) {
                let advice = format!(
                    "there is no `cargo xtask {task}`; the tasks are {}",
                    help::NAMES.join(", ")
                );
                findings.push(Finding::at(file, number, advice));
            }
        }
    }
    findings
}

/// Lines counted from one. `str::lines` would hide a carriage return.
fn numbered(content: &str) -> impl Iterator<Item = (usize, &str)> {
    content.split('\n').enumerate().map(|(index, line)| (index + 1, line))
}

/// Whether the folder is named from the root, not as part of a longer path or address.
fn names_folder(line: &str, folder: &str) -> bool {
    line.match_indices(folder).any(|(at, _)| {
        !line[..at].ends_with(|c: char| {
            c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '~' | '}' | ')' | '*' | '>')
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_ends_are_clean() {
        let lines: Vec<_> =
            check("a.md", "ok\nbad \nworse\t\ndos\r\nend").iter().map(|f| f.line).collect();
        assert_eq!(lines, [Some(2), Some(3), Some(4), None]);
        assert_eq!(check("a.md", "ok\n"), []);
        assert_eq!(check("empty", ""), []);
        assert_eq!(check("tests/golden/a.json", "{ \n}"), []);
        assert_eq!(check("tests/fuzz/corpus/bands/a", "{"), []);
    }

    #[test]
    fn paths_of_one_machine_are_found() {
        let folder = PRIVATE[2];
        for bad in [format!("see {folder}x\n"), format!("\"{folder}x\"\n"), format!("{folder}\n")] {
            assert_eq!(check("a.rs", &bad).len(), 1, "{bad}");
        }
        for good in [
            format!("crates{folder}x\n"),
            format!("https://example.org{folder}\n"),
            format!("${{A}}{folder}\n"),
        ] {
            assert_eq!(check("a.rs", &good), [], "{good}");
        }
    }

    #[test]
    fn documents_name_tasks_that_exist() {
        assert_eq!(
            check_commands(
                "README.md",
                "run `cargo xtask test`, `cargo xtask e2e` and `cargo xtask bench --steps 3`\n"
            ),
            []
        );
        assert_eq!(
            check_commands(
                "README.md",
                "`cargo xtask --help`, `cargo xtask TASK`, `cargo xtask help`\n"
            ),
            []
        );
        let findings = check_commands("README.md", "\nrun cargo xtask tests\n");
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].line, Some(2));
    }
}
