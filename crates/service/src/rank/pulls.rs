//! A target in whatever state its pulls leave it, and the thread that calls into its transport.
//!
//! A connection may take as long as the peer likes, and a post may copy. So both happen on a thread of the target's own, and
//! whoever pulls has an answer at the deadline: a target that is not back by then is *away*, and is treated as one whose
//! reads are out.

mod held;

use std::sync::Arc;
use std::time::{Duration, Instant};

use refit::pool::{Memory, PoolStats};
use refit::transport::{Patience, Progress, Transport, TransportError, TransportPool};
use refit::{
    Cancelled, DigestRequest, Digests, Expected, Failed, Installed, InvalidTarget, Prepared,
    Publication, Pulled, RefitError, Settling, Target,
};

use self::held::{Away, Held, Left, Out, left, returned};
use super::RankError;
use super::failover::Failover;
use super::lane::{Lane, Ran};
use crate::puller::{Cause, PullFailure, Reading};
use crate::stop::Stop;
use crate::worker::{Agent, GRACE, Quarantine, Standing};

/// How long a target that is dropped waits for reads that are out.
const LINGER: Duration = Duration::from_secs(2);

/// A target, and what goes with it when another takes over.
#[derive(Debug)]
pub(super) struct Pulls<T: Transport> {
    held: Held<T>,
    /// The agent refuses to go on, though the target is here.
    suspect: bool,
    lane: Lane,
    stop: Option<Stop>,
    params_bytes: u64,
    pool: TransportPool<T>,
    /// Dropped last: what the others hold is registered with it.
    transport: Arc<T>,
}

impl<T: Transport> Pulls<T> {
    pub(super) fn new(target: Target<T>) -> Self {
        Self {
            suspect: false,
            lane: Lane::default(),
            stop: None,
            params_bytes: target.params().map(|(_, memory)| memory.len() as u64).sum(),
            pool: target.pool().clone(),
            transport: Arc::clone(target.transport()),
            held: Held::Whole(target),
        }
    }

    /// What waits here comes to an end when `stop` is told; those that take over have it too.
    pub(super) fn set_stop(&mut self, stop: Stop) {
        self.stop = Some(stop);
    }

    /// Whether the process is to end.
    pub(super) fn is_told(&self) -> bool {
        self.stop.as_ref().is_some_and(Stop::is_told)
    }

