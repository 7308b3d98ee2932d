//! What a target's pulls leave of it: here, with its reads out, or in a call that has not returned.

use std::fmt;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use refit::transport::Transport;
use refit::{Cancelled, InvalidTarget, Lent, ParkedTarget, RefitError, Target, Unfinished};

use crate::puller::{Cause, PullFailure};
use crate::rank::RankError;

#[derive(Debug)]
pub(super) enum Held<T: Transport> {
    Whole(Target<T>),
    /// Whole, and others may read it.
    Lent(Box<Lent<T>>),
    Mixed(InvalidTarget<T>),
    Out(Box<Out<T>>),
    Away(Away<T>),
    /// Reads are out for ever.
    Lost,
}

/// Reads of this group are out.
#[derive(Debug)]
pub(super) struct Out<T: Transport> {
    pub(super) group: String,
    pub(super) parked: ParkedTarget<T>,
}

impl<T: Transport> Out<T> {
    pub(super) fn late(&self) -> PullFailure {
        let Self { group, parked } = self;
        let (group, bytes, age) = (group.clone(), parked.bytes(), parked.age());
        PullFailure::new(Cause::Late, RankError::Out { group, bytes, age })
    }
}

/// A call into the transport, made to read this group, has not returned.
pub(super) struct Away<T: Transport> {
    pub(super) group: String,
    pub(super) since: Instant,
    /// What it left behind, once it has.
    pub(super) back: Box<dyn FnMut() -> Option<Held<T>> + Send>,
}

impl<T: Transport> fmt::Debug for Away<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { group, since, .. } = self;
        f.debug_struct("Away").field("group", group).field("since", since).finish_non_exhaustive()
    }
}

/// Why something failed, and what it left behind.
pub(super) type Left<T> = Box<(RefitError, Held<T>)>;

pub(super) fn left<T: Transport>(error: RefitError, held: Held<T>) -> Left<T> {
    Box::new((error, held))
}

/// What has come back, if something has.
pub(super) fn returned<T: Transport, O>(
    answers: &Receiver<Result<O, Left<T>>>,
    unwanted: impl Fn(O) -> Held<T>,
) -> Option<Held<T>> {
    match answers.try_recv() {
        Ok(Ok(output)) => Some(unwanted(output)),
        Ok(Err(left)) => Some(left.1),
        Err(TryRecvError::Empty) => None,
        // It panicked.
        Err(TryRecvError::Disconnected) => Some(Held::Lost),
    }
}

impl<T: Transport> From<Cancelled<T>> for Held<T> {
    fn from(cancelled: Cancelled<T>) -> Self {
        match cancelled {
            Cancelled::Whole(target) => Self::Whole(target),
            Cancelled::Invalid(target) => Self::Mixed(target),
        }
    }
}

impl<T: Transport> Held<T> {
    pub(super) fn after(state: Unfinished<T>, group: &str) -> Self {
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
