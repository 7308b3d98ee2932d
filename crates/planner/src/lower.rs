//! Choosing, per pair of parameters, the cheapest form a transport can execute.

mod gather;
mod stage;

use alloc::vec;
use alloc::vec::Vec;

use self::stage::{Form, Piece, Room, Stager};
use crate::capabilities::{Capabilities, nanoseconds};
use crate::encode::Encoder;
use crate::program::{Choice, Destination, Landing, Method, Program, Read};
use crate::{Dims, LowerError, Plan, Segment, Transform};

const HASH_CONTEXT: &str = "refit-planner program v3";

/// Staged ranges start at multiples of this, so that any element type is aligned and rows share no cache line.
const STAGING_ALIGN: u64 = 256;

/// No program has more reads, whatever a transport says: each takes some hundred bytes.
const MAX_READS: u64 = 1 << 25;

/// Waves are not worth more pieces than this: with the default size it is 8 TB of staging.
const MAX_WAVE_PIECES: u64 = 1 << 20;

/// Nor more for each read that a program may have: a piece takes at least one.
const WAVE_PIECES_PER_READ: u64 = 64;

/// When live parameters may be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// The engine is paused: reads may land in live parameters as they arrive.
    #[default]
    Direct,
    /// The engine serves on: everything arrives in staging, live parameters are written only by landing.
    Staged,
}

/// Where a source parameter lies among the others of its rank. It tells neighbours, and says nothing of addresses: a source that
/// starts anew and lays out its memory alike has the same positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// Which registered range of the rank it lies in.
    pub block: u32,
    /// Its first byte in there.
    pub offset: u64,
}

/// Which forms the lowering may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Policy {
    /// Whatever costs least.
    #[default]
    Cheapest,
    /// Whatever costs least among the forms that move no byte that is not needed.
    ExactWire,
    /// One read per contiguous run, always: what systems without a lowering do. For comparison.
    ReadPerRun,
}

/// How to lower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LowerOptions {
    /// When live parameters may be written.
    pub mode: Mode,
    /// Which forms may be used.
    pub policy: Policy,
    /// Bytes per microsecond that a local landing copy reaches.
    pub landing_bytes_per_us: u64,
    /// Bytes that a wave may stage in [`Mode::Direct`], before they are landed and the next wave uses the same memory.
    /// A piece that cannot be cut smaller gets a wave of its own. Everything is one wave in [`Mode::Staged`], and where
    /// waves would take more reads than the transport allows, 64 times as many pieces, or 2^20.
    pub wave_bytes: u64,
    /// How many waves have staging memory of their own, at least 1: with 2, the reads of a wave may be under way while
    /// the one before is landed.
    pub slots: u32,
}

impl Default for LowerOptions {
    /// Direct, cheapest, a landing rate of 4 GB/s, which is one ordinary core, and waves of 8 MiB: small enough for a
    /// cache, large enough that posting them costs nothing.
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            policy: Policy::default(),
            landing_bytes_per_us: 4_000,
            wave_bytes: 8 << 20,
            slots: 1,
        }
    }
}

impl LowerOptions {
    /// For parameters in the memory of a GPU: a landing rate of 1.5 TB/s, waves of 256 MiB, for a wave of a few megabytes is
    /// over before the next could be posted, and two of them at a time: one lands while the other is read.
    #[must_use]
    pub fn on_device() -> Self {
        Self { landing_bytes_per_us: 1_500_000, wave_bytes: 256 << 20, slots: 2, ..Self::default() }
    }

    /// These options with so many waves in staging memory of their own; 0 means 1.
    #[must_use]
    pub fn with_slots(mut self, slots: u32) -> Self {
        self.slots = slots;
        self
    }

