//! Where the ranks of a bench meet: a directory made for it.

use std::path::Path;
use std::time::Duration;

use refit_service::rendezvous::{Directory, Key};

use crate::error::CliError;

/// After what silence a rank counts as dead. Nobody waits for that: whoever started the ranks sees them end.
const TTL: Duration = Duration::from_secs(60);

pub(super) type Meeting = refit_service::Meeting<Directory>;

/// Meets in this directory, under a name for each kind of publication.
pub(super) fn meet(directory: &Path, name: &str) -> Result<Meeting, CliError> {
    Ok(refit_service::Meeting::new(Directory::new(directory)?, Key::new([name])?, TTL)?)
}
