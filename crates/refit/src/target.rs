//! The side that wants the weights, as typestates: prepare → pull → land → install → refreshed. The wrong order does not
//! compile.
//!
//! ```text
//! Target ──prepare──▶ Prepared ──pull──▶ Pulling ──wait──▶ Pulled ──land──▶ Landed ──install──▶ Installed ──refreshed──▶ Target
//!                        │                  │                │
//!                        └── cancel         └────── a failure in direct mode ──▶ InvalidTarget ──prepare──▶ …
//! ```

mod lend;
mod parked;
mod prepare;
mod versions;
mod waves;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use refit_planner::{LowerOptions, Mode, PlanOptions, Program, RankLayout};
use refit_pool::Memory;
use refit_translate::{PostAction, TargetLayout};
use refit_transport::{
    Patience, Peer, Progress, PullError, Transport, TransportError, TransportLease, TransportPool,
};

use crate::bind::batch_ranks;
use crate::error::RefitError;
use crate::land::DeviceLander;
use crate::memory::{Reach, in_layout_order};
use crate::publication::Publication;
use crate::report::Report;
use crate::request::PackRequest;
use crate::source::Source;

use self::lend::Installation;
pub use self::lend::Lent;
pub use self::parked::{ParkedTarget, Settling};
use self::prepare::{Met, Planned, prepare};
use self::versions::{Phase, Watched};
use self::waves::{Reading, Stop};

/// How a target plans and lowers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TargetOptions {
    /// Choices in planning.
    pub plan: PlanOptions,
    /// Choices in lowering.
    pub lower: LowerOptions,
}

impl TargetOptions {
    /// These options with other choices in lowering.
    #[must_use]
    pub fn with_lower(mut self, lower: LowerOptions) -> Self {
        self.lower = lower;
        self
    }
}

/// One target rank whose parameters are whole: all of one refit, or as the engine loaded them.
#[derive(Debug)]
pub struct Target<T: Transport>(Box<Inner<T>>);

/// One target rank whose parameters are a mix of versions. It must not serve; only a complete refit makes it a
/// [`Target`] again, so that is all it offers.
#[derive(Debug)]
pub struct InvalidTarget<T: Transport>(Box<Inner<T>>);

/// A refit with its reads built and its staging memory leased. Nothing has moved yet.
#[derive(Debug)]
pub struct Prepared<T: Transport> {
    refit: Refit<T>,
    lease: TransportLease<T>,
}

/// A refit whose reads are under way, wave after wave: what a wave has staged is landed before the next is posted. Its
/// memory cannot be reached until all of them have settled.
///
/// Dropping it leaks that memory, loudly: a NIC may still write it.
#[derive(Debug)]
pub struct Pulling<T: Transport> {
    // Dropped before the lease: it waits for landings, which read the lease's memory.
    refit: Refit<T>,
    /// Absent only inside a method.
    reading: Option<Reading<T>>,
}

/// A refit whose bytes have all arrived.
#[derive(Debug)]
pub struct Pulled<T: Transport> {
    refit: Refit<T>,
    lease: TransportLease<T>,
}

/// A refit whose bytes are all in place.
#[derive(Debug)]
pub struct Landed<T: Transport> {
    refit: Refit<T>,
    lease: TransportLease<T>,
}

/// A refit whose parameters are all new, while what the engine derived from the old ones may be as it was.
///
/// The engine carries out [`Installed::post_actions`] and then says so by [`Installed::refreshed`], which gives the
/// target back.
#[derive(Debug)]
#[must_use = "the engine must carry out the post actions before it serves"]
pub struct Installed<T: Transport> {
    inner: Box<Inner<T>>,
    report: Report,
}

impl<T: Transport> Installed<T> {
    /// What the engine must do before it serves, in this order.
    #[must_use]
    pub fn post_actions(&self) -> &[PostAction] {
        &self.inner.post_actions
    }

