//! Programs that are wrong on purpose: a tool that finds nothing in one of them has said nothing of the others.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::{Tool, said};
use crate::{cargo, failure::Failure};

/// Compiles the program and sees whether the tool finds what is wrong with it.
pub(super) fn check(
    root: &Path,
    tool: &Tool,
    source: &str,
    mut rustc: Command,
) -> Result<(), Failure> {
    let folder = root.join("target/sanitize").join(tool.name).join("control");
    // What a run before has left would be counted.
    let _ = fs::remove_dir_all(&folder);
    let logs = folder.join("logs");
    fs::create_dir_all(&logs)
        .map_err(|error| Failure::new(format!("{}: {error}", logs.display())))?;
    let program: PathBuf = folder.join("control");
    rustc.current_dir(root).args(["--edition=2024", "-g", "-o"]).arg(&program).arg(source);
    cargo::status(rustc)?;
    let mut command = (tool.command)(root, &program, &logs.join("log"));
    // How it ends is the tool's to choose.
    let _ = command
        .status()
        .map_err(|error| Failure::new(format!("{}: {error}", command.get_program().display())))?;
    match (tool.errors)(&said(&logs)) {
        Some(found) if found > 0 => {
            println!("{} finds what is wrong with {source}", tool.name);
            Ok(())
        }
        _ => Err(Failure::new(format!(
            "{} finds nothing wrong with {source}, and would not in any test: is it one for this machine?",
            tool.name
        ))),
    }
}
