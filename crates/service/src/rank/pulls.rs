use std::time::Instant;

use refit::pool::Memory;
use refit::transport::{Patience, Progress, Transport, TransportError};
use refit::{
    Cancelled, DigestRequest, Digests, Expected, Failed, Installed, InvalidTarget, Lent,
    ParkedTarget, Publication, RefitError, Settling, Target, Unfinished,
};

use super::RankError;
use super::failover::Failover;
use crate::puller::{Cause, PullFailure, Reading};

/// A target in whatever state the last pull left it.
#[derive(Debug)]
pub(super) struct Pulls<T: Transport>(Held<T>);

#[derive(Debug)]
enum Held<T: Transport> {
    Whole(Target<T>),
    /// Whole, and others may read it.
    Lent(Box<Lent<T>>),
    Mixed(InvalidTarget<T>),
    Out(Box<Out<T>>),
    /// Reads are out for ever.
    Lost,
}

/// Reads of this group are out.
#[derive(Debug)]
struct Out<T: Transport> {
    group: String,
    parked: ParkedTarget<T>,
}

impl<T: Transport> Out<T> {
    fn late(&self) -> PullFailure {
        let Self { group, parked } = self;
        let (group, bytes, age) = (group.clone(), parked.bytes(), parked.age());
        PullFailure::new(Cause::Late, RankError::Out { group, bytes, age })
    }
}

impl<T: Transport> Pulls<T> {
    pub(super) fn new(target: Target<T>) -> Self {
        Self(Held::Whole(target))
    }

