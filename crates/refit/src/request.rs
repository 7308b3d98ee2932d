//! What a target asks source ranks to pack: the boxes that it would otherwise read row by row, or with their neighbours.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::fmt;

use refit_planner::{Capabilities, Program, RankLayout, TensorSlice, Wish, is_scattered, wish};
use serde::{Deserialize, Serialize};

use crate::error::RefitError;
use crate::publication::Publication;

/// First bytes of an encoded request: name and format version. A change of the format must change it.
const MAGIC: &[u8; 8] = b"refit\0k1";

/// No honest request is larger: half a million boxes of tensors with long names.
pub const MAX_REQUEST_BYTES: usize = 64 << 20;

/// What one target rank asks source ranks to pack.
///
/// It speaks of boxes of tensors, not of anybody's parameters, so it stays true when sources restart or are cut in
/// another way, and every copy of a shard answers it alike. Made by [`Target::pack_request`], answered by
/// [`Source::pack`].
///
/// [`Target::pack_request`]: crate::Target::pack_request
/// [`Source::pack`]: crate::Source::pack
#[derive(Clone)]
pub struct PackRequest {
    target: u32,
    wish: Wish,
    digest: [u8; 32],
}

#[derive(Serialize, Deserialize)]
struct Body {
    target: u32,
    /// Ascending.
    ranks: Vec<u32>,
    slices: Vec<Slice>,
}

#[derive(Serialize, Deserialize)]
struct Slice {
    tensor: String,
    rows: (u64, u64),
    cols: (u64, u64),
}

/// Why bytes are not a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// Too short, or not ours, or of another format version.
    #[error(
        "not a request of this format version: the first bytes differ; both sides must run the same release"
    )]
    Magic,
    /// Larger than any request can be.
    #[error(
        "{bytes} bytes are more than a request may have ({MAX_REQUEST_BYTES}); go on without packing"
    )]
    TooLarge {
        /// Bytes given.
        bytes: usize,
    },
    /// The bytes were changed or cut off on their way.
    #[error("the request's checksum does not match: it is truncated or damaged; ask again")]
    Damaged,
    /// The bytes arrived as they were sent but do not decode.
    #[error("the request does not decode: {reason}; both sides must run the same release")]
    Malformed {
        /// What the decoder says.
        reason: String,
    },
    /// A box without elements.
    #[error(
        "target rank {target} asks for a box of `{tensor}` that has no elements; leave empty ones out"
    )]
    Empty {
        /// The target rank.
        target: u32,
        /// The tensor.
        tensor: String,
    },
    /// Source ranks that are not in ascending order.
    #[error(
        "target rank {target} asks source ranks that are not in ascending order; both sides must run the same release"
    )]
    Ranks {
        /// The target rank.
        target: u32,
    },
}

impl PackRequest {
    /// What the target rank with this layout would like to be packed, given the program that it would run otherwise and
    /// the publications that it was made from. `link` says what the way to a source rank can do.
    ///
    /// # Errors
    /// [`RefitError::Pack`] when program and layouts do not belong together.
    pub fn new(
        target: &RankLayout,
        program: &Program,
        publications: &[Publication],
        link: impl Fn(u32) -> Capabilities,
    ) -> Result<Self, RefitError> {
        let sources = publications.iter().map(Publication::layout);
        let wish = wish(program, target, sources, link)?;
        Ok(Self::of(target.rank(), wish))
    }

    /// The request of a target that wants nothing packed, whatever it costs.
    #[must_use]
    pub fn nothing(target: u32) -> Self {
        Self::of(target, Wish::default())
    }

    fn of(target: u32, wish: Wish) -> Self {
        let digest = *blake3::hash(&body(target, &wish)).as_bytes();
        Self { target, wish, digest }
    }

    /// The target rank that asks.
    #[must_use]
    pub fn target(&self) -> u32 {
        self.target
    }

    /// The boxes asked for, in the order in which the target keeps them.
    #[must_use]
    pub fn slices(&self) -> &[TensorSlice] {
        &self.wish.slices
    }

    /// The source ranks asked, in ascending order.
    #[must_use]
    pub fn ranks(&self) -> &[u32] {
        &self.wish.ranks
    }

    /// Whether this source rank is asked.
    #[must_use]
    pub fn asks(&self, rank: u32) -> bool {
        self.wish.ranks.binary_search(&rank).is_ok()
    }

    /// Whether nothing is asked for: the target reads well as it is. It is still worth sending, for sources that wait.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.wish.ranks.is_empty()
    }

    /// Whether a source has nothing left to do for this: it was not asked, or offers in one piece each what it was asked
    /// for.
    ///
    /// # Errors
    /// [`RefitError::Pack`] when its layout has more boxes than any.
    pub fn is_answered_by(&self, publication: &Publication) -> Result<bool, RefitError> {
        Ok(!self.asks(publication.rank())
            || !is_scattered(publication.layout(), &self.wish.slices)?)
    }

    /// Digest of everything.
    #[must_use]
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// The bytes that travel: magic, checksum, body.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        [MAGIC.as_slice(), &self.digest, &body(self.target, &self.wish)].concat()
    }

    /// Reads what [`encode`](Self::encode) wrote and checks all of it. Takes at most 40 bytes of memory for every byte
    /// given, and 4 KiB.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, RequestError> {
        if bytes.len() > MAX_REQUEST_BYTES {
            return Err(RequestError::TooLarge { bytes: bytes.len() });
        }
        let rest = bytes.strip_prefix(MAGIC).ok_or(RequestError::Magic)?;
        let (digest, encoded) = rest.split_first_chunk::<32>().ok_or(RequestError::Damaged)?;
        if blake3::hash(encoded).as_bytes() != digest {
            return Err(RequestError::Damaged);
        }
        let malformed = |reason: String| RequestError::Malformed { reason };
        let Body { target, ranks, slices } =
            postcard::from_bytes(encoded).map_err(|error| malformed(error.to_string()))?;
        if !ranks.is_sorted_by(|a, b| a < b) {
            return Err(RequestError::Ranks { target });
        }
        let mut checked = Vec::with_capacity(slices.len());
        for Slice { tensor, rows, cols } in slices {
            if rows.0 >= rows.1 || cols.0 >= cols.1 {
                return Err(RequestError::Empty { target, tensor });
            }
            let tensor = tensor.into();
            checked.push(TensorSlice { tensor, rows: rows.0..rows.1, cols: cols.0..cols.1 });
        }
        let mut wish = Wish::default();
        (wish.ranks, wish.slices) = (ranks, checked);
        let request = Self::of(target, wish);
        if request.digest != *digest {
            return Err(malformed("it is not written in the one way there is".to_owned()));
        }
        Ok(request)
    }
}

/// Postcard into a vector cannot fail: it has no limit to hit and our types no way to refuse.
fn body(target: u32, wish: &Wish) -> Vec<u8> {
    let slice = |TensorSlice { tensor, rows, cols }: &TensorSlice| Slice {
        tensor: tensor.to_string(),
        rows: (rows.start, rows.end),
        cols: (cols.start, cols.end),
    };
    let slices = wish.slices.iter().map(slice).collect();
    let body = Body { target, ranks: wish.ranks.clone(), slices };
    postcard::to_allocvec(&body).unwrap_or_default()
}

impl fmt::Debug for PackRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PackRequest")
            .field("target", &self.target)
            .field("ranks", &self.wish.ranks)
            .field("slices", &self.wish.slices.len())
            .finish_non_exhaustive()
    }
}

impl PartialEq for PackRequest {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl Eq for PackRequest {}

impl std::hash::Hash for PackRequest {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.digest.hash(state);
    }
}
