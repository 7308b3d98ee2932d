//! Rules for Rust files.

mod code;

use super::Finding;
use code::code_only;

/// Longer files are hard to hold in one's head.
const MOST_LINES: usize = 700;

/// Where `unsafe` may stand: what owns memory, what speaks to a NIC, what launches kernels, and the Python skin. Besides
/// those the tests, which nobody embeds: counting allocations takes a global allocator, and that is an unsafe trait.
const UNSAFE_ALLOWED: [&str; 5] =
    ["crates/pool/", "crates/transport/", "crates/kernels/", "crates/python/", "tests/"];

/// The crates that can neither do IO nor be random.
const PURE: [&str; 2] = ["crates/planner/src/", "crates/translate/src/"];

/// Code that is not finished. The words are looked for in code, not in comments or strings.
const LEFTOVERS: [(&str, &str); 3] = [
    ("todo!", "finish it, or refuse with an error"),
    ("unimplemented!", "finish it, or refuse with an error"),
    ("dbg!", "remove it"),
];

/// Joined here, so that this file passes its own check.
const FIX_ME: &str = concat!("FIX", "ME");

pub(super) fn check(file: &str, content: &str) -> Vec<Finding> {
    let code = code_only(content);
    let mut findings = Vec::new();
    let lines = content.lines().count();
    if lines > MOST_LINES {
        findings.push(Finding::whole(
            file,
            format!("{lines} lines, more than {MOST_LINES}; split it by topic"),
        ));
    }
    for (index, line) in code.lines().enumerate() {
        let number = index + 1;
        if has_word(line, "unsafe") && !UNSAFE_ALLOWED.iter().any(|folder| file.starts_with(folder))
        {
            findings.push(Finding::at(
                file,
                number,
                "`unsafe` outside pool, transport, kernels and python; move it there behind a safe API",
            ));
        }
        for (word, advice) in LEFTOVERS {
            if has_word(line, word) {
                findings.push(Finding::at(file, number, format!("`{word}`; {advice}")));
            }
        }
        if line.contains("#[ignore") {
            findings.push(Finding::at(
                file,
                number,
                "an ignored test proves nothing; make it pass or remove it",
            ));
        }
    }
    for (index, line) in content.lines().enumerate() {
        if has_word(line, FIX_ME) {
            findings.push(Finding::at(
                file,
                index + 1,
                format!("`{FIX_ME}`; do so, or say in plain words what is missing"),
            ));
        }
    }
    if let Some(folder) = PURE.iter().find(|folder| file.starts_with(**folder)) {
        if file.strip_prefix(folder) == Some("lib.rs") {
            findings.extend(pure_root(file, &code));
        }
        findings.extend(std_linked(file, &code));
    }
    findings
}

/// The attributes that make the promise.
fn pure_root(file: &str, code: &str) -> Vec<Finding> {
    ["#![no_std]", "#![forbid(unsafe_code)]"]
        .into_iter()
        .filter(|attribute| !code.lines().any(|line| line.trim() == *attribute))
        .map(|attribute| {
            Finding::whole(file, format!("`{attribute}` is missing; this crate is pure"))
        })
        .collect()
}

/// `#![no_std]` means little in a crate that links `std` after all; tests may.
fn std_linked(file: &str, code: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut before = "";
    for (index, line) in code.lines().enumerate() {
        if line.split_whitespace().collect::<Vec<_>>().join(" ").contains("extern crate std")
            && before != "#[cfg(test)]"
        {
            findings.push(Finding::at(
                file,
                index + 1,
                "`extern crate std` outside of `#[cfg(test)]`; this crate is pure",
            ));
        }
        if !line.trim().is_empty() {
            before = line.trim();
        }
    }
    findings
}

/// Whether `word` stands in `line` on its own, not as a part of a longer name.
fn has_word(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let after = &line[at + word.len()..];
        !line[..at].ends_with(part) && (word.ends_with('!') || !after.starts_with(part))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn advice(file: &str, content: &str) -> Vec<String> {
        check(file, content).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn unsafe_stays_where_it_belongs() {
        let code = "fn f() { unsafe { g() } }\n";
        assert_eq!(advice("crates/pool/src/memory.rs", code).len(), 0);
        assert_eq!(advice("tests/allocations.rs", code).len(), 0);
        assert_eq!(advice("crates/refit/src/lib.rs", code).len(), 1);
        assert_eq!(
            advice(
                "crates/refit/src/lib.rs",
                "// unsafe\n#![forbid(unsafe_code)]\nlet x = \"unsafe\";\n"
            )
            .len(),
            0
        );
    }

    #[test]
    fn leftovers_are_found_in_code_only() {
        for code in
            ["todo!()", "unimplemented!(\"later\")", "dbg!(x)", "#[ignore]", "#[ignore = \"slow\"]"]
        {
            assert_eq!(advice("tests/a.rs", &format!("{code}\n")).len(), 1, "{code}");
        }
        assert_eq!(
            advice("tests/a.rs", "// todo!()\nlet s = \"dbg!(x)\";\nmy_todo!();\n").len(),
            0
        );
        assert_eq!(advice("tests/a.rs", &format!("// {FIX_ME}: later\n")).len(), 1);
    }

    #[test]
    fn long_files_are_found() {
        assert_eq!(advice("tests/a.rs", &"\n".repeat(MOST_LINES)).len(), 0);
        assert_eq!(advice("tests/a.rs", &"\n".repeat(MOST_LINES + 1)).len(), 1);
    }

    #[test]
    fn pure_crates_say_so_and_mean_it() {
        let root = "crates/planner/src/lib.rs";
        let good = "#![no_std]\n#![forbid(unsafe_code)]\nextern crate alloc;\n#[cfg(test)]\nextern crate std;\n";
        assert_eq!(advice(root, good).len(), 0);
        assert_eq!(advice(root, "//! #![no_std]\n").len(), 2);
        assert_eq!(advice(root, &good.replace("#[cfg(test)]", "")).len(), 1);
        assert_eq!(advice("crates/translate/src/a.rs", "extern  crate  std;\n").len(), 1);
        assert_eq!(advice("crates/refit/src/lib.rs", "extern crate std;\n").len(), 0);
    }
}