    /// What the refit came to.
    #[must_use]
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Every live parameter, by name, to derive from.
    pub fn params(&self) -> impl Iterator<Item = (&str, &Memory)> {
        self.inner.layout.params().iter().map(|param| param.name().as_ref()).zip(&self.inner.live)
    }

    /// The target, after all of [`Installed::post_actions`] were carried out.
    #[must_use]
    pub fn refreshed(self) -> (Target<T>, Report) {
        (Target(self.inner), self.report)
    }

    /// The target, after some of them could not be: what it computes is a mix of old and new weights.
    #[must_use]
    pub fn stale(self) -> InvalidTarget<T> {
        InvalidTarget(self.inner)
    }
}

/// A step failed; the state it leaves behind comes with the reason.
#[derive(Debug)]
pub struct Failed<S> {
    /// Why.
    pub error: RefitError,
    /// What can be gone on with.
    pub state: S,
}

impl<S> std::fmt::Display for Failed<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.error.fmt(f)
    }
}

impl<S: std::fmt::Debug> std::error::Error for Failed<S> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

/// What a failed wait leaves behind.
#[derive(Debug)]
pub enum Unfinished<T: Transport> {
    /// The deadline passed; the reads are still out and can be waited on again.
    Pulling(Box<Pulling<T>>),
    /// The reads settled, some with errors, and had written live parameters.
    Invalid(InvalidTarget<T>),
    /// The reads settled, some with errors, but only staging memory was written.
    Whole(Target<T>),
    /// Reads can no longer be watched and may write the target's memory for ever. It has been leaked: start the
    /// engine's worker anew.
    Lost,
}

#[derive(Debug)]
struct Inner<T: Transport> {
    transport: Arc<T>,
    pool: TransportPool<T>,
    layout: RankLayout,
    post_actions: Vec<PostAction>,
    options: TargetOptions,
    /// In the order of the layout's parameters. Empty only while a [`Pull`] owns them.
    live: Vec<Memory>,
    /// By source rank: the publication a peer was met under, and the peer.
    peers: BTreeMap<u32, ([u8; 32], Peer)>,
    /// Every agent that is connected, the one met last at the end.
    met: Vec<Met>,
    /// How many times agents were connected.
    connects: u64,
    /// What lands in memory that the processor cannot write.
    device: Option<DeviceLander>,
    reach: Reach,
    /// The last few plans, the latest first.
    planned: Vec<Planned>,
    /// What the parameters hold, if that is what a refit left.
    installed: Option<Installation>,
    /// What the parameters were lent by, without them: its registrations and its header stay for the next time.
    lender: Option<Box<Source<T>>>,
}

/// What travels through the states of one refit.
#[derive(Debug)]
struct Refit<T: Transport> {
    inner: Box<Inner<T>>,
    /// Whether the parameters were a mix before.
    invalid: bool,
    program: Arc<Program>,
    report: Report,
    began: Instant,
    /// When the first read was posted.
    started: Instant,
    /// Where each wave ends among the lease's batches.
    ends: Arc<[usize]>,
    /// The first wave that has not begun to land.
    wave: usize,
    /// Waves posted.
    posted: usize,
    phase: Phase,
    /// From the arrival of the last data until it is known what was read.
    sync: tracing::Span,
    /// The ranks that are read from.
    watched: Vec<Watched>,
    /// Why no further wave is posted or landed, while reads settle.
    failed: Option<RefitError>,
}