    /// The parameters, if they are whole, by name and in no particular order.
    pub(super) fn params(&self) -> Option<Box<dyn Iterator<Item = (&str, &Memory)> + '_>> {
        match &self.0 {
            Held::Whole(target) => Some(Box::new(target.params())),
            Held::Lent(lent) => Some(Box::new(lent.params())),
            _ => None,
        }
    }

    /// Lets others read, under the target's own rank.
    pub(super) fn lend(&mut self) -> Result<Expected, RefitError> {
        self.take_back()?;
        match std::mem::replace(&mut self.0, Held::Lost) {
            Held::Whole(target) => {
                let rank = target.layout().rank();
                match target.lend(rank) {
                    Ok(lent) => {
                        let offered = lent.offered();
                        self.0 = Held::Lent(Box::new(lent));
                        offered.ok_or(RefitError::NothingInstalled)
                    }
                    Err(Failed { error, state }) => {
                        self.0 = Held::Whole(state);
                        Err(error)
                    }
                }
            }
            other => {
                self.0 = other;
                Err(RefitError::NothingInstalled)
            }
        }
    }

    /// Lets nobody read any more: what they read at this moment they discard.
    pub(super) fn take_back(&mut self) -> Result<(), RefitError> {
        match std::mem::replace(&mut self.0, Held::Lost) {
            Held::Lent(lent) => match lent.take_back() {
                Ok(target) => self.0 = Held::Whole(target),
                Err(Failed { error, state }) => {
                    self.0 = Held::Lent(state);
                    return Err(error);
                }
            },
            other => self.0 = other,
        }
        Ok(())
    }

    /// Digests of what is lent.
    pub(super) fn digests(&self, request: &DigestRequest) -> Result<Digests, RefitError> {
        match &self.0 {
            Held::Lent(lent) => lent.digests(request),
            _ => Err(RefitError::NothingInstalled),
        }
    }

    /// Where what is lent can be read.
    pub(super) fn publication(&self) -> Result<Publication, RefitError> {
        match &self.0 {
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
            match std::mem::replace(&mut self.0, Held::Lost) {
                Held::Whole(target) => target
                    .prepare(reading.publications)
                    .map_err(|Failed { error, state }| (error, Held::Whole(state))),
                Held::Mixed(target) => target
                    .prepare(reading.publications)
                    .map_err(|Failed { error, state }| (error, Held::Mixed(state))),
                Held::Out(out) => {
                    let late = out.late();
                    self.0 = Held::Out(out);
                    return Err(late);
                }
                // It has just been taken back.
                Held::Lent(_) | Held::Lost => return Err(lost()),
            }
        };
        let expected = prepared.and_then(|prepared| {
            prepared.expecting(reading.expected).map_err(|Failed { error, state }| {
                let held = match state.cancel() {
                    Cancelled::Whole(target) => Held::Whole(target),
                    Cancelled::Invalid(target) => Held::Mixed(target),
                };
                (error, held)
            })
        });
        let prepared = match expected {
            Ok(prepared) => prepared,
            Err((error, held)) => {
                self.0 = held;
                return Err(failure(error));
            }
        };
        let asked = reading.vouch.map(|vouch| (vouch, prepared.digest_request()));
        if let Some((vouch, request)) = &asked
            && let Err(failure) = vouch.ask(request)
        {
            self.0 = match prepared.cancel() {
                Cancelled::Whole(target) => Held::Whole(target),
                Cancelled::Invalid(target) => Held::Mixed(target),
            };
            return Err(failure);
        }
        let arrived = {
            let span = tracing::debug_span!("wire_transfer", group = reading.group);
            let _entered = span.enter();
            prepared.pull().and_then(|pulling| pulling.wait(deadline))
        };
        let pulled = match arrived {
            Ok(pulled) => pulled,
            Err(Failed { error, state }) => {
                self.0 = Held::after(state, reading.group);
                return Err(failure(error));
            }
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
                    self.0 = Held::Mixed(landed.install().stale());
                    return Err(failure);
                }
            },
            (landed, _) => landed,
        };
        match landed {
            Err(Failed { error, state }) => {
                self.0 = Held::Mixed(state);
                Err(failure(error))
            }
            Ok(landed) => match finish(landed.install()) {
                Ok(target) => {
                    self.0 = Held::Whole(target);
                    Ok(Ok(()))
                }
                Err((target, error)) => {
                    self.0 = Held::Mixed(target);
                    Ok(Err(error))
                }
            },
        }
    }

    /// The group whose reads are out.
    pub(super) fn silent(&self) -> Option<&str> {
        match &self.0 {
            Held::Out(out) => Some(&out.group),
            _ => None,
        }
    }

    /// Bytes that cannot be used because reads are out.
    pub(super) fn kept_bytes(&self) -> u64 {
        match &self.0 {
            Held::Out(out) => out.parked.kept_bytes(),
            _ => 0,
        }
    }

    /// Waits until no reads are out. What they brought is not used: their sources may have gone on since.
    pub(super) fn settle(&mut self, deadline: Instant) -> Result<(), PullFailure> {
        let mut patience = Patience::for_the_silent();
        while let Held::Out(out) = &mut self.0 {
            if out.parked.poll() == Progress::Pending {
                if patience.pause(deadline) {
                    continue;
                }
                return Err(out.late());
            }
            if let Held::Out(out) = std::mem::replace(&mut self.0, Held::Lost) {
                let Out { group, parked } = *out;
                self.0 = match parked.settle() {
                    Settling::Parked(parked) => Held::Out(Box::new(Out { group, parked: *parked })),
                    Settling::Invalid(target) => Held::Mixed(target),
                    Settling::Whole(target) => Held::Whole(target),
                    Settling::Lost(error) => {
                        return Err(PullFailure::new(Cause::Lost, error));
                    }
                };
            }
        }
        if matches!(self.0, Held::Lost) { Err(lost()) } else { Ok(()) }
    }

    /// Has a fresh target take over from one whose reads are out, if `fits` finds nothing wrong with it. The old one is
    /// kept until they have settled.
    pub(super) fn fail_over(
        &mut self,
        failover: &mut Failover<T>,
        fits: impl FnOnce(&Target<T>) -> Result<(), RefitError>,
    ) -> Result<(), PullFailure> {
        let Held::Out(out) = &self.0 else { return Ok(()) };
        let Out { group, parked } = &**out;
        let fresh = failover.build(parked.kept_bytes())?;
        fits(&fresh).map_err(failure)?;
        tracing::warn!(group, agent = parked.transport().agent(), "a fresh agent takes over");
        if let Held::Out(out) = std::mem::replace(&mut self.0, Held::Whole(fresh)) {
            failover.retire(out.parked);
        }
        Ok(())
    }
}

impl<T: Transport> Held<T> {
    fn after(state: Unfinished<T>, group: &str) -> Self {
        match state {
            Unfinished::Pulling(pulling) => match pulling.park() {
                Ok(parked) => Self::Out(Box::new(Out { group: group.to_owned(), parked })),
                Err(failed) => Self::after(failed.state, group),
            },
            Unfinished::Invalid(target) => Self::Mixed(target),
            Unfinished::Whole(target) => Self::Whole(target),
            Unfinished::Lost => Self::Lost,
        }
    }
}

fn lost() -> PullFailure {
    PullFailure::new(Cause::Lost, RankError::Lost)
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
