//! Whether something that must be fetched can be used in this run.

use std::path::Path;

use crate::{
    failure::Failure,
    setup::{self, Unavailable},
};

/// The outcome of setup, for tasks that go on without.
#[derive(Debug)]
pub(crate) struct Extra {
    name: &'static str,
    /// Why it is missing, if it is.
    missing: Option<String>,
}

impl Extra {
    /// Real NIXL.
    pub(crate) fn nixl(root: &Path) -> Result<Self, Failure> {
        Self::prepare("nixl", "REFIT_REQUIRE_NIXL", setup::run(root))
    }

    /// Meeting in etcd, and a server to test with.
    pub(crate) fn etcd(root: &Path) -> Result<Self, Failure> {
        Self::prepare("etcd", "REFIT_REQUIRE_ETCD", setup::etcd(root))
    }

    /// Where setup failed the task goes on without, unless the variable is 1 and forbids that.
    fn prepare(
        name: &'static str,
        required: &str,
        done: Result<(), Unavailable>,
    ) -> Result<Self, Failure> {
        let missing = match done {
            Ok(()) => None,
            Err(why) if std::env::var(required).is_ok_and(|value| value == "1") => {
                return Err(Failure::new(format!(
                    "{name}: {why} (and {required}=1 forbids to go on without)"
                )));
            }
            Err(why) => Some(why.to_string()),
        };
        let extra = Self { name, missing };
        extra.remind();
        Ok(extra)
    }

    /// Whether to build with the features that need it, and insist on it.
    pub(crate) fn is_ready(&self) -> bool {
        self.missing.is_none()
    }

    /// Says that it is missing. Printed before and after the run, since the first line scrolls away.
    pub(crate) fn remind(&self) {
        if let Some(why) = &self.missing {
            eprintln!("{}: {why}; continuing without", self.name);
        }
    }
}
