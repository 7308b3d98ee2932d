//! The version header: 64 bytes beside a source's parameters that say which change they are of, and whether one is being
//! made. A sequence lock that is read over the network: targets read it by a read of its own, after their data.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::fmt;
use std::sync::atomic::{Ordering, fence};

use refit_pool::Memory;
use serde::{Deserialize, Serialize};

use crate::error::RefitError;
use crate::land::DeviceLander;
use crate::memory::Reach;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 64;

/// First word: name and format version. A change of the format must change it.
const MAGIC: u64 = u64::from_le_bytes(*b"refit\0h1");

/// Which change of a source's parameters they are of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Stamp {
    /// Counts begun and ended changes of one incarnation. Odd while the parameters are being written, and never the same
    /// even number twice.
    pub epoch: u64,
    /// What the trainer calls the parameters.
    pub version: u64,
}

impl Stamp {
    /// Whether the parameters are not being written.
    #[must_use]
    pub fn is_stable(self) -> bool {
        self.epoch.is_multiple_of(2)
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let writing = if self.is_stable() { "" } else { ", being written" };
        write!(f, "version {} (epoch {}{writing})", self.version, self.epoch)
    }
}

/// An incarnation as errors say it: 32 hexadecimal digits. In two words, so that it does not make errors large.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Incarnation([u64; 2]);

impl From<u128> for Incarnation {
    fn from(incarnation: u128) -> Self {
        Self(halves(incarnation))
    }
}

impl From<Incarnation> for u128 {
    fn from(Incarnation([low, high]): Incarnation) -> Self {
        Self::from(low) | Self::from(high) << 64
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from(*self))
    }
}

/// What the header of a source says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Header {
    /// Drawn anew for every source: one that restarts is never taken for the one before.
    pub incarnation: u128,
    /// Which change the parameters are of.
    pub stamp: Stamp,
}

/// What a target has been told to find at a source rank: what travels in an announcement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Expected {
    /// The source rank.
    pub rank: u32,
    /// Its incarnation.
    pub incarnation: u128,
    /// The version of its parameters.
    pub version: u64,
    /// The epoch under which that version was committed.
    pub epoch: u64,
}

impl Expected {
    /// Version and epoch.
    #[must_use]
    pub fn stamp(&self) -> Stamp {
        Stamp { epoch: self.epoch, version: self.version }
    }
}

/// Bytes that were read as a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// A header, as it was written.
    Whole(Header),
    /// A header of which a part was written before and a part after it was read.
    Mixed(Header),
    /// Something else.
    Other,
}

impl Header {
    /// What a target is to be told of a source rank with this header; nothing while its parameters are being written.
    #[must_use]
    pub fn offered_by(&self, rank: u32) -> Option<Expected> {
        let Self { incarnation, stamp: Stamp { epoch, version } } = *self;
        self.stamp.is_stable().then_some(Expected { rank, incarnation, version, epoch })
    }

    /// The header as words: magic, incarnation, epoch, version, two words for later, and a checksum of all of them.
    fn words(&self) -> [u64; 8] {
        let Self { incarnation, stamp: Stamp { epoch, version } } = *self;
        let [low, high] = halves(incarnation);
        let mut words = [MAGIC, low, high, epoch, version, 0, 0, 0];
        words[7] = check(&words);
        words
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        bytes(&self.words())
    }

    /// What these bytes are. A header that was read while it was written is told from one that was not by its checksum:
    /// neither processors nor devices write 64 bytes at once for whoever reads from afar.
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Read {
        let mut words = [0; 8];
        let (chunks, _) = bytes.as_chunks::<8>();
        words.iter_mut().zip(chunks).for_each(|(word, chunk)| *word = u64::from_le_bytes(*chunk));
        let [magic, low, high, epoch, version, _, _, sum] = words;
        if magic != MAGIC {
            return Read::Other;
        }
        let incarnation = Incarnation([low, high]).into();
        let header = Self { incarnation, stamp: Stamp { epoch, version } };
        if check(&words) == sum { Read::Whole(header) } else { Read::Mixed(header) }
    }

