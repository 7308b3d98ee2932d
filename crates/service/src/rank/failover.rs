//! Other memory for a rank whose own may still be written.
//!
//! A busy machine may take seconds to make an agent. So one is made on a thread of its own, and whoever waits for it has an
//! answer at the deadline, or when the process is to end; the next who needs one takes it.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Instant;

use parking_lot::Mutex;
use refit::Target;
use refit::transport::Transport;

use super::RankError;
use super::pulls::Pulls;
use crate::puller::{Cause, PullFailure};
use crate::stop::{Stop, receive};
use crate::worker::{BuildError, Quarantine};

type Build<T> = dyn FnMut(u64) -> Result<Target<T>, BuildError> + Send;
type Built<T> = Result<Target<T>, BuildError>;

/// Makes targets, and parts with those whose reads are out, or whose agents are of no use.
pub(super) struct Failover<T: Transport> {
    quarantine: Quarantine,
    build: Arc<Mutex<Box<Build<T>>>>,
    /// Targets begun so far.
    begun: u64,
    /// The one that is not taken yet, and since when.
    coming: Option<(Instant, Receiver<Built<T>>)>,
}

impl<T: Transport> Failover<T> {
    pub(super) fn new(
        quarantine: Quarantine,
        build: impl FnMut(u64) -> Result<Target<T>, BuildError> + Send + 'static,
    ) -> Self {
        let build: Box<Build<T>> = Box::new(build);
        Self { quarantine, build: Arc::new(Mutex::new(build)), begun: 0, coming: None }
    }

    /// A target in memory of its own, if one that keeps so many bytes may be parted with, and it is there by the deadline and
    /// before `stop` is told.
    pub(super) fn build(
        &mut self,
        kept_bytes: u64,
        deadline: Instant,
        stop: Option<&Stop>,
    ) -> Result<Target<T>, PullFailure> {
        self.quarantine
            .has_room(kept_bytes)
            .map_err(|full| PullFailure::new(Cause::Quarantined, full))?;
        let (since, target) = match self.coming.take() {
            Some(coming) => coming,
            None => self.begin().map_err(no_agent)?,
        };
        match receive(&target, deadline, stop, Stop::waits_until) {
            Ok(built) => built.map_err(no_agent),
            Err(RecvTimeoutError::Timeout) => {
                self.coming = Some((since, target));
                let age = since.elapsed();
                Err(PullFailure::new(Cause::Late, RankError::NoAgentYet { age }))
            }
            Err(RecvTimeoutError::Disconnected) => Err(no_agent("making one panicked".into())),
        }
    }

    fn begin(&mut self) -> Result<(Instant, Receiver<Built<T>>), BuildError> {
        self.begun += 1;
        let (number, build) = (self.begun, Arc::clone(&self.build));
        let (made, target) = mpsc::sync_channel(1);
        let span = tracing::Span::current();
        // Where nobody waits any more, it goes as it came.
        let make = move || drop(made.send(span.in_scope(|| build.lock()(number))));
        thread::Builder::new().name("refit-agent".to_owned()).spawn(make)?;
        Ok((Instant::now(), target))
    }

    /// Whether one is being made, or has not been taken yet.
    pub(super) fn is_coming(&self) -> bool {
        self.coming.is_some()
    }

    /// Does without that one.
    pub(super) fn let_go(&mut self) {
        self.coming = None;
    }

    /// Keeps it until its reads have settled.
    pub(super) fn retire(&self, pulls: Pulls<T>) {
        self.quarantine.retire(pulls);
    }

    /// Bytes of those whose reads have not.
    pub(super) fn kept_bytes(&self) -> u64 {
        self.quarantine.bytes()
    }
}

impl<T: Transport> fmt::Debug for Failover<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failover")
            .field("quarantine", &self.quarantine)
            .field("begun", &self.begun)
            .finish_non_exhaustive()
    }
}

fn no_agent(source: BuildError) -> PullFailure {
    PullFailure::new(Cause::Failed, RankError::NoAgent { source })
}
