//! What an agent with two transports publishes: what each of them does, under the name that it has.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use crate::Cause;
use crate::envelope::Reader;

const VERSION: u8 = 1;

/// One transport's name and metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part<'a> {
    pub(super) name: &'a str,
    pub(super) metadata: &'a [u8],
}

/// Both transports', as far as the agent has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blob<'a> {
    pub(super) near: Option<Part<'a>>,
    pub(super) far: Option<Part<'a>>,
}

impl<'a> Blob<'a> {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        for part in [self.near, self.far] {
            out.push(u8::from(part.is_some()));
            let Some(Part { name, metadata }) = part else { continue };
            for bytes in [name.as_bytes(), metadata] {
                out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
                out.extend_from_slice(bytes);
            }
        }
        out
    }

    pub(super) fn decode(bytes: &'a [u8]) -> Result<Self, Cause> {
        let mut reader = Reader::new(bytes);
        if reader.array("auto version")? != [VERSION] {
            return Err(Cause::Metadata { part: "auto version" });
        }
        let near = part(&mut reader, "peer part")?;
        let far = part(&mut reader, "nixl part")?;
        if !reader.is_empty() {
            return Err(Cause::Metadata { part: "auto length" });
        }
        Ok(Self { near, far })
    }
}

fn part<'a>(reader: &mut Reader<'a>, part: &'static str) -> Result<Option<Part<'a>>, Cause> {
    match reader.array(part)? {
        [0] => Ok(None),
        [1] => {
            let name = std::str::from_utf8(reader.bytes(part)?);
            let name = name.map_err(|_| Cause::Metadata { part })?;
            Ok(Some(Part { name, metadata: reader.bytes(part)? }))
        }
        _ => Err(Cause::Metadata { part }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEAR: Part<'_> = Part { name: "n", metadata: b"near" };
    const FAR: Part<'_> = Part { name: "far", metadata: &[0xFF; 40] };

    #[test]
    fn what_goes_in_comes_out() {
        for blob in [
            Blob { near: Some(NEAR), far: Some(FAR) },
            Blob { near: None, far: Some(FAR) },
            Blob { near: Some(NEAR), far: None },
            Blob { near: None, far: None },
        ] {
            assert_eq!(Blob::decode(&blob.encode()).unwrap(), blob);
        }
    }

    #[test]
    fn every_truncation_and_addition_is_refused_and_every_flipped_bit_is_read_exactly() {
        let blob = Blob { near: Some(NEAR), far: Some(FAR) };
        let bytes = blob.encode();
        for len in 0..bytes.len() {
            assert!(Blob::decode(&bytes[..len]).is_err(), "{len} bytes");
        }
        assert!(Blob::decode(&[bytes.as_slice(), &[0]].concat()).is_err());
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            match Blob::decode(&damaged) {
                Ok(found) => assert_eq!(found.encode(), damaged, "bit {bit}"),
                Err(cause) => assert!(matches!(cause, Cause::Metadata { .. }), "bit {bit}"),
            }
        }
    }

    #[test]
    fn lengths_that_lie_cost_nothing() {
        let bytes = Blob { near: Some(NEAR), far: None }.encode();
        for len in [2_u64, 1 << 40, u64::MAX] {
            let mut lying = bytes.clone();
            lying[2..10].copy_from_slice(&len.to_le_bytes());
            assert!(Blob::decode(&lying).is_err(), "{len}");
        }
    }
}
