//! What a target asks sources to hash: the segments of its plan.

use std::fmt;
use std::sync::Arc;

use refit_planner::{Dim, Dims, Dtype, ElementMap, Plan, Transform};
use serde::{Deserialize, Serialize};

/// First bytes of an encoded request: name and format version. A change of the format must change it.
const MAGIC: &[u8; 8] = b"refit\0d1";

/// No honest request is larger: a million segments of parameters with long names.
pub const MAX_DIGEST_REQUEST_BYTES: usize = 128 << 20;

/// Repetitions of a run within repetitions, at most: tensors have two dimensions, and experts are a third.
const MOST_DIMS: usize = 8;

/// What one target rank asks source ranks to hash: every strided piece that it reads of their parameters, as it is to be
/// held when it has landed. Made by [`Prepared::digest_request`], answered by [`Source::digests`].
///
/// It names the parameters of publications, so it is good for as long as these are: packing asks anew.
///
/// [`Prepared::digest_request`]: crate::Prepared::digest_request
/// [`Source::digests`]: crate::Source::digests
#[derive(Clone)]
pub struct DigestRequest {
    target: u32,
    /// Ascending by rank.
    ranks: Vec<(u32, Vec<Asked>)>,
    digest: [u8; 32],
}

/// What is asked of one parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) param: Arc<str>,
    pub(crate) pieces: Vec<Piece>,
}

/// A run of a parameter's bytes, repeated, and what becomes of its elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) offset: u64,
    pub(crate) run: u64,
    pub(crate) dims: Dims,
    pub(crate) transform: Transform,
}

#[derive(Serialize, Deserialize)]
struct Body {
    target: u32,
    ranks: Vec<(u32, Vec<WireParam>)>,
}

#[derive(Serialize, Deserialize)]
struct WireParam {
    name: String,
    pieces: Vec<WirePiece>,
}

#[derive(Serialize, Deserialize)]
struct WirePiece {
    offset: u64,
    run: u64,
    dims: Vec<Dim>,
    /// Nothing for a copy.
    change: Option<(ElementMap, Dtype, Dtype)>,
}

/// Why bytes are not a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DigestRequestError {
    /// Too short, or not ours, or of another format version.
    #[error(
        "not a request for digests of this format version: the first bytes differ; both sides must run the same release"
    )]
    Magic,
    /// Larger than any request can be.
    #[error(
        "{bytes} bytes are more than a request for digests may have ({MAX_DIGEST_REQUEST_BYTES}); go on without digests"
    )]
    TooLarge {
        /// Bytes given.
        bytes: usize,
    },
    /// The bytes were changed or cut off on their way.
    #[error("the request's checksum does not match: it is truncated or damaged; ask again")]
    Damaged,
    /// The bytes arrived as they were sent but do not decode.
    #[error(
        "the request for digests does not decode: {reason}; both sides must run the same release"
    )]
    Malformed {
        /// What the decoder says.
        reason: String,
    },
    /// Ranks or parameters that are not in ascending order.
    #[error(
        "target rank {target} asks for digests of ranks or parameters that are not in ascending order; both sides must \
         run the same release"
    )]
    Order {
        /// The target rank.
        target: u32,
    },
    /// A piece that no plan has.
    #[error(
        "target rank {target} asks rank {rank} for digests of a piece of `{param}` that is none: it has no bytes, too \
         many repetitions, or elements that nothing converts; ask again with the plan of its present publication"
    )]
    Piece {
        /// The target rank.
        target: u32,
        /// The rank asked.
        rank: u32,
        /// The parameter.
        param: String,
    },
}

impl DigestRequest {
    /// The request of the target rank that this plan is for.
    #[must_use]
    pub fn new(plan: &Plan) -> Self {
        let mut ranks: Vec<(u32, Vec<Asked>)> = Vec::new();
        let (sources, segments) = (plan.sources(), plan.segments());
        for (source, index) in order(plan) {
            let (source, segment) = (&sources[source as usize], &segments[index]);
            if ranks.last().is_none_or(|(rank, _)| *rank != source.rank) {
                ranks.push((source.rank, Vec::new()));
            }
            let Some((_, asked)) = ranks.last_mut() else { continue };
            if asked.last().is_none_or(|asked| asked.param != source.name) {
                asked.push(Asked { param: source.name.clone(), pieces: Vec::new() });
            }
            let Some(asked) = asked.last_mut() else { continue };
            asked.pieces.push(Piece {
                offset: segment.source_offset,
                run: segment.run,
                dims: segment.dims.clone(),
                transform: segment.transform,
            });
        }
        Self::of(plan.target_rank(), ranks)
    }

    fn of(target: u32, ranks: Vec<(u32, Vec<Asked>)>) -> Self {
        let digest = *blake3::hash(&body(target, &ranks)).as_bytes();
        Self { target, ranks, digest }
    }

    /// The target rank that asks.
    #[must_use]
    pub fn target(&self) -> u32 {
        self.target
    }