    /// These options with another mode.
    #[must_use]
    pub fn with_mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }

    /// These options with another policy.
    #[must_use]
    pub fn with_policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// These options with another landing rate, in bytes per microsecond.
    #[must_use]
    pub fn with_landing_rate(mut self, bytes_per_us: u64) -> Self {
        self.landing_bytes_per_us = bytes_per_us;
        self
    }

    /// These options with another size of waves, in bytes; `u64::MAX` stages everything at once.
    #[must_use]
    pub fn with_wave_bytes(mut self, bytes: u64) -> Self {
        self.wave_bytes = bytes;
        self
    }

    /// What a wave may stage: live parameters that must stay as they are until everything has arrived allow one only.
    fn wave_limit(&self) -> u64 {
        match self.mode {
            Mode::Direct => self.wave_bytes,
            Mode::Staged => u64::MAX,
        }
    }
}

/// Turns a plan into reads, landing copies and fills for a transport of these capabilities.
///
/// # Errors
/// As [`lower_for`].
pub fn lower(
    plan: &Plan,
    capabilities: &Capabilities,
    options: &LowerOptions,
) -> Result<Program, LowerError> {
    lower_for(plan, |_| *capabilities, options)
}

/// Turns a plan into reads, landing copies and fills, where what can be done depends on the source rank: some may be
/// reached over NVLink, the others over a network.
///
/// The expected cost of a form is `reads * ns_per_read + wire_bytes / bytes_per_us + landed_bytes /
/// landing_bytes_per_us`, in nanoseconds and integers. Equal inputs give equal programs. Of `max_reads` the smallest
/// counts, for all reads together.
///
/// # Errors
/// [`LowerError::TooManyReads`] when no allowed form keeps to `max_reads`, [`LowerError::StagingForbidden`] when a
/// cast or map meets [`Policy::ReadPerRun`], [`LowerError::StagingTooLarge`].
pub fn lower_for(
    plan: &Plan,
    capabilities: impl Fn(u32) -> Capabilities,
    options: &LowerOptions,
) -> Result<Program, LowerError> {
    lower_placed(plan, capabilities, &[], options)
}

/// As [`lower_for`], where it is known for some source parameters what lies beside them: with two waves under way or more
/// ([`LowerOptions::slots`], in [`Mode::Direct`]), neighbours are read together where that saves reads and moves no byte more. `positions` are in the
/// order of [`Plan::sources`]; those that are missing at its end count as unknown.
///
/// # Errors
/// As [`lower_for`].
pub fn lower_placed(
    plan: &Plan,
    capabilities: impl Fn(u32) -> Capabilities,
    positions: &[Option<Position>],
    options: &LowerOptions,
) -> Result<Program, LowerError> {
    lower_links(plan, &Links::new(plan, capabilities, positions), options)
}

/// What the way to each source can do.
struct Links {
    /// By index into the plan's sources.
    by_source: Vec<Capabilities>,
    /// Likewise: where they lie, if that is known.
    positions: Vec<Option<Position>>,
    max_reads: u64,
}

impl Links {
    fn new(
        plan: &Plan,
        capabilities: impl Fn(u32) -> Capabilities,
        positions: &[Option<Position>],
    ) -> Self {
        let mut by_source = Vec::with_capacity(plan.sources().len());
        for of_rank in plan.sources().chunk_by(|a, b| a.rank == b.rank) {
            let link = capabilities(of_rank[0].rank);
            by_source.extend(of_rank.iter().map(|_| link));
        }
        let max_reads = by_source.iter().map(|link| link.max_reads).min().unwrap_or(MAX_READS);
        let mut positions = positions.to_vec();
        positions.resize(plan.sources().len(), None);
        Self { by_source, positions, max_reads: max_reads.min(MAX_READS) }
    }

    fn of(&self, source: u32) -> &Capabilities {
        &self.by_source[source as usize]
    }

    fn room(&self, options: &LowerOptions) -> Room {
        let pieces = self.max_reads.saturating_mul(WAVE_PIECES_PER_READ);
        Room::new(options.wave_limit(), pieces.min(MAX_WAVE_PIECES))
    }
}

