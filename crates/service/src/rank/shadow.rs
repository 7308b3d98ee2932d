use std::collections::BTreeMap;
use std::time::Instant;

use refit::pool::{Memory, PoolStats};
use refit::translate::PostAction;
use refit::transport::Transport;
use refit::{DigestRequest, Digests, Expected, Publication, RefitError, Target};

use super::RankError;
use super::engine::Engine;
use super::failover::Failover;
use super::pulls::Pulls;
use crate::puller::{Cause, PullFailure, Puller, Reading};
use crate::rendezvous::Rendezvous;
use crate::replica::{InstallError, Stage};
use crate::seat::{Reseat, Seat};
use crate::source::{SourceError, SourceRank};
use crate::stats::PullTotals;
use crate::stop::Stop;
use crate::worker::{BuildError, Quarantine};

/// A target rank that reads into a second set of parameters, and copies them to the live ones when it is told to. The
/// engine serves the old version until then, and live addresses never change.
#[derive(Debug)]
pub struct Shadow<T: Transport, E: Engine> {
    pulls: Pulls<T>,
    /// In the order of the layout, as the shadow's parameters are.
    live: Vec<Memory>,
    names: Vec<String>,
    post_actions: Vec<PostAction>,
    engine: E,
    copier: Copier,
    failover: Option<Failover<T>>,
    /// The version in the shadow, if it is whole.
    staged: Option<u64>,
    totals: PullTotals,
}

/// What copies.
#[derive(Debug)]
enum Copier {
    Host,
    #[cfg(feature = "cuda")]
    Device(refit::pool::cuda::Device),
}

impl<T: Transport, E: Engine> Shadow<T, E> {
    /// A rank that reads into `shadow`, a target of a second set of parameters, and copies to `live`, which has the same
    /// names and sizes. `post_actions` are what the engine does behind that.
    ///
    /// # Errors
    /// [`RefitError::NoMemory`], [`RefitError::StrayMemory`], [`RefitError::Size`] when the two differ.
    pub fn new(
        shadow: Target<T>,
        live: impl IntoIterator<Item = (String, Memory)>,
        post_actions: Vec<PostAction>,
        engine: E,
    ) -> Result<Self, RefitError> {
        let rank = shadow.layout().rank();
        let mut given: Vec<(String, Memory)> = live.into_iter().collect();
        given.sort_by(|a, b| a.0.cmp(&b.0));
        if let Some(pair) = given.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(RefitError::StrayMemory { rank, param: pair[0].0.clone() });
        }
        let (mut names, mut live) = (Vec::new(), Vec::new());
        for (param, staged) in shadow.params() {
            let name = || param.to_owned();
            let at = given.binary_search_by(|(given, _)| given.as_str().cmp(param));
            let Ok(at) = at else { return Err(RefitError::NoMemory { rank, param: name() }) };
            let (_, memory) = given.remove(at);
            if memory.len() != staged.len() {
                let (memory, layout) = (memory.len() as u64, staged.len() as u64);
                return Err(RefitError::Size { rank, param: name(), memory, layout });
            }
            names.push(name());
            live.push(memory);
        }
        if let Some((param, _)) = given.pop() {
            return Err(RefitError::StrayMemory { rank, param });
        }
        let pulls = Pulls::new(shadow);
        let copier = Copier::Host;
        Ok(Self {
            pulls,
            live,
            names,
            post_actions,
            engine,
            copier,
            failover: None,
            staged: None,
            totals: PullTotals::default(),
        })
    }

    /// Copies within this device, where parameters in its memory are.
    #[cfg(feature = "cuda")]
    #[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
    #[must_use]
    pub fn with_device(mut self, device: refit::pool::cuda::Device) -> Self {
        self.copier = Copier::Device(device);
        self
    }

    /// Goes on in other memory when a peer falls silent in the middle of a pull, or the transport can no longer watch its
    /// reads: they may write the shadow for as long as the peer likes, and there may be another to read.
    ///
    /// `build` makes a target like the first one, with an agent, a pool and parameters of its own; its argument counts
    /// its calls, for agents whose names do not carry an incarnation. It is called on a thread of its own, for which nobody waits
    /// beyond a deadline. The old target is kept by the
    /// [reaper](crate::worker::reaper) until its reads have settled, and destroyed then, or leaked if they never can. What is kept at a time has to
    /// find room in `quarantine`; otherwise nothing is replaced, and a refresh ends with
    /// [`Ended::Quarantined`](crate::reader::Ended::Quarantined).
    #[must_use]
    pub fn with_failover(
        mut self,
        quarantine: Quarantine,
        build: impl FnMut(u64) -> Result<Target<T>, BuildError> + Send + 'static,
    ) -> Self {
        self.failover = Some(Failover::new(quarantine, build));
        self
    }

    /// What waits here comes to an end when `stop` is told.
    #[must_use]
    pub fn with_stop(mut self, stop: Stop) -> Self {
        self.pulls.set_stop(stop);
        self
    }

    /// The version in the shadow, if it is whole.
    #[must_use]
    pub fn staged(&self) -> Option<u64> {
        self.staged
    }

    /// What the pool of its target holds.
    #[must_use]
    pub fn pool_stats(&self) -> PoolStats {
        self.pulls.pool_stats()
    }

    /// What its pulls came to.
    #[must_use]
    pub fn totals(&self) -> &PullTotals {
        &self.totals
    }

    /// Every live parameter, by name.
    pub fn params(&self) -> impl Iterator<Item = (&str, &Memory)> {
        self.names.iter().map(String::as_str).zip(&self.live)
    }

    /// The engine.
    #[must_use]
    pub fn engine(&self) -> &E {
        &self.engine
    }
}