    /// The source ranks asked, in ascending order, and how many digests are asked of each.
    pub fn ranks(&self) -> impl Iterator<Item = (u32, usize)> {
        let pieces = |asked: &[Asked]| asked.iter().map(|asked| asked.pieces.len()).sum();
        self.ranks.iter().map(move |(rank, asked)| (*rank, pieces(asked)))
    }

    /// What is asked of this rank.
    pub(crate) fn asked(&self, rank: u32) -> &[Asked] {
        let found = self.ranks.binary_search_by_key(&rank, |(rank, _)| *rank);
        found.map_or(&[], |index| &self.ranks[index].1)
    }

    /// Digest of everything.
    #[must_use]
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// The bytes that travel: magic, checksum, body.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        [MAGIC.as_slice(), &self.digest, &body(self.target, &self.ranks)].concat()
    }

    /// Reads what [`encode`](Self::encode) wrote and checks all of it that can be checked without the source's layout.
    /// Takes at most 96 bytes of memory for every byte given, and 4 KiB.
    ///
    /// # Errors
    /// [`DigestRequestError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DigestRequestError> {
        if bytes.len() > MAX_DIGEST_REQUEST_BYTES {
            return Err(DigestRequestError::TooLarge { bytes: bytes.len() });
        }
        let rest = bytes.strip_prefix(MAGIC).ok_or(DigestRequestError::Magic)?;
        let (digest, encoded) =
            rest.split_first_chunk::<32>().ok_or(DigestRequestError::Damaged)?;
        if blake3::hash(encoded).as_bytes() != digest {
            return Err(DigestRequestError::Damaged);
        }
        let malformed = |reason: String| DigestRequestError::Malformed { reason };
        let Body { target, ranks } =
            postcard::from_bytes(encoded).map_err(|error| malformed(error.to_string()))?;
        let ascending = |params: &[WireParam]| params.is_sorted_by(|a, b| a.name < b.name);
        if !ranks.is_sorted_by(|a, b| a.0 < b.0)
            || !ranks.iter().all(|(_, params)| ascending(params))
        {
            return Err(DigestRequestError::Order { target });
        }
        let mut checked = Vec::with_capacity(ranks.len());
        for (rank, params) in ranks {
            let mut asked = Vec::with_capacity(params.len());
            for WireParam { name, pieces } in params {
                let piece = || DigestRequestError::Piece { target, rank, param: name.clone() };
                let whole: Option<Vec<Piece>> = pieces.into_iter().map(check).collect();
                let pieces = whole.ok_or_else(piece)?;
                asked.push(Asked { param: name.into(), pieces });
            }
            checked.push((rank, asked));
        }
        let request = Self::of(target, checked);
        if request.digest != *digest {
            return Err(malformed("it is not written in the one way there is".to_owned()));
        }
        Ok(request)
    }
}

/// The segments of a plan by source parameter, which is the order of the answers: its number and the segment's.
pub(super) fn order(plan: &Plan) -> Vec<(u32, usize)> {
    let segments = plan.segments().iter().enumerate();
    let mut order: Vec<_> = segments.map(|(index, segment)| (segment.source, index)).collect();
    order.sort_unstable();
    order
}

/// A piece that can be hashed, whatever parameter it lies in.
fn check(WirePiece { offset, run, dims, change }: WirePiece) -> Option<Piece> {
    let transform = match change {
        None => Transform::Copy,
        Some((map, from, to)) => {
            let transform = Transform::mapping(map, from, to)?;
            // A copy is written in one way.
            (transform != Transform::Copy).then_some(transform)?
        }
    };
    let repeats = dims.len() <= MOST_DIMS && dims.iter().all(|dim| dim.count > 0);
    let dims: Dims = dims.into_iter().collect();
    run.checked_mul(dims.runs()).filter(|bytes| *bytes < u64::MAX)?;
    (run > 0 && repeats && transform.takes(run)).then_some(Piece { offset, run, dims, transform })
}

/// Postcard into a vector cannot fail: it has no limit to hit and our types no way to refuse.
fn body(target: u32, ranks: &[(u32, Vec<Asked>)]) -> Vec<u8> {
    let piece = |Piece { offset, run, dims, transform }: &Piece| {
        let change = match *transform {
            Transform::Cast { from, to } => Some((ElementMap::Identity, from, to)),
            Transform::Map { map, from, to } => Some((map, from, to)),
            _ => None,
        };
        WirePiece { offset: *offset, run: *run, dims: dims.as_slice().to_vec(), change }
    };
    let param = |Asked { param, pieces }: &Asked| WireParam {
        name: param.to_string(),
        pieces: pieces.iter().map(piece).collect(),
    };
    let of_rank = |(rank, asked): &(u32, Vec<Asked>)| (*rank, asked.iter().map(param).collect());
    let body = Body { target, ranks: ranks.iter().map(of_rank).collect() };
    postcard::to_allocvec(&body).unwrap_or_default()
}

impl fmt::Debug for DigestRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DigestRequest")
            .field("target", &self.target)
            .field("ranks", &self.ranks.len())
            .finish_non_exhaustive()
    }
}

impl PartialEq for DigestRequest {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl Eq for DigestRequest {}