    /// The parameters, if they are whole, by name and in no particular order.
    pub(super) fn params(&self) -> Option<Box<dyn Iterator<Item = (&str, &Memory)> + '_>> {
        match &self.held {
            Held::Whole(target) => Some(Box::new(target.params())),
            Held::Lent(lent) => Some(Box::new(lent.params())),
            _ => None,
        }
    }

    /// Lets others read, under the target's own rank.
    pub(super) fn lend(&mut self) -> Result<Expected, RefitError> {
        self.take_back()?;
        match std::mem::replace(&mut self.held, Held::Lost) {
            Held::Whole(target) => {
                let rank = target.layout().rank();
                match target.lend(rank) {
                    Ok(lent) => {
                        let offered = lent.offered();
                        self.held = Held::Lent(Box::new(lent));
                        offered.ok_or(RefitError::NothingInstalled)
                    }
                    Err(Failed { error, state }) => {
                        self.held = Held::Whole(state);
                        Err(error)
                    }
                }
            }
            other => {
                self.held = other;
                Err(RefitError::NothingInstalled)
            }
        }
    }

    /// Lets nobody read any more: what they read at this moment they discard.
    pub(super) fn take_back(&mut self) -> Result<(), RefitError> {
        match std::mem::replace(&mut self.held, Held::Lost) {
            Held::Lent(lent) => match lent.take_back() {
                Ok(target) => self.held = Held::Whole(target),
                Err(Failed { error, state }) => {
                    self.held = Held::Lent(state);
                    return Err(error);
                }
            },
            other => self.held = other,
        }
        Ok(())
    }

    /// Digests of what is lent.
    pub(super) fn digests(&self, request: &DigestRequest) -> Result<Digests, RefitError> {
        match &self.held {
            Held::Lent(lent) => lent.digests(request),
            _ => Err(RefitError::NothingInstalled),
        }
    }

    /// Where what is lent can be read.
    pub(super) fn publication(&self) -> Result<Publication, RefitError> {
        match &self.held {
            Held::Lent(lent) => lent.publication(),
            _ => Err(RefitError::NothingInstalled),
        }
    }

    /// Reads everything and lands it. What is made of `installed` is what the target is from then on.
    pub(super) fn pull<E>(
        &mut self,
        reading: &Reading<'_>,
        deadline: Instant,
        finish: impl FnOnce(Installed<T>) -> Result<Target<T>, (InvalidTarget<T>, E)>,
    ) -> Result<Result<(), E>, PullFailure> {
        let prepared = {
            let span = tracing::debug_span!("transfer_planning", group = reading.group);
            let _entered = span.enter();
            self.take_back().map_err(failure)?;
            self.prepare(reading, deadline)?
        };
        let asked = reading.vouch.map(|vouch| (vouch, prepared.digest_request()));
        if let Some((vouch, request)) = &asked
            && let Err(failure) = vouch.ask(request)
        {
            self.held = prepared.cancel().into();
            return Err(failure);
        }
        let pulled = {
            let span = tracing::debug_span!("wire_transfer", group = reading.group);
            let _entered = span.enter();
            self.read(prepared, reading.group, deadline)?
        };
        let landed = {
            let span = tracing::debug_span!("transformation", group = reading.group);
            let _entered = span.enter();
            pulled.land()
        };
        let landed = match (landed, asked) {
            (Ok(landed), Some((vouch, request))) => match vouch.answers(&request, deadline) {
                Ok(Some(answers)) => landed.verify(&answers),
                Ok(None) => Ok(landed),
                Err(failure) => {
                    self.held = Held::Mixed(landed.install().stale());
                    return Err(failure);
                }
            },
            (landed, _) => landed,
        };
        match landed {
            Err(Failed { error, state }) => {
                self.held = Held::Mixed(state);
                Err(failure(error))
            }
            Ok(landed) => match finish(landed.install()) {
                Ok(target) => {
                    self.held = Held::Whole(target);
                    Ok(Ok(()))
                }
                Err((target, error)) => {
                    self.held = Held::Mixed(target);
                    Ok(Err(error))
                }
            },
        }
    }

    fn prepare(
        &mut self,
        reading: &Reading<'_>,
        deadline: Instant,
    ) -> Result<Prepared<T>, PullFailure> {
        if self.suspect {
            return Err(self.lost());
        }
        // First: from here on the target has to come back from somewhere.
        self.lane.start().map_err(|error| PullFailure::new(Cause::Failed, error))?;
        let target = match std::mem::replace(&mut self.held, Held::Lost) {
            Held::Whole(target) => Cancelled::Whole(target),
            Held::Mixed(target) => Cancelled::Invalid(target),
            Held::Lost => return Err(self.lost()),
            Held::Out(out) => {
                let late = out.late();
                self.held = Held::Out(out);
                return Err(late);
            }
            Held::Away(away) => {
                let late = self.still_away(&away);
                self.held = Held::Away(away);
                return Err(late);
            }
            // It has just been taken back.
            Held::Lent(_) => return Err(self.lost()),
        };
        let (publications, expected) =
            (Arc::clone(reading.publications), reading.expected.to_vec());
        let work = move || {
            let prepared = match target {
                Cancelled::Whole(target) => target
                    .prepare(&publications)
                    .map_err(|Failed { error, state }| left(error, Held::Whole(state))),
                Cancelled::Invalid(target) => target
                    .prepare(&publications)
                    .map_err(|Failed { error, state }| left(error, Held::Mixed(state))),
            };
            prepared.and_then(|prepared| {
                prepared
                    .expecting(&expected)
                    .map_err(|Failed { error, state }| left(error, state.cancel().into()))
            })
        };
        self.away(reading.group, deadline, work, |prepared| prepared.cancel().into())
    }

    /// Posts the reads and waits for them.
    fn read(
        &mut self,
        prepared: Prepared<T>,
        group: &str,
        deadline: Instant,
    ) -> Result<Pulled<T>, PullFailure> {
        let silent = group.to_owned();
        let work = move || {
            let arrived = prepared.pull().and_then(|pulling| pulling.wait(deadline));
            arrived.map_err(|Failed { error, state }| left(error, Held::after(state, &silent)))
        };
        // Nobody is there any more to say whether it may be used.
        self.away(group, deadline, work, |pulled| match pulled.land() {
            Ok(landed) => Held::Mixed(landed.install().stale()),
            Err(Failed { state, .. }) => Held::Mixed(state),
        })
    }

    /// Has the target's thread do something to it, and waits for that, a little beyond the deadline. `unwanted` says what is
    /// left of a success that comes later.
    fn away<O: Send + 'static>(
        &mut self,
        group: &str,
        deadline: Instant,
        work: impl FnOnce() -> Result<O, Left<T>> + Send + 'static,
        unwanted: impl Fn(O) -> Held<T> + Send + 'static,
    ) -> Result<O, PullFailure> {
        let since = Instant::now();
        let until = deadline.checked_add(GRACE).unwrap_or(deadline);
        match self.lane.run(until, self.stop.as_ref(), work) {
            Ran::Done(Ok(output)) => Ok(output),
            Ran::Done(Err(left)) => {
                let (error, held) = *left;
                self.held = held;
                let failure = failure(error);
                self.suspect |= failure.cause == Cause::Lost;
                Err(failure)
            }
            Ran::Gone => {
                self.held = Held::Lost;
                let agent = self.transport.agent().to_owned();
                Err(PullFailure::new(Cause::Lost, RankError::Panicked { agent }))
            }
            Ran::Away(answers) => {
                let back = move || returned(&answers, &unwanted);
                let away = Away { group: group.to_owned(), since, back: Box::new(back) };
                let reason = self.still_away(&away);
                self.held = Held::Away(away);
                Err(reason)
            }
        }
    }

    /// The group whose reads are out.
    pub(super) fn silent(&self) -> Option<&str> {
        match &self.held {
            Held::Out(out) => Some(&out.group),
            Held::Away(away) => Some(&away.group),
            _ => None,
        }
    }

    /// Bytes that cannot be used because reads are out, or may be.
    pub(super) fn kept_bytes(&self) -> u64 {
        match &self.held {
            Held::Whole(_) | Held::Lent(_) | Held::Mixed(_) if !self.suspect => 0,
            _ => self.params_bytes.saturating_add(self.pool.stats().bytes),
        }
    }

    /// What the pool holds.
    pub(super) fn pool_stats(&self) -> PoolStats {
        self.pool.stats()
    }

    /// Waits until no reads are out. What they brought is not used: their sources may have gone on since.
    pub(super) fn settle(&mut self, deadline: Instant) -> Result<(), PullFailure> {
        let mut patience = Patience::for_the_silent();
        while self.look() == Progress::Pending {
            let until = self.stop.as_ref().map_or(deadline, |stop| stop.waits_until(deadline));
            if patience.pause(until) {
                continue;
            }
            return Err(match &self.held {
                Held::Away(away) => self.still_away(away),
                Held::Out(out) => out.late(),
                _ => continue,
            });
        }
        if self.suspect || matches!(self.held, Held::Lost) { Err(self.lost()) } else { Ok(()) }
    }

    /// Moves on what is under way, waits for nobody, and says whether something still is.
    fn look(&mut self) -> Progress {
        loop {
            self.held = match std::mem::replace(&mut self.held, Held::Lost) {
                Held::Out(mut out) => {
                    if out.parked.poll() == Progress::Pending {
                        self.held = Held::Out(out);
                        return Progress::Pending;
                    }
                    let Out { group, parked } = *out;
                    match parked.settle() {
                        Settling::Parked(parked) => {
                            self.held = Held::Out(Box::new(Out { group, parked: *parked }));
                            return Progress::Pending;
                        }
                        Settling::Invalid(target) => Held::Mixed(target),
                        Settling::Whole(target) => Held::Whole(target),
                        Settling::Lost(error) => {
                            tracing::error!(%error, agent = self.transport.agent(), "reads are lost");
                            Held::Lost
                        }
                    }
                }
                Held::Away(mut away) => match (away.back)() {
                    // It may have left reads behind.
                    Some(held) => held,
                    None => {
                        self.held = Held::Away(away);
                        return Progress::Pending;
                    }
                },
                here => {
                    self.held = here;
                    return Progress::Done;
                }
            };
        }
    }

    /// Has a fresh target take over, if it is there by the deadline and before the process is to end, and `fits` finds nothing
    /// wrong with it. The old one is kept until its reads have settled.
    pub(super) fn fail_over(
        &mut self,
        failover: &mut Failover<T>,
        deadline: Instant,
        fits: impl FnOnce(&Target<T>) -> Result<(), RefitError>,
    ) -> Result<(), PullFailure> {
        let fresh = failover.build(self.kept_bytes(), deadline, self.stop.as_ref())?;
        fits(&fresh).map_err(failure)?;
        tracing::warn!(
            group = self.silent(),
            agent = self.transport.agent(),
            "a fresh agent takes over"
        );
        let mut fresh = Self::new(fresh);
        fresh.stop = self.stop.clone();
        failover.retire(std::mem::replace(self, fresh));
        Ok(())
    }

    fn still_away(&self, away: &Away<T>) -> PullFailure {
        let reason = RankError::Away {
            agent: self.transport.agent().to_owned(),
            group: away.group.clone(),
            bytes: self.kept_bytes(),
            age: away.since.elapsed(),
        };
        PullFailure::new(Cause::Late, reason)
    }

    fn lost(&self) -> PullFailure {
        let agent = self.transport.agent().to_owned();
        PullFailure::new(Cause::Lost, RankError::Lost { agent })
    }
}