fn lower_links(plan: &Plan, links: &Links, options: &LowerOptions) -> Result<Program, LowerError> {
    let groups =
        group(plan, links, options).and_then(|groups| limit_reads(groups, links.max_reads));
    let mut groups = match groups {
        // Cutting to waves takes more reads: where they are too many, memory gives way.
        Err(LowerError::TooManyReads { .. }) if options.wave_limit() != u64::MAX => {
            return lower_links(plan, links, &options.with_wave_bytes(u64::MAX));
        }
        result => result?,
    };
    gather::gather(plan, &mut groups, links, options, &links.room(options))?;

    let mut out = Emitter {
        links,
        room: links.room(options),
        stager: Stager::new(options.wave_limit()),
        waves: Vec::new(),
        direct: Vec::new(),
    };
    for of_target in groups.chunk_by(|a, b| a.chosen().target == b.chosen().target) {
        out.emit(of_target)?;
    }
    let (gathered, most) = gather::waves(plan, &groups, links, options.wave_limit())?;
    out.stager.most = out.stager.most.max(most);
    for pieces in gathered {
        out.gathered(&pieces);
    }
    let staged = out.waves.len();
    if staged == 0 || !out.direct.is_empty() {
        out.waves.push(WaveParts { reads: out.direct, landings: Vec::new() });
    }
    let slots = u64::from(options.slots.max(1)).min(staged.max(1) as u64);
    let slot = out.stager.slot(slots)?;
    let choices: Vec<Choice> = groups.iter().map(Group::chosen).collect();
    let (mut reads, mut landings) = (Vec::new(), Vec::new());
    let mut waves = Vec::with_capacity(out.waves.len());
    for (mut wave, number) in out.waves.into_iter().zip(0_u64..) {
        wave.shift(number % slots * slot);
        // Grouped by source, in target order within one: a transport posts one batch per peer.
        wave.reads.sort_by_key(|read| read.source);
        reads.append(&mut wave.reads);
        landings.append(&mut wave.landings);
        waves.push((reads.len(), landings.len()));
    }
    Ok(Program {
        hash: hash(plan, links, options, &choices),
        plan_hash: plan.hash(),
        sources: plan.sources().clone(),
        targets: plan.targets().clone(),
        wire_bytes: reads
            .iter()
            .fold(0, |sum: u64, read| sum.saturating_add(read.bytes()).saturating_add(read.gap)),
        needed_bytes: plan.coverage().needed_bytes,
        reads,
        landings,
        waves,
        slots: usize::try_from(slots).unwrap_or(usize::MAX),
        fills: plan.fills().to_vec(),
        choices,
        // The last slot need not be rounded up.
        staging_bytes: if staged == 0 { 0 } else { (slots - 1) * slot + out.stager.most },
    })
}

fn hash(plan: &Plan, links: &Links, options: &LowerOptions, choices: &[Choice]) -> crate::Hash {
    let mut encoder = Encoder::new(HASH_CONTEXT);
    encoder.bytes(plan.hash().as_bytes());
    encoder.u64(options.wave_limit());
    encoder.u64(u64::from(options.slots.max(1)));
    // It limits how finely pieces are cut.
    encoder.u64(links.max_reads);
    for (index, source) in plan.sources().iter().enumerate() {
        if index == 0 || plan.sources()[index - 1].rank != source.rank {
            links.by_source[index].encode(&mut encoder);
        }
    }
    encoder.len(choices.len());
    for choice in choices {
        encoder.u64(match choice.method {
            Method::Direct => 0,
            Method::Span => 1,
            Method::Packed => 2,
            Method::Gathered => 3,
        });
        // Neighbours decide what lies where in staging.
        if choice.method == Method::Gathered
            && let Some(Position { block, offset }) = links.positions[choice.source as usize]
        {
            encoder.u64(u64::from(block));
            encoder.u64(offset);
        }
    }
    encoder.finish()
}

/// The segments between one source and one target parameter, and the forms they may take, cheapest first.
struct Group<'a> {
    segments: Vec<&'a Segment>,
    /// What [`Method::Span`] or [`Method::Gathered`] reads, cut to waves.
    spans: Vec<Piece>,
    /// The gap in front of it, if it is read together with the neighbour before it.
    neighbour: Option<u64>,
    forms: Vec<Choice>,
}

