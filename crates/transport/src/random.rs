//! Names that are never drawn twice.

use std::fs::File;
use std::io::Read;

use crate::{Cause, TransportError};

/// Draws an incarnation: 128 random bits, never drawn twice. `agent` is who needs it, for the error.
///
/// # Errors
/// [`TransportError::Start`] where the system has no random numbers.
pub fn draw_incarnation(agent: &str) -> Result<u128, TransportError> {
    let start = |cause| TransportError::Start { agent: agent.to_owned(), cause };
    random().map(u128::from_le_bytes).map_err(start)
}

/// 128 random bits, so that an agent that restarts is never taken for its predecessor.
pub(crate) fn random() -> Result<[u8; 16], Cause> {
    let mut bits = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bits))
        .map_err(|error| Cause::Call { call: "read /dev/urandom", status: error.to_string() })?;
    Ok(bits)
}
