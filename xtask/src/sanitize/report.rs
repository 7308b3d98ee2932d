//! What a run says at its end.

use std::{fmt::Write, time::Duration};

use crate::cargo::Total;

/// What came of one program.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) total: Total,
    /// Tests that were not run.
    pub(super) left_out: usize,
    /// What the tool found; `None` when it did not say.
    pub(super) errors: Option<u64>,
    pub(super) status: Option<i32>,
    pub(super) took: Duration,
}

impl Row {
    /// Whether tests ran, all passed, and nothing was found.
    pub(super) fn is_clean(&self) -> bool {
        self.errors == Some(0) && self.status == Some(0) && self.total.passed() > 0
    }
}

/// A line for each program.
pub(super) fn table(tool: &str, rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
    let mut table = format!("== {tool}\n{:width$}  passed  failed  left out  errors  seconds", "");
    for row in rows {
        let (passed, failed) = (row.total.passed(), row.total.failed());
        let errors = row.errors.map_or_else(|| "not said".to_owned(), |errors| errors.to_string());
        let (left_out, seconds) = (row.left_out, row.took.as_secs_f64());
        let name = row.name;
        let _ = write!(
            table,
            "\n{name:width$}  {passed:>6}  {failed:>6}  {left_out:>8}  {errors:>6}  {seconds:>7.1}"
        );
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(result: &str, errors: Option<u64>, status: i32) -> Row {
        let mut total = Total::default();
        total.line(&format!("test result: {result} 0 ignored; finished in 0.01s"));
        let (name, took) = ("pull", Duration::from_millis(1500));
        Row { name, total, left_out: 1, errors, status: Some(status), took }
    }

    #[test]
    fn rows_are_clean_when_tests_passed_and_nothing_was_found() {
        let passed = "ok. 3 passed; 0 failed;";
        assert!(row(passed, Some(0), 0).is_clean());
        assert!(!row(passed, Some(1), 0).is_clean());
        // It was killed, say.
        assert!(!row(passed, None, 0).is_clean());
        assert!(!row(passed, Some(0), 101).is_clean());
        assert!(!row("ok. 0 passed; 0 failed;", Some(0), 0).is_clean());
    }

    #[test]
    fn tables_have_a_line_for_each() {
        let rows = [row("FAILED. 3 passed; 2 failed;", Some(4), 9), row("ok. 1 passed;", None, 9)];
        assert_eq!(
            table("valgrind", &rows),
            "== valgrind\n\
             \x20     passed  failed  left out  errors  seconds\n\
             pull       3       2         1       4      1.5\n\
             pull       1       0         1  not said      1.5"
        );
    }
}
