use std::time::Instant;

use refit::pool::Memory;
use refit::transport::{Transport, TransportError};
use refit::{
    Cancelled, DigestRequest, Digests, Expected, Failed, Installed, InvalidTarget, Lent,
    Publication, Pulling, RefitError, Target, Unfinished,
};

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
    /// Reads are out.
    Out(Box<Pulling<T>>),
    /// Reads are out for ever.
    Lost,
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
                out @ (Held::Out(_) | Held::Lent(_)) => {
                    self.0 = out;
                    return Err(PullFailure::new(Cause::Late, "reads of the last pull are out"));
                }
                Held::Lost => return Err(lost()),
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
                self.0 = Held::after(state);
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

    /// Waits until no reads are out.
    pub(super) fn settle(&mut self, deadline: Instant) -> Result<(), PullFailure> {
        match std::mem::replace(&mut self.0, Held::Lost) {
            Held::Out(pulling) => match pulling.wait(deadline) {
                // Nobody waited for it: its sources may have gone on since.
                Ok(pulled) => match pulled.land() {
                    Ok(landed) => self.0 = Held::Mixed(landed.install().stale()),
                    Err(Failed { state, .. }) => self.0 = Held::Mixed(state),
                },
                Err(Failed { error, state }) => {
                    self.0 = Held::after(state);
                    if matches!(self.0, Held::Out(_) | Held::Lost) {
                        return Err(failure(error));
                    }
                }
            },
            Held::Lost => return Err(lost()),
            settled => self.0 = settled,
        }
        Ok(())
    }
}

impl<T: Transport> Held<T> {
    fn after(state: Unfinished<T>) -> Self {
        match state {
            Unfinished::Pulling(pulling) => Self::Out(pulling),
            Unfinished::Invalid(target) => Self::Mixed(target),
            Unfinished::Whole(target) => Self::Whole(target),
            Unfinished::Lost => Self::Lost,
        }
    }
}

fn lost() -> PullFailure {
    PullFailure::new(Cause::Lost, "an earlier pull was lost, and with it the target's memory")
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