impl<T: Transport> Target<T> {
    /// A target rank with these live parameters, which are adopted, not copied.
    ///
    /// # Errors
    /// [`RefitError::NoMemory`], [`RefitError::StrayMemory`], [`RefitError::Size`] when memory and layout disagree.
    pub fn new(
        transport: Arc<T>,
        pool: TransportPool<T>,
        layout: impl Into<TargetLayout>,
        params: impl IntoIterator<Item = (String, Memory)>,
        options: TargetOptions,
    ) -> Result<Self, RefitError> {
        let TargetLayout { layout, post_actions, .. } = layout.into();
        let live = in_layout_order(&layout, params)?;
        Ok(Self(Box::new(Inner {
            transport,
            pool,
            layout,
            post_actions,
            options,
            live,
            peers: BTreeMap::new(),
            met: Vec::new(),
            connects: 0,
            device: None,
            reach: Reach::default(),
            planned: Vec::new(),
            installed: None,
            lender: None,
        })))
    }

    /// Lands by this device's kernel, which parameters in its memory need where bytes are staged or filled.
    #[cfg(feature = "cuda")]
    #[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
    #[must_use]
    pub fn with_device(mut self, device: DeviceLander) -> Self {
        self.0.device = Some(device);
        self.0.planned.clear();
        self
    }

    /// What it reads through.
    #[must_use]
    pub fn transport(&self) -> &Arc<T> {
        &self.0.transport
    }

    /// Where its staging memory and its registrations come from.
    #[must_use]
    pub fn pool(&self) -> &TransportPool<T> {
        &self.0.pool
    }

    /// How bytes come from each source rank met so far, and why that way.
    pub fn routes(&self) -> impl Iterator<Item = (u32, String)> {
        self.0.peers.iter().map(|(&rank, (_, peer))| (rank, self.0.transport.route(peer)))
    }

    /// The rank's layout.
    #[must_use]
    pub fn layout(&self) -> &RankLayout {
        &self.0.layout
    }

    /// Every live parameter, by name.
    pub fn params(&self) -> impl Iterator<Item = (&str, &Memory)> {
        self.0.layout.params().iter().map(|param| param.name().as_ref()).zip(&self.0.live)
    }

    /// Every live parameter, for the engine to load its own values between refits. From then on it holds no version that
    /// could be lent.
    pub fn params_mut(&mut self) -> impl Iterator<Item = (&str, &mut Memory)> {
        self.0.installed = None;
        self.0.layout.params().iter().map(|param| param.name().as_ref()).zip(&mut self.0.live)
    }

    /// What sources would have to pack for this target to read everything in one piece, given what they offer now. It
    /// plans, and meets the sources; if they go on as they are, [`prepare`](Self::prepare) finds that done.
    ///
    /// Once they have packed, they offer what was asked for, and there is nothing left to ask: do not put that in the
    /// place of the request that they answered.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare), and [`RefitError::Pack`].
    pub fn pack_request(
        &mut self,
        publications: &[Publication],
    ) -> Result<PackRequest, RefitError> {
        self.0.pack_request(publications)
    }

    /// Plans and lowers the next refit by other options. Plans made under these before are still there.
    pub fn set_options(&mut self, options: TargetOptions) {
        self.0.options = options;
    }

    /// Forgets all plans, so that the next refit makes its own anew. Memory is the pool's to keep or clear.
    pub fn forget_plans(&mut self) {
        self.0.planned.clear();
    }

    /// Makes ready to pull from the ranks that published. Warm, when nothing changed since the last time: then this
    /// is a comparison of digests and one look-up.
    ///
    /// # Errors
    /// [`RefitError`] for layouts that cannot be joined, peers that cannot be reached and memory that cannot be had;
    /// the target comes back as it was.
    pub fn prepare(self, publications: &[Publication]) -> Result<Prepared<T>, Failed<Self>> {
        prepare(self.0, publications, false)
            .map_err(|(error, inner)| Failed { error, state: Self(inner) })
    }
}

impl<T: Transport> InvalidTarget<T> {
    /// Makes ready to pull again, as [`Target::prepare`] does.
    ///
    /// # Errors
    /// As [`Target::prepare`]; the target stays invalid.
    pub fn prepare(self, publications: &[Publication]) -> Result<Prepared<T>, Failed<Self>> {
        prepare(self.0, publications, true)
            .map_err(|(error, inner)| Failed { error, state: Self(inner) })
    }

