//! Choosing, per pair of parameters, the cheapest form a transport can execute.

mod stage;

use alloc::vec;
use alloc::vec::Vec;

use self::stage::{Form, Piece, Room, Stager};
use crate::encode::Encoder;
use crate::program::{Choice, Destination, Landing, Method, Program, Read};
use crate::{Dims, LowerError, Plan, Segment, Transform};

const HASH_CONTEXT: &str = "refit-planner program v2";

/// Staged ranges start at multiples of this, so that any element type is aligned and rows share no cache line.
const STAGING_ALIGN: u64 = 256;

/// No program has more reads, whatever a transport says: each takes some hundred bytes.
const MAX_READS: u64 = 1 << 25;

/// Waves are not worth more pieces than this: with the default size it is 8 TB of staging.
const MAX_WAVE_PIECES: u64 = 1 << 20;

/// Nor more for each read that a program may have: a piece takes at least one.
const WAVE_PIECES_PER_READ: u64 = 64;

/// What a transport can do, in integers so that every host decides alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Capabilities {
    /// It executes strided segments as they are: nothing needs exploding or staging but casts and maps.
    pub strided_reads: bool,
    /// Bytes it moves per microsecond.
    pub bytes_per_us: u64,
    /// What one more read costs.
    pub ns_per_read: u64,
    /// Most reads one program may have; 2^25 is the most for any transport.
    pub max_reads: u64,
}

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
        }
    }
}

