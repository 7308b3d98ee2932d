//! What one source rank tells its targets: who it is, what it holds, and where.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::fmt;

use refit_planner::{Param, Position, RankLayout};
use refit_pool::MemoryKind;
use serde::{Deserialize, Serialize};

use crate::header::HEADER_BYTES;

/// First bytes of an encoded publication: name and format version. A change of the format must change it.
const MAGIC: &[u8; 8] = b"refit\0p3";

/// No honest publication is larger: a million shards at 44 bytes each, and their names.
pub const MAX_ENCODED_BYTES: usize = 256 << 20;

/// Where a source rank keeps one parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Place {
    /// First address, in the source's address space.
    pub address: u64,
    /// CUDA ordinal in the source's process, or host memory.
    pub cuda: Option<u32>,
}

impl Place {
    /// The place at this address of this memory.
    #[must_use]
    pub fn new(address: u64, kind: MemoryKind) -> Self {
        let cuda = match kind {
            MemoryKind::Cuda(ordinal) => Some(ordinal),
            _ => None,
        };
        Self { address, cuda }
    }

    /// The kind of memory, as the source's process names it.
    #[must_use]
    pub fn kind(self) -> MemoryKind {
        self.cuda.map_or(MemoryKind::Host, MemoryKind::Cuda)
    }
}

/// A registered range of a source rank's memory. Every read stays inside one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PublishedRegion {
    /// First address, in the source's address space.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// CUDA ordinal in the source's process, or host memory.
    pub cuda: Option<u32>,
}

/// Where a source rank keeps its version header, and the incarnation that it has to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PublishedHeader {
    /// The source's, drawn anew when it restarts.
    pub incarnation: u128,
    /// Where the [`HEADER_BYTES`] bytes are.
    pub place: Place,
}

/// One source rank's layout, agent and addresses. What changes from one version to the next is not in it, but where that
/// can be read: in the source's [`Header`](crate::Header).
///
/// Constructed by [`Source::publication`](crate::Source::publication) or by [`Publication::decode`], which checks
/// everything a peer could get wrong: every parameter, and the header, lies inside one run of registered regions.
#[derive(Clone)]
pub struct Publication {
    body: Body,
    digest: [u8; 32],
    layout_digest: [u8; 32],
}

#[derive(Clone, Serialize, Deserialize)]
struct Body {
    agent: String,
    metadata: Vec<u8>,
    layout: RankLayout,
    header: PublishedHeader,
    /// In the order of the layout's parameters.
    places: Vec<Place>,
    regions: Vec<PublishedRegion>,
}

/// Why bytes are not a publication.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PublicationError {
    /// Too short, or not ours, or of another format version.
    #[error(
        "not a publication of this format version: the first bytes differ; both sides must run the same release"
    )]
    Magic,
    /// Larger than any publication can be.
    #[error(
        "{bytes} bytes are more than a publication may have ({MAX_ENCODED_BYTES}); register fewer, larger regions"
    )]
    TooLarge {
        /// Bytes given.
        bytes: usize,
    },
    /// The bytes were changed or cut off on their way.
    #[error("the publication's checksum does not match: it is truncated or damaged; publish again")]
    Damaged,
    /// The bytes arrived as they were sent but do not decode.
    #[error("the publication does not decode: {reason}; both sides must run the same release")]
    Malformed {
        /// What the decoder says.
        reason: String,
    },
    /// The number of addresses differs from the number of parameters.
    #[error("rank {rank} publishes {places} addresses for {params} parameters; give one for each")]
    Places {
        /// The rank.
        rank: u32,
        /// Addresses given.
        places: usize,
        /// Parameters of the layout.
        params: usize,
    },
    /// A parameter lies outside the registered regions.
    #[error(
        "rank {rank} publishes `{param}` at a place that it has not registered; register whole allocations before publishing"
    )]
    Unregistered {
        /// The rank.
        rank: u32,
        /// The parameter.
        param: String,
    },
    /// The header lies outside the registered regions, or where a parameter is.
    #[error(
        "rank {rank} publishes a version header at a place that it has not registered, or that is a parameter's; give it \
         registered memory of its own"
    )]
    Header {
        /// The rank.
        rank: u32,
    },
    /// Regions overlap, or run past the end of the address space.
    #[error(
        "rank {rank} publishes regions that overlap or wrap around; register whole allocations, once"
    )]
    Regions {
        /// The rank.
        rank: u32,
    },
}

impl Publication {
    /// A publication of these parts; `places` in the order of the layout's parameters.
    ///
    /// # Errors
    /// [`PublicationError`] when the parts contradict each other.
    pub fn new(
        agent: String,
        metadata: Vec<u8>,
        layout: RankLayout,
        header: PublishedHeader,
        places: Vec<Place>,
        mut regions: Vec<PublishedRegion>,
    ) -> Result<Self, PublicationError> {
        regions.sort_unstable_by_key(|region| (region.cuda, region.address));
        Self::check(Body { agent, metadata, layout, header, places, regions })
    }

    /// The rank that published this.
    #[must_use]
    pub fn rank(&self) -> u32 {
        self.body.layout.rank()
    }

    /// The agent to read from.
    #[must_use]
    pub fn agent(&self) -> &str {
        &self.body.agent
    }

    /// What the transport needs to reach that agent.
    #[must_use]
    pub fn metadata(&self) -> &[u8] {
        &self.body.metadata
    }

    /// What the rank holds.
    #[must_use]
    pub fn layout(&self) -> &RankLayout {
        &self.body.layout
    }

