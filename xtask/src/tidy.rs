//! The rules of the house that no compiler checks.
//!
//! Each rule is ordinary code over the text of the files; all findings are printed, each with advice.

mod files;
mod manifest;
mod promises;
mod rust;
mod text;
mod tree;

use std::{fmt, fs, path::Path};

use crate::{failure::Failure, ptx};

/// One broken rule.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    /// Relative to the workspace.
    file: String,
    /// Counted from one; none when the whole file is meant.
    line: Option<usize>,
    advice: String,
}

impl Finding {
    fn at(file: &str, line: usize, advice: impl Into<String>) -> Self {
        Self { file: file.to_owned(), line: Some(line), advice: advice.into() }
    }

    fn whole(file: &str, advice: impl Into<String>) -> Self {
        Self { file: file.to_owned(), line: None, advice: advice.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file, self.advice),
            None => write!(f, "{}: {}", self.file, self.advice),
        }
    }
}

/// Checks every file of the workspace that git does not ignore.
pub(crate) fn run(root: &Path) -> Result<(), Failure> {
    let files = files::list(root)?;
    let mut findings = files::required(&files);
    for file in &files {
        let bytes =
            fs::read(root.join(file)).map_err(|error| Failure::new(format!("{file}: {error}")))?;
        // Golden data may be binary; no rule is about that.
        let Ok(content) = String::from_utf8(bytes) else { continue };
        if content.contains('\0') {
            continue;
        }
        findings.extend(check(file, &content));
    }
    findings.extend(kernel(root)?);
    findings.extend(promises::check(root, &files)?);
    findings.extend(tree::check(root)?);
    if findings.is_empty() {
        println!("tidy: {} files and the dependency trees are in order", files.len());
        return Ok(());
    }
    for finding in &findings {
        println!("{finding}");
    }
    Err(Failure::new(format!("tidy: {} findings", findings.len())))
}

/// The PTX is what was made of the kernel's source, as far as digests tell.
fn kernel(root: &Path) -> Result<Option<Finding>, Failure> {
    let read = |file: &str| {
        fs::read_to_string(root.join(file))
            .map_err(|error| Failure::new(format!("{file}: {error}")))
    };
    let why = ptx::mismatch(&read(ptx::SOURCE)?, &read(ptx::PTX)?);
    Ok(why.map(|why| Finding::whole(ptx::PTX, format!("{why}; run `cargo xtask ptx`"))))
}

fn check(file: &str, content: &str) -> Vec<Finding> {
    let mut findings = text::check(file, content);
    let extension = Path::new(file).extension().and_then(|extension| extension.to_str());
    match extension {
        Some("rs") => findings.extend(rust::check(file, content)),
        Some("md") => findings.extend(text::check_commands(file, content)),
        _ if file == "Cargo.toml" || file.ends_with("/Cargo.toml") => {
            findings.extend(manifest::check(file, content))
        }
        _ => {}
    }
    findings
}
