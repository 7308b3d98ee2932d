//! Source bands x target bands -> strided segments, fills, coverage and hash.

mod budget;
mod coalesce;
mod pieces;
mod replicas;
mod search;
mod tiling;

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::encode::Encoder;
use crate::layout::Param;
use crate::source::Replica;
use crate::{Dims, Dtype, Hash, PlanError, RankLayout, SourceLayout};

use budget::Budget;
use search::Search;

pub use tiling::{prove_disjoint, prove_tiling};

/// Bump when the encoding or anything that decides segments changes; golden hashes change with it.
const HASH_CONTEXT: &str = "refit-planner plan v1";

/// Choices that the layouts leave open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlanOptions {
    /// Which of several copies of a shard is read.
    pub replicas: Replicas,
    /// Parts into which target bands may be cut along source shards. It bounds what planning takes, whatever the
    /// layouts: some 300 bytes a piece, and looks at 64 boxes a piece.
    pub max_pieces: u64,
}

impl Default for PlanOptions {
    /// Copies share the load, and 2^22 pieces: a rank that holds every expert of a model of a trillion parameters takes
    /// about a million.
    fn default() -> Self {
        Self { replicas: Replicas::default(), max_pieces: 1 << 22 }
    }
}

impl PlanOptions {
    /// These options with another rule for replicas.
    #[must_use]
    pub fn with_replicas(mut self, replicas: Replicas) -> Self {
        self.replicas = replicas;
        self
    }

    /// These options with another limit on pieces.
    #[must_use]
    pub fn with_max_pieces(mut self, pieces: u64) -> Self {
        self.max_pieces = pieces;
        self
    }
}

/// The rule that chooses among ranks holding the same shard. All rules are deterministic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Replicas {
    /// The copy whose rank this plan has asked least so far, among ranks that it must or may read anyway; ties rotate
    /// with the target's rank. Within one plan the load of full replicas stays within one shard of even; different
    /// targets start at different copies.
    #[default]
    Spread,
    /// The copy on the lowest rank.
    Lowest,
}

/// A parameter that a plan reads from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceParam {
    /// The rank that holds it.
    pub rank: u32,
    /// Its name on that rank.
    pub name: Arc<str>,
    /// Its element type.
    pub dtype: Dtype,
    /// Its size in bytes.
    pub bytes: u64,
}

/// A parameter that a plan writes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetParam {
    /// Its name.
    pub name: Arc<str>,
    /// Its element type.
    pub dtype: Dtype,
    /// Its size in bytes.
    pub bytes: u64,
}

/// What happens to elements on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Transform {
    /// The bytes are copied.
    Copy,
    /// Every element is converted: rounded to nearest even when narrowing, exact when widening, NaN kept NaN.
    Cast {
        /// Element type in the source.
        from: Dtype,
        /// Element type in the target.
        to: Dtype,
    },
}

impl Transform {
    /// The transform that joins two element types, if one does.
    #[must_use]
    pub fn between(from: Dtype, to: Dtype) -> Option<Self> {
        match (from, to) {
            (from, to) if from == to => Some(Self::Copy),
            (Dtype::F32, Dtype::Bf16 | Dtype::F16) | (Dtype::Bf16 | Dtype::F16, Dtype::F32) => {
                Some(Self::Cast { from, to })
            }
            _ => None,
        }
    }

    /// Bytes written for `source_bytes` bytes read.
    #[must_use]
    pub fn target_bytes(self, source_bytes: u64) -> u64 {
        match self {
            Self::Copy => source_bytes,
            Self::Cast { from, to } => source_bytes / from.size() * to.size(),
        }
    }

    fn encode(self, encoder: &mut Encoder) {
        match self {
            Self::Copy => encoder.u64(0),
            Self::Cast { from, to } => {
                encoder.u64(1);
                encoder.bytes(from.name().as_bytes());
                encoder.bytes(to.name().as_bytes());
            }
        }
    }
}

/// A strided piece of one source parameter and where it goes in one target parameter. All offsets are bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Index into [`Plan::sources`].
    pub source: u32,
    /// Index into [`Plan::targets`].
    pub target: u32,
    /// Where the first run starts in the source parameter.
    pub source_offset: u64,
    /// Where the first run lands in the target parameter.
    pub target_offset: u64,
    /// Bytes of one contiguous run, as read.
    pub run: u64,
    /// How the run repeats.
    pub dims: Dims,
    /// What happens on the way.
    pub transform: Transform,
}