impl Group<'_> {
    /// `forms` is never empty: [`group`] refuses a plan that allows none.
    fn chosen(&self) -> Choice {
        self.forms[0]
    }
}

fn group<'a>(
    plan: &'a Plan,
    links: &Links,
    options: &LowerOptions,
) -> Result<Vec<Group<'a>>, LowerError> {
    let mut groups = Vec::new();
    let mut room = links.room(options);
    // Segments are sorted by target: one pass, and a stable sort by source inside each target.
    for of_target in plan.segments().chunk_by(|a, b| a.target == b.target) {
        let mut sorted: Vec<&Segment> = of_target.iter().collect();
        sorted.sort_by_key(|segment| segment.source);
        for of_source in sorted.chunk_by(|a, b| a.source == b.source) {
            let link = links.of(of_source[0].source);
            groups.push(forms(plan, of_source.to_vec(), link, options, &mut room)?);
        }
    }
    Ok(groups)
}

fn forms<'a>(
    plan: &Plan,
    segments: Vec<&'a Segment>,
    capabilities: &Capabilities,
    options: &LowerOptions,
    room: &mut Room,
) -> Result<Group<'a>, LowerError> {
    let needed: u64 = segments.iter().map(|segment| segment.source_bytes()).sum();
    let (source, target) = (segments[0].source, segments[0].target);
    let priced = |method, reads, wire_bytes, cost_ns| Choice {
        source,
        target,
        method,
        reads,
        wire_bytes,
        needed_bytes: needed,
        cost_ns,
    };
    let landing = nanoseconds(needed, options.landing_bytes_per_us);
    let staged = |method, reads, wire_bytes| {
        let wire = capabilities.cost(reads, wire_bytes);
        priced(method, reads, wire_bytes, wire.saturating_add(landing))
    };

    let reads = |pieces: &[&Segment]| {
        pieces.iter().fold(0, |reads: u64, segment| {
            let each = if capabilities.strided_reads { 1 } else { segment.dims.runs() };
            reads.saturating_add(each)
        })
    };
    let in_flight =
        |segment: &&Segment| capabilities.transforms || segment.transform == Transform::Copy;
    let direct = (options.mode == Mode::Direct && segments.iter().all(in_flight)).then(|| {
        let (mut reads, mut cost_ns) = (0_u64, 0_u64);
        for segment in &segments {
            let way = capabilities.direct(segment);
            reads = reads.saturating_add(way.reads);
            cost_ns = cost_ns.saturating_add(way.cost_ns);
        }
        priced(Method::Direct, reads, needed, cost_ns)
    });
    if let Some(direct) = direct
        && direct.reads == 1
    {
        // No other form has fewer reads or costs less, and most parameters are such.
        return Ok(Group { segments, spans: Vec::new(), neighbour: None, forms: vec![direct] });
    }
    let spans = spans(&segments, capabilities, room)?;
    let spanned = spans.iter().fold(0, |sum: u64, span| sum.saturating_add(Form::Span.bytes(span)));
    let mut forms = Vec::with_capacity(2);
    if let Some(direct) = direct {
        forms.push(direct);
    } else if options.policy != Policy::ReadPerRun || options.mode == Mode::Staged {
        let pieces = packed(&segments, room)?;
        let pieces: Vec<&Segment> = pieces.iter().flatten().collect();
        forms.push(staged(Method::Packed, reads(&pieces), needed));
    }
    let span_allowed = match options.policy {
        Policy::Cheapest => true,
        Policy::ExactWire => spanned <= needed,
        Policy::ReadPerRun => false,
    };
    if span_allowed {
        forms.push(staged(Method::Span, spans.len() as u64, spanned));
    }
    forms.sort_by_key(|form| form.cost_ns);
    if forms.is_empty() {
        return Err(LowerError::StagingForbidden {
            param: plan.targets()[target as usize].name.clone(),
        });
    }
    Ok(Group { segments, spans, neighbour: None, forms })
}