impl<T: Transport, E: Engine> Puller for Shadow<T, E> {
    fn pull(&mut self, reading: &Reading<'_>, deadline: Instant) -> Result<(), PullFailure> {
        self.staged = None;
        let totals = &mut self.totals;
        let pulled = self.pulls.pull(reading, deadline, |installed| {
            // Nothing is derived from a shadow.
            let (target, report) = installed.refreshed();
            totals.add(&report);
            Ok::<_, (_, std::convert::Infallible)>(target)
        });
        let pulled = pulled.map_err(|failure| match failure.cause {
            // Another takes over.
            Cause::Lost if self.failover.is_some() => {
                PullFailure::new(Cause::Failed, failure.reason)
            }
            _ => failure,
        })?;
        match pulled {
            Ok(()) => self.staged = Some(reading.version),
            Err(never) => match never {},
        }
        Ok(())
    }

    /// Waits for reads that are out only if the same group is to be read again, or no other memory can take over.
    fn make_ready(&mut self, group: &str, deadline: Instant) -> Result<(), PullFailure> {
        let Self { pulls, live, names, failover: Some(failover), .. } = self else {
            return self.pulls.settle(deadline);
        };
        // A fresh agent would wait for the same peer, unless it has been waited for already.
        let waits = pulls.silent() == Some(group) && !failover.is_coming();
        let wait = if waits { deadline } else { Instant::now() };
        match pulls.settle(wait) {
            // Nothing is begun in a process that is to end.
            Err(PullFailure { cause: Cause::Late | Cause::Lost, .. }) if !pulls.is_told() => {
                pulls.fail_over(failover, deadline, |fresh| fits(fresh, names, live))
            }
            settled => {
                failover.let_go();
                settled
            }
        }
    }

    fn quarantined_bytes(&self) -> u64 {
        let retired = self.failover.as_ref().map_or(0, Failover::kept_bytes);
        self.pulls.kept_bytes().saturating_add(retired)
    }
}

