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
use crate::source::Held;
use crate::{Dims, Dtype, Hash, PlanError, RankLayout, SourceLayout, Tensor, Transform};

use replicas::Chosen;

use budget::Budget;
use search::Search;

pub use tiling::{prove_disjoint, prove_tiling};

/// Bump when the encoding or anything that decides segments changes; golden hashes change with it.
const HASH_CONTEXT: &str = "refit-planner plan v2";

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
    /// The copy whose rank this plan has asked least so far, among ranks that it must or may read anyway; different
    /// targets begin at different ones. Within one plan the load of full replicas stays within one parameter of even.
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

    /// Computes [`Plan::hash`] once more: to measure what it costs.
    #[cfg(feature = "__bench")]
    #[doc(hidden)]
    #[must_use]
    pub fn rehash(&self) -> Hash {
        hash(&self.sources, &self.targets, &self.segments, &self.fills)
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
/// different models, [`PlanError::MapsMeet`] and [`PlanError::MapDtype`] for element maps that are not defined,
/// [`PlanError::TooComplex`] beyond [`PlanOptions::max_pieces`], [`PlanError::TooMany`] beyond 2^32 entries.
pub fn plan(
    source: &SourceLayout,
    target: &RankLayout,
    options: &PlanOptions,
) -> Result<Plan, PlanError> {
    let held = source.find(target.tensors());
    same_shapes(target.tensors(), &held)?;
    let mut cuts = Vec::with_capacity(target.params().len());
    let mut search = Search::new(Budget::new(options.max_pieces));
    let mut cuts_of_param = Vec::with_capacity(target.params().len());
    for param in target.params() {
        tiling::prove(param, &mut search.budget)?;
        let first = cuts.len();
        for band in &param.bands {
            let number = band.tensor.0 as usize;
            let (held, tensor) = (held[number], &target.tensors()[number]);
            pieces::cut(source, held, tensor, param, band, &mut search, &mut cuts)?;
        }
        cuts_of_param.push(first..cuts.len());
    }
    let chosen = replicas::choose(&cuts, &cuts_of_param, source, options.replicas, target.rank());
    let (sources, numbers) = used_sources(source, &chosen)?;

    let mut segments = Vec::with_capacity(cuts.len());
    let mut fills = Vec::new();
    let mut coverage = Coverage::default();
    for (index, (param, cuts_of_this)) in target.params().iter().zip(cuts_of_param).enumerate() {
        let index = u32::try_from(index).map_err(|_| PlanError::TooMany)?;
        let first = segments.len();
        for cut in cuts_of_this {
            let Chosen { owner, rank } = chosen[cut];
            segments.push(cuts[cut].segment(source, owner, rank, numbers[cut], index)?);
        }
        coalesce::coalesce(&mut segments, first);
        fills.extend(param.fills.iter().map(|fill| pieces::fill(param, fill, index)));

        // A layout's bytes fit in 63 bits; casts may need twice as many.
        let copied: u64 = segments[first..].iter().map(Segment::target_bytes).sum();
        coverage.copied_bytes += copied;
        coverage.target_bytes += param.bytes();
        coverage.filled_bytes += param.bytes() - copied;
        let needed = segments[first..].iter().map(Segment::source_bytes);
        coverage.needed_bytes = needed.fold(coverage.needed_bytes, u64::saturating_add);
    }
    u32::try_from(segments.len()).map_err(|_| PlanError::TooMany)?;

    let targets: Arc<[TargetParam]> = target.params().iter().map(target_param).collect();
    let hash = hash(&sources, &targets, &segments, &fills);
    Ok(Plan { target_rank: target.rank(), sources, targets, segments, fills, coverage, hash })
}

/// Both sides describe the same tensors, as far as both hold them.
fn same_shapes(wanted: &[Tensor], held: &[Option<&Held>]) -> Result<(), PlanError> {
    for (wanted, held) in
        wanted.iter().zip(held).filter_map(|(wanted, held)| Some((wanted, (*held)?)))
    {
        if (wanted.rows, wanted.cols) != (held.rows, held.cols) {
            return Err(PlanError::TensorShape {
                tensor: wanted.name.clone(),
                target_rows: wanted.rows,
                target_cols: wanted.cols,
                source_rows: held.rows,
                source_cols: held.cols,
            });
        }
    }
    Ok(())
}

fn target_param(param: &Param) -> TargetParam {
    TargetParam { name: param.name.clone(), dtype: param.dtype, bytes: param.bytes() }
}

/// The source parameters that are read, sorted by rank and name, and which of them is read by each of `chosen`.
fn used_sources(
    source: &SourceLayout,
    chosen: &[Chosen<'_>],
) -> Result<(Arc<[SourceParam]>, Vec<u32>), PlanError> {
    // The parameters of a class are sorted by name.
    let key = |chosen: &Chosen<'_>| (chosen.rank, chosen.owner.param);
    let mut order: Vec<_> =
        chosen.iter().enumerate().map(|(index, chosen)| (key(chosen), index)).collect();
    order.sort_unstable();
    let mut sources = Vec::new();
    let mut numbers = alloc::vec![0; chosen.len()];
    for same in order.chunk_by(|(a, _), (b, _)| a == b) {
        let number = u32::try_from(sources.len()).map_err(|_| PlanError::TooMany)?;
        same.iter().for_each(|&(_, index)| numbers[index] = number);
        let Chosen { owner, rank } = chosen[same[0].1];
        let param = source.param_of(owner);
        sources.push(SourceParam {
            rank,
            name: param.name.clone(),
            dtype: owner.dtype,
            bytes: param.bytes,
        });
    }
    Ok((sources.into(), numbers))
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
