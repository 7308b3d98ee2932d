//! Names that are never drawn twice.

use std::fs::File;
use std::io::{self, Read};

/// 128 random bits.
pub(crate) fn random() -> io::Result<u128> {
    let mut bits = [0; 16];
    File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut bits))?;
    Ok(u128::from_le_bytes(bits))
}