impl<T: Transport, E: Engine> Stage for Shadow<T, E> {
    fn install(&mut self, version: u64) -> Result<(), InstallError> {
        let Some(staged) = self.pulls.params().filter(|_| self.staged == Some(version)) else {
            return Err(InstallError::new(RankError::NotStaged { version }));
        };
        let stopped = |what| move |source| InstallError::new(RankError::Engine { what, source });
        self.engine.pause().map_err(stopped("pause"))?;
        // By name: what is lent comes before what is not.
        let staged: BTreeMap<&str, &Memory> = staged.collect();
        let from = self.names.iter().map(|name| {
            let missing = || InstallError::new(RankError::Missing { param: name.clone() });
            staged.get(name.as_str()).copied().ok_or_else(missing)
        });
        let from = from.collect::<Result<Vec<&Memory>, _>>()?;
        self.copier
            .copy(from.into_iter().zip(&mut self.live))
            .map_err(|source| InstallError::new(RankError::Copy { source }))?;
        let span = tracing::debug_span!("post_install", version);
        let _entered = span.enter();
        let mut params = self.names.iter().map(String::as_str).zip(&self.live);
        self.engine.derive(&self.post_actions, &mut params).map_err(stopped("derive"))
    }

    fn resume(&mut self, version: u64) {
        self.engine.resume(version);
    }
}

/// Has no entries of its own.
impl<R: Rendezvous, T: Transport, E: Engine> Reseat<R> for Shadow<T, E> {
    fn reseat(&mut self, _: &Seat<R>, _: Instant) -> Result<(), SourceError> {
        Ok(())
    }
}

impl<T: Transport, E: Engine> SourceRank for Shadow<T, E> {
    fn publication(&self) -> Result<Publication, RefitError> {
        self.pulls.publication()
    }

    fn digests(&self, request: &DigestRequest) -> Result<Digests, RefitError> {
        self.pulls.digests(request)
    }

    fn begin(&mut self) -> Result<(), RefitError> {
        self.pulls.take_back()
    }

    /// Lends what it holds.
    fn commit(&mut self, version: u64) -> Result<Expected, RefitError> {
        if self.staged != Some(version) {
            return Err(RefitError::NothingInstalled);
        }
        self.pulls.lend()
    }
}

/// Whether a target has parameters of these names and sizes, in this order.
fn fits<T: Transport>(
    fresh: &Target<T>,
    names: &[String],
    live: &[Memory],
) -> Result<(), RefitError> {
    let rank = fresh.layout().rank();
    let mut params = fresh.params();
    for (name, live) in names.iter().zip(live) {
        match params.next() {
            Some((param, memory)) if param == name => {
                let (memory, layout) = (memory.len() as u64, live.len() as u64);
                if memory != layout {
                    return Err(RefitError::Size { rank, param: name.clone(), memory, layout });
                }
            }
            _ => return Err(RefitError::NoMemory { rank, param: name.clone() }),
        }
    }
    match params.next() {
        Some((param, _)) => Err(RefitError::StrayMemory { rank, param: param.to_owned() }),
        None => Ok(()),
    }
}

type CopyError = Box<dyn std::error::Error + Send + Sync>;

impl Copier {
    /// Copies memories, each to one of its length.
    fn copy<'a>(
        &self,
        pairs: impl Iterator<Item = (&'a Memory, &'a mut Memory)>,
    ) -> Result<(), CopyError> {
        let mut on_device = Vec::new();
        for (from, into) in pairs {
            match from.host_bytes() {
                Some(bytes) if into.kind() == from.kind() => {
                    let into =
                        into.host_bytes_mut().ok_or("memory that calls itself the host's")?;
                    // Past the caches: the engine reads all of them next, not this one.
                    refit::pool::copy_runs(bytes, into, bytes.len(), |copy| copy(0, 0));
                }
                _ => on_device.push((from, into)),
            }
        }
        if on_device.is_empty() { Ok(()) } else { self.copy_on_device(on_device) }
    }

    #[cfg(feature = "cuda")]
    fn copy_on_device(&self, pairs: Vec<(&Memory, &mut Memory)>) -> Result<(), CopyError> {
        match self {
            Self::Device(device) => Ok(refit::pool::cuda::copy_all(device, pairs)?),
            Self::Host => Err("some of it is a device's: give the rank that device \
                               (`Shadow::with_device`)"
                .into()),
        }
    }

    #[cfg(not(feature = "cuda"))]
    fn copy_on_device(&self, _: Vec<(&Memory, &mut Memory)>) -> Result<(), CopyError> {
        match self {
            Self::Host => Err("some of it is a device's; build with feature `cuda`".into()),
        }
    }
}