/// The source ranges that cover all segments, neighbours joined where reading the gap costs less than another read,
/// cut to waves.
fn spans(
    segments: &[&Segment],
    capabilities: &Capabilities,
    room: &mut Room,
) -> Result<Vec<Piece>, LowerError> {
    let mut sorted = segments.to_vec();
    sorted.sort_by_key(|segment| segment.source_offset);
    let mut spans: Vec<Piece> = Vec::new();
    let mut end = 0;
    for segment in sorted {
        let (start, segment_end) = stage::range(core::slice::from_ref(segment));
        let near = nanoseconds(start.saturating_sub(end), capabilities.bytes_per_us)
            <= capabilities.ns_per_read;
        match spans.last_mut() {
            Some(last) if near => last.push(segment.clone()),
            _ => spans.push(vec![segment.clone()]),
        }
        end = segment_end.max(end);
    }
    let mut pieces = Vec::with_capacity(spans.len());
    for span in spans {
        stage::cut(span, Form::Span, room, &mut pieces)?;
    }
    Ok(pieces)
}

/// The segments one by one, cut to waves.
fn packed(segments: &[&Segment], room: &mut Room) -> Result<Vec<Piece>, LowerError> {
    let mut pieces = Vec::with_capacity(segments.len());
    for &segment in segments {
        stage::cut(vec![segment.clone()], Form::Packed, room, &mut pieces)?;
    }
    Ok(pieces)
}

/// Moves groups to forms with fewer reads, the largest saving first, until the program fits.
fn limit_reads(mut groups: Vec<Group<'_>>, max: u64) -> Result<Vec<Group<'_>>, LowerError> {
    let mut reads: u128 = groups.iter().map(|group| u128::from(group.chosen().reads)).sum();
    let fewest = |group: &Group<'_>| group.forms.iter().map(|form| form.reads).min().unwrap_or(0);
    let mut order: Vec<usize> = (0..groups.len()).collect();
    order.sort_by_key(|&index| {
        core::cmp::Reverse(groups[index].chosen().reads - fewest(&groups[index]))
    });
    for index in order {
        if reads <= u128::from(max) {
            break;
        }
        let group = &mut groups[index];
        let before = group.chosen().reads;
        group.forms.sort_by_key(|form| form.reads);
        reads = reads - u128::from(before) + u128::from(group.chosen().reads);
    }
    match u64::try_from(reads).unwrap_or(u64::MAX) {
        reads if reads <= max => Ok(groups),
        reads => Err(LowerError::TooManyReads { reads, max }),
    }
}

#[derive(Default)]
struct WaveParts {
    reads: Vec<Read>,
    landings: Vec<Landing>,
}

impl WaveParts {
    /// Moves what the wave stages by so many bytes. They fit: [`Stager::slot`] has seen to it.
    fn shift(&mut self, bytes: u64) {
        for read in &mut self.reads {
            if let Destination::Staging { offset } = &mut read.destination {
                *offset += bytes;
            }
        }
        for landing in &mut self.landings {
            landing.staging_offset += bytes;
        }
    }
}

struct Emitter<'a> {
    links: &'a Links,
    room: Room,
    stager: Stager,
    /// Those that stage.
    waves: Vec<WaveParts>,
    /// Reads into live parameters.
    direct: Vec<Read>,
}