/// Waits a while for what is under way, and leaves the rest to the [reaper](crate::worker::reaper). A process that ends in the
/// middle of it cuts a connection on which its peer may have an answer to send, and UCX may abort that peer: a trainer that
/// was only stopped.
impl<T: Transport> Drop for Pulls<T> {
    fn drop(&mut self) {
        let now = Instant::now();
        let until = now.checked_add(LINGER).unwrap_or(now);
        let until = self.stop.as_ref().map_or(until, |stop| stop.reads_until(until));
        let mut patience = Patience::for_the_silent();
        while self.poll() == Standing::Restless {
            if patience.pause(until) {
                continue;
            }
            let rest = Self {
                held: std::mem::replace(&mut self.held, Held::Lost),
                suspect: self.suspect,
                lane: std::mem::take(&mut self.lane),
                stop: None,
                params_bytes: self.params_bytes,
                pool: self.pool.clone(),
                transport: Arc::clone(&self.transport),
            };
            return Quarantine::new(self.transport.agent(), u64::MAX).retire(rest);
        }
    }
}

/// A target that another has taken over from.
impl<T: Transport> Agent for Pulls<T> {
    fn name(&self) -> String {
        self.transport.agent().to_owned()
    }

    fn poll(&mut self) -> Standing {
        match self.look() {
            Progress::Pending => Standing::Restless,
            _ if matches!(self.held, Held::Lost) => Standing::Lost,
            _ if self.transport.unsettled() > 0 => Standing::Restless,
            _ => Standing::Quiet,
        }
    }

    fn bytes(&self) -> u64 {
        self.kept_bytes()
    }
}

/// What kind of failure an error of a refit is.
fn failure(error: RefitError) -> PullFailure {
    let cause = match &error {
        RefitError::Torn { .. } | RefitError::MixedVersions { .. } => Cause::Torn,
        RefitError::StaleIncarnation { .. } | RefitError::NoHeader { .. } => Cause::Stale,
        RefitError::Deadline { .. } => Cause::Late,
        RefitError::Corrupt { .. } => Cause::Damaged,
        RefitError::Transport(TransportError::Connect { .. }) => Cause::Vanished,
        RefitError::Transport(TransportError::Lost { .. } | TransportError::Suspect { .. }) => {
            Cause::Lost
        }
        RefitError::Layout(_)
        | RefitError::Plan(_)
        | RefitError::Lower(_)
        | RefitError::Publication(_)
        | RefitError::MissingPublication { .. }
        | RefitError::UnknownSourceParam { .. }
        | RefitError::NotHost { .. }
        | RefitError::Unsupported { .. } => Cause::Refused,
        _ => Cause::Failed,
    };
    PullFailure::new(cause, error)
}
