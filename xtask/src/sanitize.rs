//! Tests under what watches memory: valgrind's memcheck, and ThreadSanitizer.
//!
//! Those of host memory and the in-process transport. Over real NIXL neither says anything of us: UCX is clean under neither.

mod control;
mod report;
pub(crate) mod tsan;
pub(crate) mod valgrind;

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use self::report::{Row, table};
use crate::{
    built::{Built, plain_name},
    cargo::Total,
    failure::Failure,
};

/// A program of tests.
#[derive(Debug)]
struct Program {
    /// `crates/pool` for the tests inside of that crate, and the name of a test across crates for those.
    name: &'static str,
    /// Tests that are left out, and why.
    skips: &'static [(&'static str, &'static str)],
}

/// All tests of a program.
const fn whole(name: &'static str) -> Program {
    Program { name, skips: &[] }
}

/// What watches.
struct Tool {
    name: &'static str,
    /// Starts a program under it, which then writes what it finds to files of which the names begin like this.
    command: fn(root: &Path, program: &Path, log: &Path) -> Command,
    /// How many errors those tell of; `None` when they do not say.
    errors: fn(logs: &[String]) -> Option<u64>,
}

impl Program {
    /// The package that it is of.
    fn package(&self) -> String {
        match self.name.strip_prefix("crates/") {
            Some("refit") => "refit".to_owned(),
            Some(folder) => format!("refit-{folder}"),
            None => "refit-tests".to_owned(),
        }
    }

    /// Where cargo would run it.
    fn folder(&self) -> &'static str {
        if self.is_of_a_crate() { self.name } else { "tests" }
    }

    fn is_of_a_crate(&self) -> bool {
        self.name.starts_with("crates/")
    }

    /// Whether it is this one that cargo built.
    fn is(&self, built: &Built) -> bool {
        let name = if self.is_of_a_crate() {
            self.package().replace('-', "_")
        } else {
            self.name.to_owned()
        };
        built.of_library == self.is_of_a_crate() && plain_name(&built.path) == name
    }
}

/// Those that were asked for by name, or all.
fn chosen(all: &'static [Program], names: &[String]) -> Result<Vec<&'static Program>, Failure> {
    if let Some(name) = names.iter().find(|name| all.iter().all(|it| it.name != **name)) {
        let all: Vec<_> = all.iter().map(|it| it.name).collect();
        return Err(Failure::new(format!("no program `{name}`; there are {}", all.join(", "))));
    }
    let asked = |it: &&Program| names.is_empty() || names.iter().any(|name| name == it.name);
    Ok(all.iter().filter(asked).collect())
}

/// The arguments with which `cargo test` builds them.
fn targets(programs: &[&Program]) -> Vec<String> {
    let mut packages: Vec<_> = programs.iter().map(|it| it.package()).collect();
    packages.sort();
    packages.dedup();
    let mut args = vec!["test".to_owned(), "--no-run".to_owned()];
    args.extend(packages.into_iter().flat_map(|package| ["--package".to_owned(), package]));
    if programs.iter().any(|it| it.is_of_a_crate()) {
        args.push("--lib".to_owned());
    }
    let across = programs.iter().filter(|it| !it.is_of_a_crate());
    args.extend(across.flat_map(|it| ["--test".to_owned(), it.name.to_owned()]));
    args
}

/// Runs each of them under the tool and prints a table. Fails if the tool found something, or a test failed.
fn watch(
    root: &Path,
    tool: &Tool,
    programs: &[&'static Program],
    built: &[Built],
) -> Result<(), Failure> {
    let folder = root.join("target/sanitize").join(tool.name);
    // What a run before has left would be counted.
    let _ = fs::remove_dir_all(&folder);
    let mut rows = Vec::new();
    for program in programs {
        let path = built.iter().find(|built| program.is(built)).map(|built| &built.path);
        let path =
            path.ok_or_else(|| Failure::new(format!("cargo built no `{}`", program.name)))?;
        println!("== {} under {}", program.name, tool.name);
        rows.push(one(root, tool, program, path, &folder.join(program.name))?);
    }
    println!("\n{}", table(tool.name, &rows));
    let dirty: Vec<_> = rows.iter().filter(|row| !row.is_clean()).map(|row| row.name).collect();
    if dirty.is_empty() {
        return Ok(());
    }
    let (name, folder) = (tool.name, folder.display());
    Err(Failure::new(format!("{name}: not clean: {}; {folder} has what it said", dirty.join(", "))))
}

fn one(
    root: &Path,
    tool: &Tool,
    program: &Program,
    path: &Path,
    logs: &Path,
) -> Result<Row, Failure> {
    let failed = |what: &Path, error| Failure::new(format!("{}: {error}", what.display()));
    fs::create_dir_all(logs).map_err(|error| failed(logs, error))?;
    let mut command = (tool.command)(root, path, &logs.join("log"));
    command.current_dir(root.join(program.folder()));
    for (test, why) in program.skips {
        println!("left out of {}: {test}: {why}", program.name);
        command.args(["--skip", test]);
    }
    if !program.skips.is_empty() {
        // These tests, and not all whose names begin like theirs.
        command.arg("--exact");
    }
    let started = Instant::now();
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(|error| failed(path, error))?;
    let mut total = Total::default();
    if let Some(stdout) = child.stdout.take() {
        total.pass_through(stdout).map_err(|error| failed(path, error))?;
    }
    let status = child.wait().map_err(|error| failed(path, error))?;
    let errors = (tool.errors)(&said(logs));
    Ok(Row {
        name: program.name,
        total,
        left_out: program.skips.len(),
        errors,
        status: status.code(),
        took: started.elapsed(),
    })
}

/// What the files of a folder say.
fn said(folder: &Path) -> Vec<String> {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let bytes = files.filter_map(|entry| fs::read(entry.path()).ok());
    bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).collect()
}
