//! The thread of a worker, and what others may know of it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::reaper::{self, Charge, Charges};
use super::{Agent, Build, Standing, WorkerError, WorkerStats};

/// How often an agent is polled that nobody waits for.
const POLL: Duration = Duration::from_millis(2);

/// Gives the answer, after the agent has been looked at: whoever has it finds the agent's standing and bytes as they are.
pub(super) type Deliver = Box<dyn FnOnce() + Send>;

/// A command on its way.
pub(super) struct Job<A> {
    pub(super) what: &'static str,
    pub(super) ticket: Arc<Ticket>,
    pub(super) run: Box<dyn FnOnce(&mut A) -> Deliver + Send>,
    /// Keeps the caller waiting until the job is gone: by then it can be told why.
    pub(super) open: Box<dyn Send>,
}

/// Decides between the thread that begins a command and the caller that gives it up.
#[derive(Debug, Default)]
pub(super) struct Ticket(AtomicU8);

const BEGUN: u8 = 1;
const ABANDONED: u8 = 2;

impl Ticket {
    fn begin(&self) -> bool {
        self.0.compare_exchange(0, BEGUN, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Whether the command will never be begun.
    pub(super) fn abandon(&self) -> bool {
        self.0.compare_exchange(0, ABANDONED, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

enum Message<A> {
    Job(Job<A>),
    /// Somebody changed the state.
    Wake,
}

/// One thread with one agent at a time.
pub(super) struct Lane<A> {
    worker: Arc<str>,
    generation: u64,
    recycle_after: u64,
    messages: Sender<Message<A>>,
    charges: Arc<Charges>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    doing: Option<(&'static str, Instant)>,
    agent: Option<String>,
    standing: Standing,
    bytes: u64,
    /// Whether the agent has done something since these were noted.
    stale: bool,
    recycled: u64,
    built: bool,
    /// To end when it can.
    retired: bool,
    /// The agent has been destroyed or handed on.
    left: bool,
    /// Counts what the agent may keep, from when it is retired.
    charge: Option<Charge>,
    failure: Option<WorkerError>,
    ended: bool,
}

impl<A: Agent> Lane<A> {
    pub(super) fn start(
        worker: Arc<str>,
        generation: u64,
        recycle_after: u64,
        charges: Arc<Charges>,
        build: Arc<Build<A>>,
    ) -> Result<Arc<Self>, WorkerError> {
        let (messages, inbox) = mpsc::channel();
        let state = Mutex::new(State {
            doing: None,
            agent: None,
            standing: Standing::Quiet,
            bytes: 0,
            stale: false,
            recycled: 0,
            built: false,
            retired: false,
            left: false,
            charge: None,
            failure: None,
            ended: false,
        });
        let changed = Condvar::new();
        let lane = Self { worker, generation, recycle_after, messages, charges, state, changed };
        let lane = Arc::new(lane);
        let shared = Arc::clone(&lane);
        let spawned = thread::Builder::new().name(lane.worker.replace('\0', "")).spawn(move || {
            let _ended = Ended(&shared);
            shared.run(&inbox, &*build);
        });
        spawned.map_err(|source| WorkerError::Spawn {
            worker: lane.worker.to_string(),
            source: Arc::new(source),
        })?;
        Ok(lane)
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn send(&self, job: Job<A>) -> Result<(), WorkerError> {
        let what = job.what;
        let state = self.state.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        // Under the lock, so that whoever ends the lane finds it.
        if state.retired || state.ended || self.messages.send(Message::Job(job)).is_err() {
            return Err(self.ended(what));
        }
        Ok(())
    }

    fn run(&self, inbox: &Receiver<Message<A>>, build: &Build<A>) {
        let mut agent = match self.build(build, None) {
            Ok(agent) => agent,
            Err(failure) => return self.fail(inbox, failure),
        };
        let mut standing = Standing::Quiet;
        loop {
            let message = match standing {
                Standing::Quiet | Standing::Lost => {
                    inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
                }
                Standing::Restless => inbox.recv_timeout(POLL),
            };
            if self.state.lock().retired {
                self.fail(inbox, self.ended("do more"));
                // Its caller is told before the agent is seen to.
                drop(message);
                return self.leave(agent, false);
            }
            let mut answer = None;
            match message {
                Ok(Message::Job(job)) => {
                    let Job { what, ticket, run, open } = job;
                    // First: from when it is begun its caller may give up and have the agent retired.
                    self.state.lock().stale = true;
                    if !ticket.begin() {
                        self.state.lock().stale = false;
                        continue;
                    }
                    match self.guarded(what, || run(&mut agent)) {
                        Ok(deliver) => answer = Some((deliver, open)),
                        Err(failure) => {
                            self.fail(inbox, failure);
                            drop(open);
                            return self.leave(agent, true);
                        }
                    }
                }
                Ok(Message::Wake) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.leave(agent, false),
            }
            match self.look(&mut agent) {
                Ok(found) => standing = found,
                Err(failure) => {
                    self.fail(inbox, failure);
                    drop(answer);
                    return self.leave(agent, true);
                }
            }
            // An answer that nobody waits for is dropped here, and may panic.
            if let Some((deliver, open)) = answer
                && let Err(failure) = self.guarded("answer", deliver)
            {
                self.fail(inbox, failure);
                drop(open);
                return self.leave(agent, true);
            }
            if standing == Standing::Quiet && agent.joins() >= self.recycle_after {
                tracing::info!(
                    worker = &*self.worker,
                    joins = agent.joins(),
                    "an agent is recycled"
                );
                self.state.lock().stale = true;
                agent = match self.build(build, Some(agent)) {
                    Ok(agent) => agent,
                    Err(failure) => return self.fail(inbox, failure),
                };
                self.state.lock().recycled += 1;
            }
        }
    }

    fn build(&self, build: &Build<A>, old: Option<A>) -> Result<A, WorkerError> {
        let built = self.guarded("build an agent", || build(old))?;
        let mut agent = built.map_err(|source| WorkerError::Build {
            worker: self.worker.to_string(),
            source: source.into(),
        })?;
        self.look(&mut agent)?;
        self.state.lock().built = true;
        self.changed.notify_all();
        Ok(agent)
    }

    /// Polls the agent and notes how it stands.
    fn look(&self, agent: &mut A) -> Result<Standing, WorkerError> {
        let (standing, name, bytes) =
            self.guarded("poll its agent", || (agent.poll(), agent.name(), agent.bytes()))?;
        let mut state = self.state.lock();
        (state.standing, state.agent, state.bytes) = (standing, Some(name), bytes);
        state.stale = false;
        Ok(standing)
    }

    /// Runs something foreign: others can see what, and a panic becomes an error.
    fn guarded<R>(&self, what: &'static str, run: impl FnOnce() -> R) -> Result<R, WorkerError> {
        self.state.lock().doing = Some((what, Instant::now()));
        let result = catch_unwind(AssertUnwindSafe(run));
        self.state.lock().doing = None;
        result.map_err(|panic| WorkerError::Panicked {
            worker: self.worker.to_string(),
            what,
            message: message(&*panic),
        })
    }

    /// Does nothing more. Everybody who waits, and who calls from here on, is told why.
    fn fail(&self, inbox: &Receiver<Message<A>>, failure: WorkerError) {
        tracing::error!(worker = &*self.worker, %failure, "a worker stops");
        self.state.lock().failure = Some(failure);
        self.changed.notify_all();
        // Nothing is sent any more: `send` looks at `failure` first.
        inbox.try_iter().for_each(drop);
    }

    /// Parts with the agent: destroys it if it is quiet. What a panic has left is for the reaper to find out.
    fn leave(&self, mut agent: A, panicked: bool) {
        let standing = self.guarded("poll its agent", || agent.poll());
        if matches!(standing, Ok(Standing::Quiet)) && !panicked {
            if let Err(panic) = self.guarded("destroy its agent", || drop(agent)) {
                tracing::error!(worker = &*self.worker, %panic, "an agent could not be destroyed");
            }
            drop(self.left());
            return;
        }
        let bytes = self.guarded("weigh its agent", || agent.bytes()).unwrap_or_default();
        let charge = match self.left() {
            // Not one more: whoever looks must never find an agent counted twice.
            Some(charge) => charge.of(bytes),
            None => Charge::new(&self.charges, bytes),
        };
        reaper::adopt(agent, charge, bytes);
    }

    /// The agent is here no more. Its charge goes with it, if it was retired.
    fn left(&self) -> Option<Charge> {
        let mut state = self.state.lock();
        (state.bytes, state.standing, state.stale, state.left) = (0, Standing::Quiet, false, true);
        state.charge.take()
    }

    /// Has the thread end when it can. Says whether it was to go on before.
    pub(super) fn retire(&self) -> bool {
        let mut state = self.state.lock();
        if std::mem::replace(&mut state.retired, true) {
            return false;
        }
        if !state.left && !state.ended {
            state.charge = Some(Charge::new(&self.charges, state.unsettled()));
        }
        drop(state);
        // It may have ended.
        let _ = self.messages.send(Message::Wake);
        true
    }

    /// Bytes that stay away if the agent is retired now.
    pub(super) fn unsettled_bytes(&self) -> u64 {
        self.state.lock().unsettled()
    }

    pub(super) fn wait_built(&self, until: Instant) -> Result<(), WorkerError> {
        let mut state = self.state.lock();
        loop {
            match &state.failure {
                _ if state.built => return Ok(()),
                Some(failure) => return Err(failure.clone()),
                None if state.ended => return Err(self.ended("build an agent")),
                None => {}
            }
            if self.changed.wait_until(&mut state, until).timed_out() {
                drop(state);
                return Err(self.stuck("build an agent"));
            }
        }
    }

    pub(super) fn wait_ended(&self, until: Instant) -> bool {
        let mut state = self.state.lock();
        while !state.ended {
            if self.changed.wait_until(&mut state, until).timed_out() {
                return state.ended;
            }
        }
        true
    }

    pub(super) fn stats(&self) -> WorkerStats {
        let state = self.state.lock();
        WorkerStats {
            generation: self.generation,
            agent: state.agent.clone(),
            doing: state.doing.map(|(what, since)| (what, since.elapsed())),
            standing: state.standing,
            bytes: state.bytes,
            retired_bytes: 0,
            retired: 0,
            recycled: state.recycled,
        }
    }

    /// Why a command that was sent did not answer.
    pub(super) fn why_not(&self) -> WorkerError {
        let state = self.state.lock();
        state.failure.clone().unwrap_or_else(|| self.ended("answer"))
    }

    pub(super) fn busy(&self, what: &'static str) -> WorkerError {
        let (doing, millis) = self.doing();
        WorkerError::Busy { worker: self.worker.to_string(), what, doing, millis }
    }

    pub(super) fn stuck(&self, what: &'static str) -> WorkerError {
        let (doing, millis) = self.doing();
        let agent = self.state.lock().agent.clone().unwrap_or_else(|| "none yet".into());
        WorkerError::Stuck { worker: self.worker.to_string(), agent, what, doing, millis }
    }

    fn doing(&self) -> (&'static str, u64) {
        match self.state.lock().doing {
            Some((what, since)) => {
                (what, u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX))
            }
            None => ("take the next command", 0),
        }
    }

    fn ended(&self, what: &'static str) -> WorkerError {
        WorkerError::Ended { worker: self.worker.to_string(), what }
    }
}

impl State {
    fn unsettled(&self) -> u64 {
        // Nobody knows what it has posted until it is looked at.
        let quiet = self.standing == Standing::Quiet && !self.stale;
        if quiet { 0 } else { self.bytes }
    }
}

/// Says that the thread has ended, however it did.
struct Ended<'a, A>(&'a Lane<A>);

impl<A> Drop for Ended<'_, A> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.ended = true;
        state.doing = None;
        drop(state);
        self.0.changed.notify_all();
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
        .to_owned()
}