    /// Where the rank's version header is, and its incarnation.
    #[must_use]
    pub fn header(&self) -> PublishedHeader {
        self.body.header
    }

    /// Where the parameter of this name is.
    #[must_use]
    pub fn place(&self, param: &str) -> Option<Place> {
        let params = self.body.layout.params();
        let index =
            params.binary_search_by(|candidate| candidate.name().as_ref().cmp(param)).ok()?;
        self.body.places.get(index).copied()
    }

    /// In which registered region the parameter of this name lies, and where in there. It may reach into regions
    /// that follow and touch.
    #[must_use]
    pub fn position(&self, param: &str) -> Option<Position> {
        let Place { address, cuda } = self.place(param)?;
        let regions = &self.body.regions;
        let after =
            regions.partition_point(|region| (region.cuda, region.address) <= (cuda, address));
        let block = after.checked_sub(1)?;
        let region = regions[block];
        let offset = address.checked_sub(region.address).filter(|_| region.cuda == cuda)?;
        (offset < region.len).then_some(Position { block: u32::try_from(block).ok()?, offset })
    }

    /// The registered regions, sorted by memory kind and address.
    #[must_use]
    pub fn regions(&self) -> &[PublishedRegion] {
        &self.body.regions
    }

    /// Digest of everything: another one means that reads must be bound anew. A new version of the parameters leaves it as
    /// it is.
    #[must_use]
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// Digest of the layout alone: another one means that the plan must be made anew.
    #[must_use]
    pub fn layout_digest(&self) -> &[u8; 32] {
        &self.layout_digest
    }

    /// The bytes that travel: magic, checksum, body.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let body = encoded(&self.body);
        [MAGIC.as_slice(), &self.digest, &body].concat()
    }

    /// Reads what [`encode`](Self::encode) wrote and checks all of it. Takes at most 40 bytes of memory for every byte
    /// given, and 4 KiB.
    ///
    /// # Errors
    /// [`PublicationError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, PublicationError> {
        if bytes.len() > MAX_ENCODED_BYTES {
            return Err(PublicationError::TooLarge { bytes: bytes.len() });
        }
        let rest = bytes.strip_prefix(MAGIC).ok_or(PublicationError::Magic)?;
        let (digest, body) = rest.split_first_chunk::<32>().ok_or(PublicationError::Damaged)?;
        if blake3::hash(body).as_bytes() != digest {
            return Err(PublicationError::Damaged);
        }
        let body = postcard::from_bytes(body)
            .map_err(|error| PublicationError::Malformed { reason: error.to_string() })?;
        Self::check(body)
    }

    fn check(body: Body) -> Result<Self, PublicationError> {
        let rank = body.layout.rank();
        let (places, params) = (body.places.len(), body.layout.params().len());
        if places != params {
            return Err(PublicationError::Places { rank, places, params });
        }
        let key = |region: &PublishedRegion| (region.cuda, region.address);
        let wraps = |region: &PublishedRegion| region.address.checked_add(region.len).is_none();
        let end = |region: &PublishedRegion| region.address.saturating_add(region.len);
        let crosses = |pair: &[PublishedRegion]| {
            pair[0].cuda == pair[1].cuda && end(&pair[0]) > pair[1].address
        };
        if body.regions.iter().any(wraps)
            || !body.regions.is_sorted_by_key(key)
            || body.regions.windows(2).any(crosses)
        {
            return Err(PublicationError::Regions { rank });
        }
        for (param, place) in body.layout.params().iter().zip(&body.places) {
            if !covered(&body.regions, *place, param.bytes()) {
                return Err(PublicationError::Unregistered {
                    rank,
                    param: param.name().to_string(),
                });
            }
        }
        let header = body.header.place;
        let within = |(param, place): (&Param, &Place)| {
            place.cuda == header.cuda
                && place.address < header.address.saturating_add(HEADER_BYTES as u64)
                && header.address < place.address.saturating_add(param.bytes())
        };
        if !covered(&body.regions, header, HEADER_BYTES as u64)
            || body.layout.params().iter().zip(&body.places).any(within)
        {
            return Err(PublicationError::Header { rank });
        }
        let digest = *blake3::hash(&encoded(&body)).as_bytes();
        let layout_digest = *blake3::hash(&encoded(&body.layout)).as_bytes();
        Ok(Self { body, digest, layout_digest })
    }
}

/// Whether a range lies inside registered regions, one or several that touch.
fn covered(regions: &[PublishedRegion], place: Place, bytes: u64) -> bool {
    let Some(end) = place.address.checked_add(bytes) else { return false };
    let mut at = place.address;
    let first = regions.partition_point(|region| {
        (region.cuda, region.address.saturating_add(region.len)) <= (place.cuda, place.address)
    });
    for region in &regions[first..] {
        if at >= end || region.cuda != place.cuda || region.address > at {
            break;
        }
        at = at.max(region.address.saturating_add(region.len));
    }
    at >= end
}

/// Postcard into a vector cannot fail: it has no limit to hit and our types no way to refuse.
fn encoded<V: Serialize>(value: &V) -> Vec<u8> {
    postcard::to_allocvec(value).unwrap_or_default()
}

impl fmt::Debug for Publication {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Addresses and the metadata blob stay out of logs.
        f.debug_struct("Publication")
            .field("rank", &self.rank())
            .field("agent", &self.body.agent)
            .field("params", &self.body.places.len())
            .finish_non_exhaustive()
    }
}