    /// Writes the header at the start of this memory, for whoever publishes parameters without a
    /// [`Source`](crate::Source). What was written before is visible to peers before it, and it before what is written
    /// next: by this processor. What devices write has to be waited for.
    ///
    /// # Errors
    /// [`RefitError::NotHost`] for memory that this build cannot write, or that is no aligned 64 bytes;
    /// [`RefitError::Device`] when its device fails.
    pub fn store(&self, memory: &mut Memory) -> Result<(), RefitError> {
        self.store_by(memory, None, &Reach::default())
    }

    /// The same, by a device that is known.
    pub(crate) fn store_by(
        &self,
        memory: &mut Memory,
        device: Option<&DeviceLander>,
        reach: &Reach,
    ) -> Result<(), RefitError> {
        let words = self.words();
        // Parameters written before are new where the header is, ...
        fence(Ordering::SeqCst);
        if let Some(cells) = memory.host_words_mut() {
            if cells.len() < words.len() {
                return Err(RefitError::NotHost { param: NAME.to_owned() });
            }
            cells
                .iter()
                .zip(words)
                .for_each(|(cell, word)| cell.store(word.to_le(), Ordering::Release));
        } else {
            reach.write(memory, &bytes(&words), device, NAME)?;
        }
        // ... and those written next are not where it is old.
        fence(Ordering::SeqCst);
        Ok(())
    }
}

/// What errors call the header's memory.
pub(crate) const NAME: &str = "the version header";

fn halves(incarnation: u128) -> [u64; 2] {
    let mut halves = [0; 2];
    let bytes = incarnation.to_le_bytes();
    let (chunks, _) = bytes.as_chunks::<8>();
    halves.iter_mut().zip(chunks).for_each(|(half, chunk)| *half = u64::from_le_bytes(*chunk));
    halves
}

/// A checksum of all words but the last.
fn check(words: &[u64; 8]) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key("refit header v1");
    words[..7].iter().for_each(|word| {
        hasher.update(&word.to_le_bytes());
    });
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

fn bytes(words: &[u64; 8]) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    let (chunks, _) = bytes.as_chunks_mut::<8>();
    chunks.iter_mut().zip(words).for_each(|(chunk, word)| *chunk = word.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Header = Header { incarnation: 3 << 100 | 7, stamp: Stamp { epoch: 4, version: 9 } };

    #[test]
    fn headers_travel_unchanged() {
        assert_eq!(Header::decode(&OLD.encode()), Read::Whole(OLD));
        assert_eq!(Header::decode(&[0; 64]), Read::Other);
        let offered = OLD.offered_by(5).unwrap();
        assert_eq!(
            (offered.rank, offered.incarnation, offered.stamp()),
            (5, OLD.incarnation, OLD.stamp)
        );
        let odd = Header { stamp: Stamp { epoch: 5, ..OLD.stamp }, ..OLD };
        assert_eq!(odd.offered_by(5), None);
        assert_eq!(odd.stamp.to_string(), "version 9 (epoch 5, being written)");
    }

    /// Whatever words of two headers a reader gets, it takes them for neither unless they are all of one.
    #[test]
    fn mixes_of_two_headers_are_neither() {
        let new = Header { incarnation: 1 << 70, stamp: Stamp { epoch: 5, version: 10 } };
        let (a, b) = (OLD.encode(), new.encode());
        for mask in 0_u32..256 {
            let mut mixed = a;
            for word in (0..8).filter(|word| mask & 1 << word != 0) {
                mixed[word * 8..][..8].copy_from_slice(&b[word * 8..][..8]);
            }
            match Header::decode(&mixed) {
                Read::Whole(found) => assert_eq!(found.encode(), mixed, "{mask:b}"),
                Read::Mixed(_) => assert!(mixed != a && mixed != b),
                Read::Other => panic!("both have the magic"),
            }
            let whole = mixed == a || mixed == b;
            assert_eq!(matches!(Header::decode(&mixed), Read::Whole(_)), whole, "{mask:b}");
        }
    }

    #[test]
    fn every_flip_is_found() {
        for bit in 0..512 {
            let mut damaged = OLD.encode();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(!matches!(Header::decode(&damaged), Read::Whole(_)), "bit {bit}");
        }
    }
}
