//! The thread that calls into a target's transport, so that nobody else is kept by a call that does not return.

use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Instant;

use crate::stop::{Stop, receive};

type Job = Box<dyn FnOnce() + Send>;

/// A thread that does one thing after the other. It is started when there is something to do, and ends behind the last of
/// it once this is dropped.
#[derive(Debug, Default)]
pub(super) struct Lane(Option<Sender<Job>>);

/// What became of something that a lane was given.
pub(super) enum Ran<O> {
    Done(O),
    /// Time is up and it is not done: this is where it will come back.
    Away(Receiver<O>),
    /// It panicked.
    Gone,
}

impl Lane {
    /// Starts the thread, if there is none. Before anything is given away that could not come back.
    pub(super) fn start(&mut self) -> io::Result<()> {
        if self.0.is_none() {
            let (sender, jobs) = mpsc::channel::<Job>();
            let run = move || jobs.into_iter().for_each(|job| job());
            thread::Builder::new().name("refit-pull".to_owned()).spawn(run)?;
            self.0 = Some(sender);
        }
        Ok(())
    }

    /// Has the thread do this, within the caller's span, and waits for what comes of it, at most until then, or until `stop`
    /// says.
    pub(super) fn run<O: Send + 'static>(
        &self,
        until: Instant,
        stop: Option<&Stop>,
        work: impl FnOnce() -> O + Send + 'static,
    ) -> Ran<O> {
        let (answer, answers) = mpsc::sync_channel(1);
        let span = tracing::Span::current();
        let job = Box::new(move || {
            // Whoever asked may have gone: what came of it is dropped here then.
            let _ = answer.send(span.in_scope(work));
        });
        if let Some(jobs) = &self.0 {
            // After a panic there is nobody to take it, and what it brings along goes with it.
            let _ = jobs.send(job);
        }
        match receive(&answers, until, stop, Stop::reads_until) {
            Ok(output) => Ran::Done(output),
            Err(RecvTimeoutError::Timeout) => Ran::Away(answers),
            Err(RecvTimeoutError::Disconnected) => Ran::Gone,
        }
    }
}
