//! Why a task failed, and with which exit status.

use std::process::ExitCode;

/// A failed task.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Empty when the child process has already said what is wrong.
    message: String,
    status: u8,
}

impl Failure {
    /// A failure that this program explains itself.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), status: 1 }
    }

    /// A child process failed after saying why; its status is passed on.
    pub(crate) fn child(status: Option<i32>) -> Self {
        let status = status.and_then(|code| u8::try_from(code).ok()).filter(|&code| code != 0);
        Self { message: String::new(), status: status.unwrap_or(1) }
    }

    /// Prints the message, if there is one, and gives the exit status.
    pub(crate) fn report(self) -> ExitCode {
        if !self.message.is_empty() {
            eprintln!("error: {}", self.message);
        }
        ExitCode::from(self.status)
    }
}