impl Emitter<'_> {
    /// Emits everything that one target parameter gets.
    fn emit(&mut self, groups: &[Group<'_>]) -> Result<(), LowerError> {
        let mut staged: Vec<(Form, Piece)> = Vec::new();
        for group in groups {
            match group.chosen().method {
                Method::Direct => {
                    for segment in &group.segments {
                        let Segment { target, target_offset, .. } = **segment;
                        let to =
                            |offset| Destination::Live { target, offset: target_offset + offset };
                        let way = self.links.of(segment.source).direct(segment);
                        let strided = self.links.of(segment.source).strided_reads;
                        let reads = &mut self.direct;
                        let dims = &segment.dims;
                        read(reads, segment, dims, segment.transform, (strided, way.bulk), to);
                    }
                }
                Method::Packed => {
                    let pieces = packed(&group.segments, &mut self.room)?;
                    staged.extend(pieces.into_iter().map(|piece| (Form::Packed, piece)));
                }
                Method::Span => {
                    staged.extend(group.spans.iter().map(|piece| (Form::Span, piece.clone())));
                }
                Method::Gathered => {}
            }
        }
        // In the order of the target: what several sources bring to one place is landed together.
        staged.sort_by_key(|(_, piece)| {
            piece.iter().map(|segment| (segment.target_offset, segment.source)).min()
        });
        for (form, piece) in &staged {
            self.stage(*form, piece)?;
        }
        Ok(())
    }

    fn stage(&mut self, form: Form, piece: &[Segment]) -> Result<(), LowerError> {
        let (wave, base) = self.stager.place(form.bytes(piece))?;
        if wave == self.waves.len() {
            self.waves.push(WaveParts::default());
        }
        match form {
            Form::Span => self.span(wave, base, piece, 0),
            Form::Packed => {
                for segment in piece {
                    // The runs lie in staging in order: the destination strides are those of a dense pattern.
                    let packed = segment.dims.packed_source(segment.run);
                    let dense = segment.dims.as_slice().iter().zip(packed.as_slice());
                    let into: Dims = dense
                        .map(|(dim, dense)| crate::Dim {
                            target_stride: dense.source_stride,
                            ..*dim
                        })
                        .collect();
                    let strided = self.links.of(segment.source).strided_reads;
                    let reads = &mut self.waves[wave].reads;
                    read(reads, segment, &into, Transform::Copy, (strided, false), |offset| {
                        Destination::Staging { offset: base + offset }
                    });
                    self.land(wave, segment, base, packed);
                }
            }
        }
        Ok(())
    }

    /// Reads a piece as it lies in the source, and the gap behind it if it may.
    fn span(&mut self, wave: usize, base: u64, piece: &[Segment], gap: u64) {
        let (start, end) = stage::range(piece);
        let (source, run) = (piece[0].source, end - start);
        let link = self.links.of(source);
        self.waves[wave].reads.push(Read {
            source,
            offset: start,
            destination: Destination::Staging { offset: base },
            run,
            dims: Dims::none(),
            transform: Transform::Copy,
            bulk: link.bulk_cost(link.cost(1, run), 1, run).is_some(),
            gap,
        });
        for segment in piece {
            let from = base + (segment.source_offset - start);
            self.land(wave, segment, from, segment.dims.clone());
        }
    }

    /// Emits a wave of what is read together with its neighbours.
    fn gathered(&mut self, pieces: &[gather::Placed]) {
        let wave = self.waves.len();
        self.waves.push(WaveParts::default());
        for gather::Placed { base, piece, gap } in pieces {
            self.span(wave, *base, piece, *gap);
        }
        self.waves[wave].landings.sort_by_key(|landing| (landing.target, landing.offset));
    }

    fn land(&mut self, wave: usize, segment: &Segment, staging_offset: u64, dims: Dims) {
        self.waves[wave].landings.push(Landing {
            staging_offset,
            target: segment.target,
            offset: segment.target_offset,
            run: segment.run,
            dims,
            transform: segment.transform,
        });
    }
}

/// One strided read where the transport takes it, else one per run. `dims` has the strides of the destination, `ways` says
/// whether strided reads are taken and whether these go by the second way.
fn read(
    reads: &mut Vec<Read>,
    segment: &Segment,
    dims: &Dims,
    transform: Transform,
    (strided, bulk): (bool, bool),
    to: impl Fn(u64) -> Destination,
) {
    let Segment { source, source_offset, run, .. } = *segment;
    let read = |offset, destination, dims| Read {
        source,
        offset,
        destination,
        run,
        dims,
        transform,
        bulk,
        gap: 0,
    };
    if strided && !bulk {
        reads.push(read(source_offset, to(0), dims.clone()));
        return;
    }
    reads.extend(
        dims.offsets().map(|(from, into)| read(source_offset + from, to(into), Dims::none())),
    );
}