impl Segment {
    /// Bytes read.
    #[must_use]
    pub fn source_bytes(&self) -> u64 {
        self.run.saturating_mul(self.dims.runs())
    }

    /// Bytes of one run as written.
    #[must_use]
    pub fn target_run(&self) -> u64 {
        self.transform.target_bytes(self.run)
    }

    /// Bytes written.
    #[must_use]
    pub fn target_bytes(&self) -> u64 {
        self.target_run().saturating_mul(self.dims.runs())
    }
}

/// A strided piece of a target parameter that is set to zero. The source strides of its dims are 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Index into [`Plan::targets`].
    pub target: u32,
    /// Where the first run starts in the target parameter.
    pub offset: u64,
    /// Bytes of one contiguous run.
    pub run: u64,
    /// How the run repeats.
    pub dims: Dims,
}

impl Fill {
    /// Bytes written.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.run.saturating_mul(self.dims.runs())
    }
}

/// The proof that a plan writes every target byte exactly once: the parts add up and cannot overlap.
///
/// It exists only inside a [`Plan`], and a plan exists only when the bands and fills of every target parameter were
/// found disjoint and complete and every band was cut, without remainder, into segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Bytes of all target parameters.
    pub target_bytes: u64,
    /// Target bytes that come from a source.
    pub copied_bytes: u64,
    /// Target bytes that are set to zero.
    pub filled_bytes: u64,
    /// Source bytes needed: what must cross the wire at least. Differs from `copied_bytes` by casts.
    pub needed_bytes: u64,
}

/// How one target rank gets its parameters from many source ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    target_rank: u32,
    sources: Arc<[SourceParam]>,
    targets: Arc<[TargetParam]>,
    segments: Vec<Segment>,
    fills: Vec<Fill>,
    coverage: Coverage,
    hash: Hash,
}

impl Plan {
    /// The target rank this plan is for.
    #[must_use]
    pub fn target_rank(&self) -> u32 {
        self.target_rank
    }

    /// The source parameters read, sorted by rank and name.
    #[must_use]
    pub fn sources(&self) -> &Arc<[SourceParam]> {
        &self.sources
    }

    /// The target parameters, sorted by name.
    #[must_use]
    pub fn targets(&self) -> &Arc<[TargetParam]> {
        &self.targets
    }

    /// The segments, sorted by target parameter and offset.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The fills, sorted by target parameter and offset.
    #[must_use]
    pub fn fills(&self) -> &[Fill] {
        &self.fills
    }

    /// The coverage proof.
    #[must_use]
    pub fn coverage(&self) -> Coverage {
        self.coverage
    }

    /// Digest of everything above: equal for equal work, whatever the order of the inputs.
    #[must_use]
    pub fn hash(&self) -> Hash {
        self.hash
    }

    /// Bytes read from each source rank.
    #[must_use]
    pub fn bytes_by_source(&self) -> BTreeMap<u32, u64> {
        let mut bytes = BTreeMap::new();
        for segment in &self.segments {
            *bytes.entry(self.sources[segment.source as usize].rank).or_default() +=
                segment.source_bytes();
        }
        bytes
    }
}