    /// Declares the parameters whole after the engine has loaded every one of them by other means.
    #[must_use]
    pub fn reloaded(mut self) -> Target<T> {
        self.0.installed = None;
        Target(self.0)
    }

    /// Every live parameter, for the engine to load its own values into.
    pub fn params_mut(&mut self) -> impl Iterator<Item = (&str, &mut Memory)> {
        self.0.layout.params().iter().map(|param| param.name().as_ref()).zip(&mut self.0.live)
    }
}

/// What [`Prepared::cancel`] gives back.
#[derive(Debug)]
pub enum Cancelled<T: Transport> {
    /// The target was whole before and still is.
    Whole(Target<T>),
    /// The target was a mix before and still is.
    Invalid(InvalidTarget<T>),
}

impl<T: Transport> Prepared<T> {
    /// The program that will run.
    #[must_use]
    pub fn program(&self) -> &Program {
        &self.refit.program
    }

    /// Goes back without moving a byte.
    #[must_use]
    pub fn cancel(self) -> Cancelled<T> {
        let Refit { inner, invalid, .. } = self.refit;
        if invalid {
            Cancelled::Invalid(InvalidTarget(inner))
        } else {
            Cancelled::Whole(Target(inner))
        }
    }

    /// Posts the first reads: those of the headers or, when it is [known](Self::expecting) what they have to say, of the
    /// first wave. In [`Mode::Direct`] live parameters change from here on.
    ///
    /// # Errors
    /// [`RefitError::Transport`] when a peer's reads could not be posted; those that were have settled.
    pub fn pull(self) -> Result<Pulling<T>, Failed<Unfinished<T>>> {
        let Self { mut refit, lease } = self;
        refit.started = Instant::now();
        match refit.begin(lease) {
            Reading::Stopped(stop) => Err(refit.stopped(stop)),
            reading => {
                refit.make_ready_to_land();
                Ok(Pulling { reading: Some(reading), refit })
            }
        }
    }
}

impl<T: Transport> Pulling<T> {
    /// Whether every read has settled, those of the headers included. Never waits: it looks at the wave that is under way
    /// and, if that has arrived, lands it and posts the next.
    pub fn poll(&mut self) -> Progress {
        match self.reading.take() {
            Some(Reading::UnderWay(pull)) => self.reading = Some(self.refit.drive(pull)),
            other => self.reading = other,
        }
        match self.reading {
            Some(Reading::UnderWay(_)) => Progress::Pending,
            Some(Reading::Arrived(_)) => Progress::Done,
            Some(Reading::Stopped(_)) | None => Progress::Failed,
        }
    }

    /// Waits until every read has settled, at most until `deadline`.
    ///
    /// # Errors
    /// [`RefitError::Deadline`] gives the pull back, still owning its memory; [`RefitError::Transport`] means that
    /// every read has settled and at least one failed; [`RefitError::NotHost`] and [`RefitError::Land`] that a wave
    /// could not be landed. [`RefitError::Torn`], [`RefitError::StaleIncarnation`], [`RefitError::NoHeader`] and
    /// [`RefitError::MixedVersions`] mean that every read has settled and what was read may not be used.
    pub fn wait(self, deadline: Instant) -> Result<Pulled<T>, Failed<Unfinished<T>>> {
        let Self { mut reading, mut refit } = self;
        let mut patience = Patience::new();
        loop {
            reading = match reading {
                Some(Reading::UnderWay(pull)) => Some(match refit.drive(pull) {
                    Reading::UnderWay(pull) if !patience.pause(deadline) => {
                        Reading::Stopped(Stop::Deadline(Box::new(pull)))
                    }
                    reading => reading,
                }),
                Some(Reading::Arrived(lease)) => return Ok(Pulled { refit, lease }),
                Some(Reading::Stopped(stop)) => return Err(refit.stopped(stop)),
                None => unreachable!("methods leave the reading behind them"),
            };
        }
    }
}