impl LowerOptions {
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
/// The expected cost of a form is `reads * ns_per_read + wire_bytes / bytes_per_us + landed_bytes /
/// landing_bytes_per_us`, in nanoseconds and integers. Equal inputs give equal programs.
///
/// # Errors
/// [`LowerError::TooManyReads`] when no allowed form keeps to `max_reads`, [`LowerError::StagingForbidden`] when a
/// cast or map meets [`Policy::ReadPerRun`], [`LowerError::StagingTooLarge`].
pub fn lower(
    plan: &Plan,
    capabilities: &Capabilities,
    options: &LowerOptions,
) -> Result<Program, LowerError> {
    let max_reads = capabilities.max_reads.min(MAX_READS);
    let groups =
        group(plan, capabilities, options).and_then(|groups| limit_reads(groups, max_reads));
    let groups = match groups {
        // Cutting to waves takes more reads: where they are too many, memory gives way.
        Err(LowerError::TooManyReads { .. }) if options.wave_limit() != u64::MAX => {
            return lower(plan, capabilities, &options.with_wave_bytes(u64::MAX));
        }
        result => result?,
    };

    let mut out = Emitter {
        strided: capabilities.strided_reads,
        room: room(capabilities, options),
        stager: Stager::new(options.wave_limit()),
        waves: vec![WaveParts::default()],
    };
    for of_target in groups.chunk_by(|a, b| a.chosen().target == b.chosen().target) {
        out.emit(of_target)?;
    }
    let choices: Vec<Choice> = groups.iter().map(Group::chosen).collect();
    let (mut reads, mut landings) = (Vec::new(), Vec::new());
    let mut waves = Vec::with_capacity(out.waves.len());
    for mut wave in out.waves {
        // Grouped by source, in target order within one: a transport posts one batch per peer.
        wave.reads.sort_by_key(|read| read.source);
        reads.append(&mut wave.reads);
        landings.append(&mut wave.landings);
        waves.push((reads.len(), landings.len()));
    }
    Ok(Program {
        hash: hash(plan, capabilities, options, &choices),
        plan_hash: plan.hash(),
        sources: plan.sources().clone(),
        targets: plan.targets().clone(),
        wire_bytes: reads.iter().fold(0, |sum: u64, read| sum.saturating_add(read.bytes())),
        needed_bytes: plan.coverage().needed_bytes,
        reads,
        landings,
        waves,
        fills: plan.fills().to_vec(),
        choices,
        staging_bytes: out.stager.most,
    })
}

fn room(capabilities: &Capabilities, options: &LowerOptions) -> Room {
    let pieces = capabilities.max_reads.saturating_mul(WAVE_PIECES_PER_READ);
    Room::new(options.wave_limit(), pieces.min(MAX_WAVE_PIECES))
}

fn hash(
    plan: &Plan,
    capabilities: &Capabilities,
    options: &LowerOptions,
    choices: &[Choice],
) -> crate::Hash {
    let mut encoder = Encoder::new(HASH_CONTEXT);
    encoder.bytes(plan.hash().as_bytes());
    encoder.u64(u64::from(capabilities.strided_reads));
    encoder.u64(options.wave_limit());
    encoder.len(choices.len());
    for choice in choices {
        encoder.u64(match choice.method {
            Method::Direct => 0,
            Method::Span => 1,
            Method::Packed => 2,
        });
    }
    encoder.finish()
}

/// The segments between one source and one target parameter, and the forms they may take, cheapest first.
struct Group<'a> {
    segments: Vec<&'a Segment>,
    /// What [`Method::Span`] reads, cut to waves.
    spans: Vec<Piece>,
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
    capabilities: &Capabilities,
    options: &LowerOptions,
) -> Result<Vec<Group<'a>>, LowerError> {
    let mut groups = Vec::new();
    let mut room = room(capabilities, options);
    // Segments are sorted by target: one pass, and a stable sort by source inside each target.
    for of_target in plan.segments().chunk_by(|a, b| a.target == b.target) {
        let mut sorted: Vec<&Segment> = of_target.iter().collect();
        sorted.sort_by_key(|segment| segment.source);
        for of_source in sorted.chunk_by(|a, b| a.source == b.source) {
            groups.push(forms(plan, of_source.to_vec(), capabilities, options, &mut room)?);
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
    let choice = |method, reads: u64, wire_bytes, landed| Choice {
        source,
        target,
        method,
        reads,
        wire_bytes,
        needed_bytes: needed,
        cost_ns: reads
            .saturating_mul(capabilities.ns_per_read)
            .saturating_add(nanoseconds(wire_bytes, capabilities.bytes_per_us))
            .saturating_add(nanoseconds(landed, options.landing_bytes_per_us)),
    };

    let reads = |pieces: &[&Segment]| {
        pieces.iter().fold(0, |reads: u64, segment| {
            let each = if capabilities.strided_reads { 1 } else { segment.dims.runs() };
            reads.saturating_add(each)
        })
    };
    let copies_only = segments.iter().all(|segment| segment.transform == Transform::Copy);
    let direct = (copies_only && options.mode == Mode::Direct)
        .then(|| choice(Method::Direct, reads(&segments), needed, 0));
    if let Some(direct) = direct
        && direct.reads == 1
    {
        // No other form has fewer reads or costs less, and most parameters are such.
        return Ok(Group { segments, spans: Vec::new(), forms: vec![direct] });
    }
    let spans = spans(&segments, capabilities, room)?;
    let spanned = spans.iter().fold(0, |sum: u64, span| sum.saturating_add(Form::Span.bytes(span)));
    let mut forms = Vec::with_capacity(2);
    if let Some(direct) = direct {
        forms.push(direct);
    } else if options.policy != Policy::ReadPerRun || options.mode == Mode::Staged {
        let pieces = packed(&segments, room)?;
        let pieces: Vec<&Segment> = pieces.iter().flatten().collect();
        forms.push(choice(Method::Packed, reads(&pieces), needed, needed));
    }
    let span_allowed = match options.policy {
        Policy::Cheapest => true,
        Policy::ExactWire => spanned <= needed,
        Policy::ReadPerRun => false,
    };
    if span_allowed {
        forms.push(choice(Method::Span, spans.len() as u64, spanned, needed));
    }
    forms.sort_by_key(|form| form.cost_ns);
    if forms.is_empty() {
        return Err(LowerError::StagingForbidden {
            param: plan.targets()[target as usize].name.clone(),
        });
    }
    Ok(Group { segments, spans, forms })
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

fn nanoseconds(bytes: u64, bytes_per_us: u64) -> u64 {
    let nanoseconds = u128::from(bytes) * 1_000 / u128::from(bytes_per_us.max(1));
    u64::try_from(nanoseconds).unwrap_or(u64::MAX)
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

struct Emitter {
    strided: bool,
    room: Room,
    stager: Stager,
    /// Never empty.
    waves: Vec<WaveParts>,
}

impl Emitter {
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
                        self.read(0, segment, &segment.dims, to);
                    }
                }
                Method::Packed => {
                    let pieces = packed(&group.segments, &mut self.room)?;
                    staged.extend(pieces.into_iter().map(|piece| (Form::Packed, piece)));
                }
                Method::Span => {
                    staged.extend(group.spans.iter().map(|piece| (Form::Span, piece.clone())));
                }
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
            Form::Span => {
                let (start, end) = stage::range(piece);
                self.waves[wave].reads.push(Read {
                    source: piece[0].source,
                    offset: start,
                    destination: Destination::Staging { offset: base },
                    run: end - start,
                    dims: Dims::none(),
                });
                for segment in piece {
                    let from = base + (segment.source_offset - start);
                    self.land(wave, segment, from, segment.dims.clone());
                }
            }
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
                    self.read(wave, segment, &into, |offset| Destination::Staging {
                        offset: base + offset,
                    });
                    self.land(wave, segment, base, packed);
                }
            }
        }
        Ok(())
    }

    /// One strided read where the transport takes it, else one per run. `dims` has the strides of the destination.
    fn read(
        &mut self,
        wave: usize,
        segment: &Segment,
        dims: &Dims,
        to: impl Fn(u64) -> Destination,
    ) {
        let Segment { source, source_offset, run, .. } = *segment;
        let reads = &mut self.waves[wave].reads;
        if self.strided {
            let (destination, dims) = (to(0), dims.clone());
            reads.push(Read { source, offset: source_offset, destination, run, dims });
            return;
        }
        reads.extend(dims.offsets().map(|(from, into)| Read {
            source,
            offset: source_offset + from,
            destination: to(into),
            run,
            dims: Dims::none(),
        }));
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
