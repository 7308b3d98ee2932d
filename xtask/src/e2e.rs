//! Real trainers and a real engine: Megatron-Core, NIXL and vLLM in processes of this machine, compared with transformers.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    cargo,
    failure::Failure,
    python::{self, Environment},
};

/// Megatron-Core 0.19 needs 3.12, and what it is tested with here is pinned for that.
const PYTHON: &str = "3.12";

/// Sets up, runs the examples and the tests that need real Megatron-Core or vLLM, unless `args` choose among the cases, and then the
/// cases of python/e2e/run.py, which gets `args`.
pub(crate) fn run(root: &Path, args: &[String]) -> Result<(), Failure> {
    let base = interpreter()?;
    let wheel = python::wheel(root)?;
    let environment = Environment {
        folder: "e2e",
        base: &base,
        requirements: "python/e2e/requirements.txt",
        complete: true,
        notice: "e2e: fetching Megatron-Core, vLLM, torch and transformers (3 GB, 6 GB unpacked) into target/setup",
    };
    let python = environment.prepare(root)?;
    python::install(&python, &wheel)?;
    let tests = if args.iter().any(|arg| arg.starts_with("--case") || arg == "--help") {
        Ok(())
    } else {
        let files = ["megatron_real", "vllm_contract", "vllm_real", "examples"];
        let tests = files.map(|name| format!("test_{name}.py"));
        python::pytest(root, &python, &[&["-rs".to_owned()], &tests[..]].concat())
    };
    let mut command = Command::new(&python);
    command.current_dir(root).arg("python/e2e/run.py").args(args);
    // What fails in the tests does not hide what the cases say.
    cargo::status(command).and(tests)
}

/// A Python of the release that is pinned: the one that `REFIT_E2E_PYTHON` names, or the first that says so.
fn interpreter() -> Result<PathBuf, Failure> {
    let named = env::var_os("REFIT_E2E_PYTHON").map(PathBuf::from);
    let pyenv = env::var_os("PYENV_ROOT").map(PathBuf::from);
    let pyenv = pyenv.or_else(|| env::home_dir().map(|home| home.join(".pyenv")));
    let versions = pyenv.and_then(|root| root.join("versions").read_dir().ok());
    let installed = versions.into_iter().flatten().flatten();
    let installed = installed.map(|version| version.path().join("bin/python3.12"));
    let candidates = ["python3.12", "python3"].map(PathBuf::from);
    let mut all = named.into_iter().chain(candidates).chain(installed);
    all.find(|python| says(python).is_some_and(|version| is_wanted(&version))).ok_or_else(|| {
        Failure::new(format!(
            "e2e: no Python {PYTHON} was found: install one, or name it in REFIT_E2E_PYTHON"
        ))
    })
}

/// What an interpreter says its version is.
fn says(python: &Path) -> Option<String> {
    let output = Command::new(python).arg("--version").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn is_wanted(version: &str) -> bool {
    version.trim().strip_prefix("Python ").is_some_and(|version| {
        version.strip_prefix(PYTHON).is_some_and(|rest| rest.starts_with('.'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pinned_release_will_do() {
        assert!(is_wanted("Python 3.12.1\n"));
        assert!(
            !is_wanted("Python 3.11.7\n") && !is_wanted("Python 3.120.1") && !is_wanted("3.12.1")
        );
    }

    #[test]
    fn every_requirement_is_pinned() {
        let file = include_str!("../../python/e2e/requirements.txt");
        let lines = file.lines().filter(|line| !line.starts_with('#'));
        let open: Vec<&str> = lines.filter(|line| !line.contains("==")).collect();
        assert!(open.is_empty(), "{open:?}");
    }
}