impl<T: Transport> Pulled<T> {
    /// Copies what the last wave staged to its place, converting elements on the way, and writes the fills.
    ///
    /// # Errors
    /// [`RefitError::NotHost`] for parameters the processor cannot write, [`RefitError::Device`] from the device that
    /// lands.
    pub fn land(self) -> Result<Landed<T>, Failed<InvalidTarget<T>>> {
        let Self { mut refit, lease } = self;
        match refit.land(&lease).and_then(|()| refit.fill()) {
            Ok(()) => Ok(Landed { refit, lease }),
            Err(error) => {
                refit.end_landings();
                Err(Failed { error, state: InvalidTarget(refit.inner) })
            }
        }
    }
}

impl<T: Transport> Landed<T> {
    /// Declares the parameters whole and returns the staging memory to the pool.
    pub fn install(self) -> Installed<T> {
        let Self { mut refit, lease } = self;
        drop(lease);
        let plan = &refit.inner.planned[0].plan;
        refit.inner.installed =
            refit.report.version.map(|version| Installation { version, plan: plan.clone() });
        refit.report.total = refit.began.elapsed();
        Installed { inner: refit.inner, report: refit.report }
    }
}

impl<T: Transport> Refit<T> {
    /// Time is up, and these batches are under way.
    fn late(&self, batches: impl Iterator<Item = usize>) -> RefitError {
        let of_batches = batch_ranks(&self.program);
        let mut ranks: Vec<u32> =
            batches.filter_map(|batch| of_batches.get(batch).copied()).collect();
        ranks.sort_unstable();
        ranks.dedup();
        let agent = self.inner.transport.agent().to_owned();
        RefitError::Deadline { ranks, agent, waited: self.started.elapsed() }
    }

    /// What reading that did not end well leaves behind.
    fn stopped(mut self, stop: Stop<T>) -> Failed<Unfinished<T>> {
        // Whether the wave at hand may have written something.
        let (error, live, touched) = match stop {
            Stop::Landing(error) | Stop::Version(error) => (error, None, true),
            Stop::Deadline(pull) => {
                let error = self.late(pull.under_way());
                let reading = Some(Reading::UnderWay(*pull));
                let state = Unfinished::Pulling(Box::new(Pulling { reading, refit: self }));
                return Failed { error, state };
            }
            Stop::Pull(PullError::Lost { errors, bytes: _ }) => {
                return Failed { error: first(errors), state: Unfinished::Lost };
            }
            Stop::Pull(PullError::Failed { errors, live, .. }) => (first(errors), Some(live), true),
            Stop::Pull(PullError::NotOwned { batch, len, live, .. }) => {
                (RefitError::NotOwned { batch, len }, Some(live), false)
            }
            Stop::Pull(PullError::Overlap { first, second, live, .. }) => {
                (RefitError::Overlap { first, second }, Some(live), false)
            }
            Stop::Pull(_) => {
                let what = "a pull error that this release does not know";
                let error = RefitError::Unsupported { what };
                return Failed { error, state: Unfinished::Lost };
            }
        };
        if let Some(live) = live {
            self.inner.live = live;
        }
        self.end_landings();
        // Earlier waves have landed; in staged mode there are none.
        let wrote_live = ((touched && self.phase != Phase::Before) || self.wave > 0)
            && self.inner.options.lower.mode == Mode::Direct;
        let state = if wrote_live || self.invalid {
            Unfinished::Invalid(InvalidTarget(self.inner))
        } else {
            Unfinished::Whole(Target(self.inner))
        };
        Failed { error, state }
    }
}

fn first(errors: Vec<TransportError>) -> RefitError {
    errors.into_iter().next().map_or(
        RefitError::Unsupported { what: "a pull that failed without a reason" },
        RefitError::Transport,
    )
}
