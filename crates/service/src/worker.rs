//! One thread that owns an agent, for callers that cannot wait for longer than they said.
//!
//! A call of NIXL may not return for ten seconds, and one agent is to be driven by one thread. So an [`Agent`] (transport,
//! pool, and the target or source on top of them) lives on the thread of a [`Worker`]; callers send it commands and wait
//! on a channel, until their deadline and no longer than [`GRACE`] beyond it, whatever the thread is stuck in.
//!
//! Memory that a posted read may still write stays with its agent. An agent that cannot settle is retired: the process's
//! one [`reaper`] polls it until nothing is under way and destroys it then, never before, because destroying
//! it sooner does not stop its reads and may abort the peer. A fresh agent, of another incarnation and with memory of its
//! own, takes over; what the retired ones keep is counted and limited.
//!
//! ```text
//!            ┌──────── renew ────────┐
//!   build ──▶ serving ──panic──▶ failed        calls get the reason until it is renewed
//!               │  ▲                │
//!        renew, │  └── recycle ─┐   │           at a quiet point, after so many joins
//!      shutdown ▼               │   ▼
//!             quiet? ──yes──▶ destroyed
//!               └──no──▶ reaper ──quiet──▶ destroyed
//!                           └──lost──▶ leaked, counted for good
//! ```

mod agent;
mod error;
mod lane;
mod quarantine;
pub mod reaper;

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

pub use self::agent::{Agent, Standing};
pub use self::error::WorkerError;
use self::lane::{Deliver, Job, Lane, Ticket};
pub use self::quarantine::Quarantine;

/// How long a caller waits beyond its deadline, so that a command which keeps it can say itself what went wrong.
pub const GRACE: Duration = Duration::from_millis(100);

/// How a worker is bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerOptions {
    /// Bytes that this worker's retired agents may keep before no further one is retired and replaced.
    pub quarantine_bytes: u64,
    /// An agent that joined so many peers is replaced when it is quiet: NIXL keeps a descriptor or two of every one.
    pub recycle_after: u64,
    /// How long dropping the worker waits for its thread.
    pub linger: Duration,
}

impl WorkerOptions {
    /// A quarter of this budget for retired agents, recycling after 256 joins, a second to linger.
    #[must_use]
    pub fn of_budget(budget_bytes: u64) -> Self {
        Self { quarantine_bytes: budget_bytes / 4, ..Self::default() }
    }

    /// These options with another limit of what retired agents keep.
    #[must_use]
    pub fn with_quarantine_bytes(mut self, bytes: u64) -> Self {
        self.quarantine_bytes = bytes;
        self
    }

    /// These options with another number of joins before an agent is recycled.
    #[must_use]
    pub fn with_recycle_after(mut self, joins: u64) -> Self {
        self.recycle_after = joins;
        self
    }

    /// These options with another time to linger.
    #[must_use]
    pub fn with_linger(mut self, linger: Duration) -> Self {
        self.linger = linger;
        self
    }
}

impl Default for WorkerOptions {
    /// No limit of bytes.
    fn default() -> Self {
        Self { quarantine_bytes: u64::MAX, recycle_after: 256, linger: Duration::from_secs(1) }
    }
}

/// Why an agent could not be made.
pub type BuildError = Box<dyn Error + Send + Sync>;

type Build<A> = dyn Fn(Option<A>) -> Result<A, BuildError> + Send + Sync;

/// A thread that owns an [`Agent`], and the way to it. See the [module](self).
///
/// Any number of threads may call it; commands run one after the other.
pub struct Worker<A: Agent> {
    name: Arc<str>,
    options: WorkerOptions,
    build: Arc<Build<A>>,
    lane: Mutex<Arc<Lane<A>>>,
    quarantine: Quarantine,
}

/// A worker's gauges and counters at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerStats {
    /// Which of the worker's threads serves now: counts [renewals](Worker::renew).
    pub generation: u64,
    /// The agent's name; `None` before it is built.
    pub agent: Option<String>,
    /// What runs now, and for how long.
    pub doing: Option<(&'static str, Duration)>,
    /// How the agent stood after the last command.
    pub standing: Standing,
    /// Bytes that the agent holds, as it said then.
    pub bytes: u64,
    /// Bytes that retired agents keep.
    pub retired_bytes: u64,
    /// Retired agents that are not destroyed yet.
    pub retired: u64,
    /// Counter: agents replaced at a quiet point because of the peers they had joined.
    pub recycled: u64,
}

impl<A: Agent> Worker<A> {
    /// Starts a thread of this name and has it build its agent, until `deadline`.
    ///
    /// `build` runs on that thread, and again whenever the agent is replaced: with the old one where that is quiet and is
    /// being recycled, so that memory can be taken over from it, and with `None` where the old one keeps its memory.
    ///
    /// # Errors
    /// [`WorkerError::Build`] with what `build` said, [`WorkerError::Panicked`], [`WorkerError::Stuck`] when it does not
    /// return in time, [`WorkerError::Spawn`].
    pub fn start(
        name: &str,
        options: WorkerOptions,
        deadline: Instant,
        build: impl Fn(Option<A>) -> Result<A, BuildError> + Send + Sync + 'static,
    ) -> Result<Self, WorkerError> {
        let quarantine = Quarantine::new(name, options.quarantine_bytes);
        let (name, build): (Arc<str>, Arc<Build<A>>) = (name.into(), Arc::new(build));
        let (recycle, charges) = (options.recycle_after, Arc::clone(quarantine.charges()));
        let lane = Lane::start(Arc::clone(&name), 0, recycle, charges, Arc::clone(&build))?;
        if let Err(error) = lane.wait_built(late(deadline)) {
            lane.retire();
            return Err(error);
        }
        let lane = Mutex::new(lane);
        Ok(Self { name, options, build, lane, quarantine })
    }

