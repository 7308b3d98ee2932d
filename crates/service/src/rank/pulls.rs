use std::time::Instant;

use refit::transport::{Transport, TransportError};
use refit::{Cancelled, Failed, Installed, InvalidTarget, Pulling, RefitError, Target, Unfinished};

use crate::puller::{Cause, PullFailure, Reading};

/// A target in whatever state the last pull left it.
#[derive(Debug)]
pub(super) struct Pulls<T: Transport>(Held<T>);

#[derive(Debug)]
enum Held<T: Transport> {
    Whole(Target<T>),
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

    /// The target, if it is whole.
    pub(super) fn whole(&self) -> Option<&Target<T>> {
        match &self.0 {
            Held::Whole(target) => Some(target),
            _ => None,
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
            match std::mem::replace(&mut self.0, Held::Lost) {
                Held::Whole(target) => target
                    .prepare(reading.publications)
                    .map_err(|Failed { error, state }| (error, Held::Whole(state))),
                Held::Mixed(target) => target
                    .prepare(reading.publications)
                    .map_err(|Failed { error, state }| (error, Held::Mixed(state))),
                out @ Held::Out(_) => {
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
