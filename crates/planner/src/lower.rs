//! Choosing, per pair of parameters, the cheapest form a transport can execute.

use alloc::vec::Vec;

use crate::encode::Encoder;
use crate::program::{Choice, Destination, Landing, Method, Program, Read};
use crate::{Dims, LowerError, Plan, Segment, Transform};

const HASH_CONTEXT: &str = "refit-planner program v1";

/// Staged ranges start at multiples of this, so that any element type is aligned and rows share no cache line.
const STAGING_ALIGN: u64 = 256;

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
    /// Most reads one program may have.
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
}

impl Default for LowerOptions {
    /// Direct, cheapest, and a landing rate of 4 GB/s: one ordinary core.
    fn default() -> Self {
        Self { mode: Mode::default(), policy: Policy::default(), landing_bytes_per_us: 4_000 }
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
    let mut groups = group(plan, capabilities, options)?;
    limit_reads(&mut groups, capabilities.max_reads)?;

    let mut out = Emitter {
        strided: capabilities.strided_reads,
        reads: Vec::new(),
        landings: Vec::new(),
        staged: 0,
    };
    for group in &groups {
        out.emit(group)?;
    }
    // Grouped by source, in target order within one: a transport posts one batch per peer.
    out.reads.sort_by_key(|read| read.source);
    let choices: Vec<Choice> = groups.iter().map(Group::chosen).collect();
    Ok(Program {
        hash: hash(plan, capabilities, &choices),
        plan_hash: plan.hash(),
        sources: plan.sources().clone(),
        targets: plan.targets().clone(),
        wire_bytes: out.reads.iter().map(Read::bytes).sum(),
        needed_bytes: plan.coverage().needed_bytes,
        reads: out.reads,
        landings: out.landings,
        fills: plan.fills().to_vec(),
        choices,
        staging_bytes: out.staged,
    })
}

fn hash(plan: &Plan, capabilities: &Capabilities, choices: &[Choice]) -> crate::Hash {
    let mut encoder = Encoder::new(HASH_CONTEXT);
    encoder.bytes(plan.hash().as_bytes());
    encoder.u64(u64::from(capabilities.strided_reads));
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
    spans: Vec<Span>,
    forms: Vec<Choice>,
}

/// A contiguous range of a source parameter.
#[derive(Clone, Copy)]
struct Span {
    start: u64,
    end: u64,
}

impl Span {
    fn bytes(self) -> u64 {
        self.end - self.start
    }
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
    // Segments are sorted by target: one pass, and a stable sort by source inside each target.
    for of_target in plan.segments().chunk_by(|a, b| a.target == b.target) {
        let mut sorted: Vec<&Segment> = of_target.iter().collect();
        sorted.sort_by_key(|segment| segment.source);
        for of_source in sorted.chunk_by(|a, b| a.source == b.source) {
            groups.push(forms(plan, of_source.to_vec(), capabilities, options)?);
        }
    }
    Ok(groups)
}

fn forms<'a>(
    plan: &Plan,
    segments: Vec<&'a Segment>,
    capabilities: &Capabilities,
    options: &LowerOptions,
) -> Result<Group<'a>, LowerError> {
    let needed: u64 = segments.iter().map(|segment| segment.source_bytes()).sum();
    let runs = segments.iter().fold(0, |runs: u64, segment| {
        runs.saturating_add(if capabilities.strided_reads { 1 } else { segment.dims.runs() })
    });
    let spans = spans(&segments, capabilities);
    let spanned = spans.iter().map(|span| span.bytes()).sum();
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

    let copies_only = segments.iter().all(|segment| segment.transform == Transform::Copy);
    let mut forms = Vec::with_capacity(3);
    if copies_only && options.mode == Mode::Direct {
        forms.push(choice(Method::Direct, runs, needed, 0));
    }
    if options.policy != Policy::ReadPerRun || options.mode == Mode::Staged {
        forms.push(choice(Method::Packed, runs, needed, needed));
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

/// The source ranges that cover all segments, neighbours joined where reading the gap costs less than another read.
fn spans(segments: &[&Segment], capabilities: &Capabilities) -> Vec<Span> {
    let mut spans: Vec<Span> = segments
        .iter()
        .map(|segment| {
            let start = segment.source_offset;
            Span { start, end: start.saturating_add(segment.dims.source_extent(segment.run)) }
        })
        .collect();
    spans.sort_by_key(|span| span.start);
    let mut joined: Vec<Span> = Vec::with_capacity(spans.len());
    for span in spans {
        match joined.last_mut() {
            Some(last)
                if nanoseconds(span.start.saturating_sub(last.end), capabilities.bytes_per_us)
                    <= capabilities.ns_per_read =>
            {
                last.end = last.end.max(span.end);
            }
            _ => joined.push(span),
        }
    }
    joined
}

fn nanoseconds(bytes: u64, bytes_per_us: u64) -> u64 {
    let nanoseconds = u128::from(bytes) * 1_000 / u128::from(bytes_per_us.max(1));
    u64::try_from(nanoseconds).unwrap_or(u64::MAX)
}

/// Moves groups to forms with fewer reads, the largest saving first, until the program fits.
fn limit_reads(groups: &mut [Group<'_>], max: u64) -> Result<(), LowerError> {
    let mut reads =
        groups.iter().fold(0, |sum: u64, group| sum.saturating_add(group.chosen().reads));
    if reads <= max {
        return Ok(());
    }
    let fewest = |group: &Group<'_>| group.forms.iter().map(|form| form.reads).min().unwrap_or(0);
    let mut order: Vec<usize> = (0..groups.len()).collect();
    order.sort_by_key(|&index| {
        core::cmp::Reverse(groups[index].chosen().reads - fewest(&groups[index]))
    });
    for index in order {
        if reads <= max {
            return Ok(());
        }
        let group = &mut groups[index];
        let before = group.chosen().reads;
        group.forms.sort_by_key(|form| form.reads);
        reads = reads - before + group.chosen().reads;
    }
    if reads <= max { Ok(()) } else { Err(LowerError::TooManyReads { reads, max }) }
}

struct Emitter {
    strided: bool,
    reads: Vec<Read>,
    landings: Vec<Landing>,
    staged: u64,
}

impl Emitter {
    fn emit(&mut self, group: &Group<'_>) -> Result<(), LowerError> {
        match group.chosen().method {
            Method::Direct => {
                for segment in &group.segments {
                    let Segment {
                        source, target, source_offset, target_offset, run, ref dims, ..
                    } = **segment;
                    let to = |offset| Destination::Live { target, offset: target_offset + offset };
                    self.read(source, source_offset, run, dims, to);
                }
            }
            Method::Packed => {
                for segment in &group.segments {
                    let Segment { source, source_offset, run, ref dims, .. } = **segment;
                    let base = self.reserve(segment.source_bytes())?;
                    // The runs lie in staging in order: the destination strides are those of a dense pattern.
                    let packed = dims.packed_source(run);
                    let into: Dims = dims
                        .as_slice()
                        .iter()
                        .zip(packed.as_slice())
                        .map(|(dim, dense)| crate::Dim {
                            target_stride: dense.source_stride,
                            ..*dim
                        })
                        .collect();
                    self.read(source, source_offset, run, &into, |offset| Destination::Staging {
                        offset: base + offset,
                    });
                    self.land(segment, base, packed);
                }
            }
            Method::Span => {
                for span in &group.spans {
                    let base = self.reserve(span.bytes())?;
                    let source = group.segments[0].source;
                    self.reads.push(Read {
                        source,
                        offset: span.start,
                        destination: Destination::Staging { offset: base },
                        run: span.bytes(),
                        dims: Dims::none(),
                    });
                    let inside = |segment: &&&Segment| {
                        (span.start..span.end).contains(&segment.source_offset)
                    };
                    for segment in group.segments.iter().filter(inside) {
                        self.land(
                            segment,
                            base + (segment.source_offset - span.start),
                            segment.dims.clone(),
                        );
                    }
                }
            }
        }
        Ok(())
    }

    /// One strided read where the transport takes it, else one per run.
    fn read(
        &mut self,
        source: u32,
        offset: u64,
        run: u64,
        dims: &Dims,
        to: impl Fn(u64) -> Destination,
    ) {
        if self.strided {
            self.reads.push(Read { source, offset, destination: to(0), run, dims: dims.clone() });
            return;
        }
        self.reads.extend(dims.offsets().map(|(from, into)| Read {
            source,
            offset: offset + from,
            destination: to(into),
            run,
            dims: Dims::none(),
        }));
    }

    fn land(&mut self, segment: &Segment, staging_offset: u64, dims: Dims) {
        self.landings.push(Landing {
            staging_offset,
            target: segment.target,
            offset: segment.target_offset,
            run: segment.run,
            dims,
            transform: segment.transform,
        });
    }

    fn reserve(&mut self, bytes: u64) -> Result<u64, LowerError> {
        let base = self
            .staged
            .checked_next_multiple_of(STAGING_ALIGN)
            .ok_or(LowerError::StagingTooLarge)?;
        let end = base.checked_add(bytes).filter(|end| i64::try_from(*end).is_ok());
        self.staged = end.ok_or(LowerError::StagingTooLarge)?;
        Ok(base)
    }
}
