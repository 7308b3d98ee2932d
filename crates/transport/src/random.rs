//! Names that are never drawn twice.

use std::fs::File;
use std::io::Read;

use crate::Cause;

/// 128 random bits, so that an agent that restarts is never taken for its predecessor.
pub(crate) fn random() -> Result<[u8; 16], Cause> {
    let mut bits = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bits))
        .map_err(|error| Cause::Call { call: "read /dev/urandom", status: error.to_string() })?;
    Ok(bits)
}