    /// Has the worker's thread run a command, and waits for what it returns.
    ///
    /// The command is given the deadline and is to keep it: a read that has not settled by then is to be parked with
    /// the agent. What it returns after the caller has gone is dropped on the worker's thread, so memory that reads may
    /// write belongs into the agent, not into the answer. `what` names the command in errors.
    ///
    /// # Errors
    /// [`WorkerError::Busy`] when it was not begun in time, and never will be; [`WorkerError::Stuck`] when it was and has
    /// not returned; [`WorkerError::Panicked`], [`WorkerError::Build`] and [`WorkerError::Ended`] for every call from
    /// when that happened on, until the worker is [renewed](Self::renew).
    pub fn call<R: Send + 'static>(
        &self,
        what: &'static str,
        deadline: Instant,
        command: impl FnOnce(&mut A, Instant) -> R + Send + 'static,
    ) -> Result<R, WorkerError> {
        let lane = self.lane();
        let (answer, answers) = mpsc::sync_channel(1);
        let (ticket, open) = (Arc::new(Ticket::default()), answer.clone());
        let run = move |agent: &mut A| {
            let result = command(agent, deadline);
            let deliver = move || {
                // Whoever asked may have gone.
                let _ = answer.send(result);
            };
            Box::new(deliver) as Deliver
        };
        let job =
            Job { what, ticket: Arc::clone(&ticket), run: Box::new(run), open: Box::new(open) };
        lane.send(job)?;
        let left = late(deadline).saturating_duration_since(Instant::now());
        match answers.recv_timeout(left) {
            Ok(result) => Ok(result),
            Err(RecvTimeoutError::Disconnected) => Err(lane.why_not()),
            Err(RecvTimeoutError::Timeout) if ticket.abandon() => Err(lane.busy(what)),
            // It was begun, and may have been done just now.
            Err(RecvTimeoutError::Timeout) => answers.try_recv().map_err(|_| lane.stuck(what)),
        }
    }

    /// Which of the worker's threads serves now: what [`renew`](Self::renew) wants to know.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.lane().generation()
    }

    /// Retires the agent of this generation and has a new thread build another, until `deadline`. Does nothing if that
    /// generation has been retired already.
    ///
    /// The old thread, which may be stuck in a call for as long as that takes, hands its agent to the
    /// [`reaper`] when it returns. Commands that wait for it are refused.
    ///
    /// # Errors
    /// [`WorkerError::Quarantine`] when retired agents would keep more than they may: then nothing is changed.
    /// Otherwise as [`start`](Self::start).
    pub fn renew(&self, generation: u64, deadline: Instant) -> Result<(), WorkerError> {
        let fresh = {
            let mut lane = self.lane.lock();
            if lane.generation() == generation {
                self.quarantine.has_room(lane.unsettled_bytes())?;
                let next = Lane::start(
                    Arc::clone(&self.name),
                    generation + 1,
                    self.options.recycle_after,
                    Arc::clone(self.quarantine.charges()),
                    Arc::clone(&self.build),
                )?;
                let old = std::mem::replace(&mut *lane, next);
                old.retire();
            }
            Arc::clone(&lane)
        };
        fresh.wait_built(late(deadline))
    }

    /// What it does and holds.
    #[must_use]
    pub fn stats(&self) -> WorkerStats {
        let mut stats = self.lane().stats();
        (stats.retired, stats.retired_bytes) = (self.quarantine.agents(), self.quarantine.bytes());
        stats
    }

    /// Ends the thread, and with it the agent if nothing is under way; otherwise the agent goes to the
    /// [`reaper`].
    ///
    /// # Errors
    /// [`WorkerError::Stuck`] when the thread is busy at the deadline; it goes on by itself then and ends when it can.
    pub fn shutdown(self, deadline: Instant) -> Result<(), WorkerError> {
        let lane = self.lane();
        lane.retire();
        if lane.wait_ended(late(deadline)) { Ok(()) } else { Err(lane.stuck("shut down")) }
    }

    fn lane(&self) -> Arc<Lane<A>> {
        Arc::clone(&self.lane.lock())
    }
}

fn late(deadline: Instant) -> Instant {
    deadline.checked_add(GRACE).unwrap_or(deadline)
}

impl<A: Agent> Drop for Worker<A> {
    fn drop(&mut self) {
        let lane = self.lane();
        if lane.retire() {
            let now = Instant::now();
            lane.wait_ended(now.checked_add(self.options.linger).unwrap_or(now));
        }
    }
}

impl<A: Agent> fmt::Debug for Worker<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("name", &self.name)
            .field("options", &self.options)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
