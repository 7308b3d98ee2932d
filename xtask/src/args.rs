//! The command line, parsed by hand.

use crate::{bundle, help};

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// Print this text.
    Help(&'static str),
    /// Fetch what the NIXL features need.
    Setup,
    /// Run every test.
    Test(Vec<String>),
    /// Run `refit bench`.
    Bench(Vec<String>),
    /// Run `refit`.
    Refit(Vec<String>),
    /// Run the criterion benches.
    Criterion(Vec<String>),
    /// Draw what benches wrote.
    Chart(Vec<String>),
    /// Pack what runs on another host.
    Bundle(bundle::Options),
    /// Compile the kernel to PTX.
    Ptx {
        /// Whether to only say if that would change anything.
        check: bool,
    },
    /// Build and test the Python package.
    Python(Vec<String>),
    /// Compare a real engine with transformers, behind real trainers.
    E2e(Vec<String>),
    /// Run the models of the pool's locks.
    Loom,
    /// Run tests under valgrind.
    Valgrind(Vec<String>),
    /// Run tests under ThreadSanitizer.
    Tsan(Vec<String>),
    /// Kill, stop and restart processes over NIXL.
    Chaos(Vec<String>),
    /// Check the rules of the house.
    Tidy,
    /// Run what CI runs.
    Ci {
        /// Whether the tests run after the checks.
        test: bool,
    },
}

impl Task {
    /// Reads the arguments after `cargo xtask`; the error is a hint for the user.
    pub(crate) fn parse(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut args = args.peekable();
        let Some(name) = args.next() else {
            return Err(format!("no task given\n\n{}", help::MAIN));
        };
        match name.as_str() {
            "--help" | "-h" => return Ok(Self::Help(help::MAIN)),
            "help" => {
                return match args.next() {
                    None => Ok(Self::Help(help::MAIN)),
                    Some(topic) => help::of(&topic).map(Self::Help).ok_or_else(|| unknown(&topic)),
                };
            }
            _ => {}
        }
        let Some(text) = help::of(&name) else { return Err(unknown(&name)) };
        if args.peek().is_some_and(|arg| arg == "--help" || arg == "-h") {
            return Ok(Self::Help(text));
        }
        let rest: Vec<String> = args.collect();
        match name.as_str() {
            // These pass to cargo, which has a `--` of its own.
            "test" => Ok(Self::Test(rest)),
            "criterion" => Ok(Self::Criterion(rest)),
            // These pass to `refit`; a leading `--` only ends the arguments of the task.
            "bench" => Ok(Self::Bench(without_separator(rest))),
            "refit" => Ok(Self::Refit(without_separator(rest))),
            "chart" => Ok(Self::Chart(without_separator(rest))),
            // These pass to pytest.
            "python" => Ok(Self::Python(without_separator(rest))),
            "e2e" => Ok(Self::E2e(without_separator(rest))),
            // These are names of programs.
            "valgrind" => Ok(Self::Valgrind(without_separator(rest))),
            "tsan" => Ok(Self::Tsan(without_separator(rest))),
            "chaos" => Ok(Self::Chaos(without_separator(rest))),
            "bundle" => bundle::Options::parse(rest).map(Self::Bundle),
            "setup" => none(&name, &rest).map(|()| Self::Setup),
            "ptx" => match rest.first().map(String::as_str) {
                Some("--check") if rest.len() == 1 => Ok(Self::Ptx { check: true }),
                _ => none(&name, &rest).map(|()| Self::Ptx { check: false }),
            },
            "loom" => none(&name, &rest).map(|()| Self::Loom),
            "tidy" => none(&name, &rest).map(|()| Self::Tidy),
            _ => match rest.first().map(String::as_str) {
                Some("--no-test") if rest.len() == 1 => Ok(Self::Ci { test: false }),
                _ => none(&name, &rest).map(|()| Self::Ci { test: true }),
            },
        }
    }
}

fn without_separator(mut rest: Vec<String>) -> Vec<String> {
    if rest.first().is_some_and(|arg| arg == "--") {
        rest.remove(0);
    }
    rest
}

fn none(name: &str, rest: &[String]) -> Result<(), String> {
    match rest.first() {
        None => Ok(()),
        Some(arg) => {
            Err(format!("`{name}` does not know `{arg}`; see `cargo xtask {name} --help`"))
        }
    }
}

fn unknown(name: &str) -> String {
    format!("no task `{name}`; the tasks are {}", help::NAMES.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Task, String> {
        Task::parse(line.split_whitespace().map(str::to_owned))
    }

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.to_owned()).collect()
    }

    #[test]
    fn tasks_keep_the_arguments_that_are_passed_on() {
        assert_eq!(
            parse("test -p refit -- --nocapture"),
            Ok(Task::Test(strings(&["-p", "refit", "--", "--nocapture"])))
        );
        assert_eq!(parse("refit -- plan --help"), Ok(Task::Refit(strings(&["plan", "--help"]))));
        assert_eq!(parse("python -- -k nixl"), Ok(Task::Python(strings(&["-k", "nixl"]))));
        assert_eq!(parse("e2e --case moe"), Ok(Task::E2e(strings(&["--case", "moe"]))));
        assert_eq!(parse("chaos --trials 3"), Ok(Task::Chaos(strings(&["--trials", "3"]))));
        assert_eq!(parse("valgrind pull"), Ok(Task::Valgrind(strings(&["pull"]))));
        assert_eq!(parse("tsan"), Ok(Task::Tsan(Vec::new())));
        assert_eq!(parse("bench --steps 3"), Ok(Task::Bench(strings(&["--steps", "3"]))));
    }

    #[test]
    fn help_is_found_in_every_place_where_people_look() {
        for line in ["--help", "-h", "help"] {
            assert_eq!(parse(line), Ok(Task::Help(help::MAIN)));
        }
        for name in help::NAMES {
            let text = help::of(name).unwrap();
            assert_eq!(parse(&format!("{name} --help")), Ok(Task::Help(text)));
            assert_eq!(parse(&format!("help {name}")), Ok(Task::Help(text)));
            assert!(
                help::MAIN.contains(&format!("\n  {name} ")),
                "`{name}` is missing in the overview"
            );
            assert!(
                text.starts_with(&format!("cargo xtask {name}")),
                "the help of `{name}` starts with its usage"
            );
        }
    }

    #[test]
    fn what_is_not_known_is_an_error_with_a_hint() {
        assert!(parse("").unwrap_err().contains("Tasks:"));
        assert!(parse("tset").unwrap_err().contains("tidy"));
        assert!(parse("setup --force").unwrap_err().contains("cargo xtask setup --help"));
        assert!(parse("ci --no-test --fast").unwrap_err().contains("cargo xtask ci --help"));
        assert_eq!(parse("ci --no-test"), Ok(Task::Ci { test: false }));
        assert!(parse("ptx --check --all").unwrap_err().contains("cargo xtask ptx --help"));
        assert_eq!(parse("ptx --check"), Ok(Task::Ptx { check: true }));
        assert_eq!(parse("ptx"), Ok(Task::Ptx { check: false }));
        assert_eq!(parse("ci"), Ok(Task::Ci { test: true }));
    }
}
