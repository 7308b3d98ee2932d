use std::sync::OnceLock;

use refit::{PackRequest, RequestError};

/// Decodes a request: as the bytes are, and as the body of one whose magic and checksum are right.
pub fn request(data: &[u8]) {
    decode(data).ok();
    let sealed = [magic(), blake3::hash(data).as_bytes(), data].concat();
    let sealed = decode(&sealed);
    let broken = matches!(sealed, Err(RequestError::Magic | RequestError::Damaged));
    assert!(!broken, "the seal is not right");
}

/// The first bytes of every request.
fn magic() -> &'static [u8] {
    static MAGIC: OnceLock<Vec<u8>> = OnceLock::new();
    MAGIC.get_or_init(|| PackRequest::nothing(0).encode()[..8].to_vec())
}

fn decode(bytes: &[u8]) -> Result<(), RequestError> {
    let request = PackRequest::decode(bytes)?;
    assert_eq!(request.encode(), bytes, "there is one way to write it");
    assert!(request.ranks().iter().all(|&rank| request.asks(rank)));
    assert!(request.slices().iter().all(|slice| !slice.rows.is_empty() && !slice.cols.is_empty()));
    Ok(())
}
