//! Whether NIXL can be used in this run.

use std::path::Path;

use crate::{failure::Failure, setup};

/// The outcome of setup, for tasks that go on without NIXL.
#[derive(Debug)]
pub(crate) enum Nixl {
    /// Build with NIXL and insist on it.
    Ready,
    /// Build without; the text says why.
    Missing(String),
}

impl Nixl {
    /// Runs setup. When it fails the task goes on without NIXL, unless `REFIT_REQUIRE_NIXL=1` forbids that.
    pub(crate) fn prepare(root: &Path) -> Result<Self, Failure> {
        match setup::run(root) {
            Ok(()) => Ok(Self::Ready),
            Err(why) if std::env::var("REFIT_REQUIRE_NIXL").is_ok_and(|value| value == "1") => Err(
                Failure::new(format!("{why} (and REFIT_REQUIRE_NIXL=1 forbids to go on without)")),
            ),
            Err(why) => {
                let nixl = Self::Missing(why.to_string());
                nixl.remind();
                Ok(nixl)
            }
        }
    }

    /// Whether to build with the NIXL features.
    pub(crate) fn is_ready(&self) -> bool {
        matches!(self, Self::Ready)
    }

    /// Says that NIXL is missing. Printed before and after the run, since the first line scrolls away.
    pub(crate) fn remind(&self) {
        if let Self::Missing(why) = self {
            eprintln!("{why}; continuing without");
        }
    }
}