/// Joins the bands of all source ranks with those of one target rank.
///
/// Any pair of legal layouts works; no size needs to divide another. Deterministic: the order in which ranks,
/// parameters and bands were given does not matter.
///
/// # Errors
/// [`PlanError::Uncovered`] when some target bytes have no source, [`PlanError::Overlap`] and [`PlanError::Gap`] when
/// the target's own bands do not tile it, [`PlanError::TensorShape`] and [`PlanError::Dtype`] when the sides hold
/// different models, [`PlanError::TooComplex`] beyond [`PlanOptions::max_pieces`], [`PlanError::TooMany`] beyond 2^32
/// entries.
pub fn plan(
    source: &SourceLayout,
    target: &RankLayout,
    options: &PlanOptions,
) -> Result<Plan, PlanError> {
    let mut search = Search::new(Budget::new(options.max_pieces));
    let mut cuts = Vec::new();
    let mut cuts_of_param = Vec::with_capacity(target.params().len());
    for param in target.params() {
        tiling::prove(param, &mut search.budget)?;
        let first = cuts.len();
        for band in &param.bands {
            pieces::cut(source, target, param, band, &mut search, &mut cuts)?;
        }
        cuts_of_param.push(first..cuts.len());
    }
    let chosen = replicas::choose(&cuts, source, options.replicas, target.rank());

    let mut used = UsedSources::default();
    let mut segments = Vec::new();
    let mut fills = Vec::new();
    let mut coverage = Coverage::default();
    for (index, (param, cuts_of_this)) in target.params().iter().zip(cuts_of_param).enumerate() {
        let index = u32::try_from(index).map_err(|_| PlanError::TooMany)?;
        let first = segments.len();
        for (cut, &replica) in cuts[cuts_of_this.clone()].iter().zip(&chosen[cuts_of_this]) {
            segments.push(cut.segment(source, replica, used.number(replica)?, index)?);
        }
        coalesce::coalesce(&mut segments, first);
        fills.extend(param.fills.iter().map(|fill| pieces::fill(param, fill, index)));

        let copied: u64 = segments[first..].iter().map(Segment::target_bytes).sum();
        coverage.copied_bytes += copied;
        coverage.target_bytes += param.bytes();
        coverage.filled_bytes += param.bytes() - copied;
        coverage.needed_bytes += segments[first..].iter().map(Segment::source_bytes).sum::<u64>();
    }
    u32::try_from(segments.len()).map_err(|_| PlanError::TooMany)?;

    let sources = used.finish(source, &mut segments);
    let targets: Arc<[TargetParam]> = target.params().iter().map(target_param).collect();
    let hash = hash(&sources, &targets, &segments, &fills);
    Ok(Plan { target_rank: target.rank(), sources, targets, segments, fills, coverage, hash })
}

fn target_param(param: &Param) -> TargetParam {
    TargetParam { name: param.name.clone(), dtype: param.dtype, bytes: param.bytes() }
}

/// Numbers the source parameters as they are first used; renumbers them canonically at the end.
#[derive(Default)]
struct UsedSources {
    numbers: BTreeMap<(u32, u32), u32>,
}

impl UsedSources {
    fn number(&mut self, replica: Replica) -> Result<u32, PlanError> {
        let next = u32::try_from(self.numbers.len()).map_err(|_| PlanError::TooMany)?;
        Ok(*self.numbers.entry((replica.rank, replica.param)).or_insert(next))
    }

    fn finish(self, source: &SourceLayout, segments: &mut [Segment]) -> Arc<[SourceParam]> {
        let mut canonical: Vec<u32> = self.numbers.values().map(|_| 0).collect();
        for (place, &number) in self.numbers.values().enumerate() {
            // Fits: there are at most as many places as numbers handed out.
            canonical[number as usize] = u32::try_from(place).unwrap_or(u32::MAX);
        }
        for segment in segments {
            segment.source = canonical[segment.source as usize];
        }
        let params = self.numbers.keys().map(|&(rank, param)| {
            let layout = &source.ranks()[rank as usize];
            let param = &layout.params()[param as usize];
            SourceParam {
                rank: layout.rank(),
                name: param.name.clone(),
                dtype: param.dtype,
                bytes: param.bytes(),
            }
        });
        params.collect()
    }
}

fn hash(
    sources: &[SourceParam],
    targets: &[TargetParam],
    segments: &[Segment],
    fills: &[Fill],
) -> Hash {
    let mut encoder = Encoder::new(HASH_CONTEXT);
    encoder.len(sources.len());
    for source in sources {
        encoder.u64(u64::from(source.rank));
        encoder.bytes(source.name.as_bytes());
        encoder.bytes(source.dtype.name().as_bytes());
        encoder.u64(source.bytes);
    }
    encoder.len(targets.len());
    for target in targets {
        encoder.bytes(target.name.as_bytes());
        encoder.bytes(target.dtype.name().as_bytes());
        encoder.u64(target.bytes);
    }
    encoder.len(segments.len());
    for segment in segments {
        encoder.u64(u64::from(segment.source));
        encoder.u64(u64::from(segment.target));
        encoder.u64(segment.source_offset);
        encoder.u64(segment.target_offset);
        encoder.u64(segment.run);
        encoder.dims(&segment.dims);
        segment.transform.encode(&mut encoder);
    }
    encoder.len(fills.len());
    for fill in fills {
        encoder.u64(u64::from(fill.target));
        encoder.u64(fill.offset);
        encoder.u64(fill.run);
        encoder.dims(&fill.dims);
    }
    encoder.finish()
}
