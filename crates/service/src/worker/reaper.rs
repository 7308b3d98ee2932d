//! Where agents go that cannot be destroyed yet: one thread of the process polls them until they are quiet.
//!
//! A process that ends before that cuts their connections, on which a peer that stands still may have an answer to send, and
//! UCX may abort that peer when it goes on. So whoever ends a process asks for [`wait`] first.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::{Agent, Standing};

/// How often they are polled.
const POLL: Duration = Duration::from_millis(10);

/// What the process's reaper has in hand, and what became of the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReaperStats {
    /// Gauge: agents that are polled.
    pub agents: u64,
    /// Gauge: bytes that they hold.
    pub bytes: u64,
    /// Gauge: for how long the oldest of them has been here.
    pub oldest: Duration,
    /// Counter: agents that became quiet and were destroyed.
    pub settled: u64,
    /// Counter: agents that were leaked because nobody can watch their reads any more.
    pub lost: u64,
    /// Counter: bytes that these hold.
    pub lost_bytes: u64,
}

/// What the retired agents of one worker keep.
#[derive(Debug, Default)]
pub(super) struct Charges(Mutex<(u64, u64)>);

/// One agent's part of it, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Charge {
    charges: Arc<Charges>,
    bytes: u64,
}

impl Charges {
    pub(super) fn agents(&self) -> u64 {
        self.0.lock().0
    }

    pub(super) fn bytes(&self) -> u64 {
        self.0.lock().1
    }
}

impl Charge {
    pub(super) fn new(charges: &Arc<Charges>, bytes: u64) -> Self {
        let mut sum = charges.0.lock();
        *sum = (sum.0 + 1, sum.1.saturating_add(bytes));
        drop(sum);
        reaper().state.lock().retired += 1;
        Self { charges: Arc::clone(charges), bytes }
    }

    /// The same agent's, which turned out to keep so many bytes.
    pub(super) fn of(mut self, bytes: u64) -> Self {
        let mut sum = self.charges.0.lock();
        sum.1 = sum.1.saturating_sub(self.bytes).saturating_add(bytes);
        drop(sum);
        self.bytes = bytes;
        self
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let mut sum = self.charges.0.lock();
        *sum = (sum.0.saturating_sub(1), sum.1.saturating_sub(self.bytes));
        drop(sum);
        reaper().state.lock().part();
    }
}

/// An agent and what it is charged.
trait Retired: Send {
    fn poll(&mut self) -> Standing;
    fn name(&self) -> String;
}

/// Dropped in this order: memory comes back before it counts as back.
struct Held<A: Agent> {
    agent: A,
    _charge: Charge,
}

impl<A: Agent> Retired for Held<A> {
    fn poll(&mut self) -> Standing {
        self.agent.poll()
    }

    fn name(&self) -> String {
        self.agent.name()
    }
}

struct Ward {
    retired: Box<dyn Retired>,
    number: u64,
    bytes: u64,
}

#[derive(Default)]
struct Reaper {
    state: Mutex<State>,
    arrived: Condvar,
    /// Told when the last retired agent is gone.
    idle: Condvar,
}

#[derive(Default)]
struct State {
    /// Those that the thread does not have in its hands.
    arrivals: Vec<Ward>,
    /// Bytes and arrival of all that are not gone, by number.
    here: BTreeMap<u64, (u64, Instant)>,
    adopted: u64,
    /// Agents that are to go and are not gone: those that are here, and those whose threads are in a call still.
    retired: u64,
    running: bool,
    settled: u64,
    lost: u64,
    lost_bytes: u64,
}

fn reaper() -> &'static Reaper {
    static REAPER: OnceLock<Reaper> = OnceLock::new();
    REAPER.get_or_init(Reaper::default)
}

/// What it has in hand now.
#[must_use]
pub fn stats() -> ReaperStats {
    let state = reaper().state.lock();
    ReaperStats {
        agents: state.here.len() as u64,
        bytes: state.here.values().fold(0, |sum, (bytes, _)| sum.saturating_add(*bytes)),
        oldest: state.here.values().map(|(_, since)| since.elapsed()).max().unwrap_or_default(),
        settled: state.settled,
        lost: state.lost,
        lost_bytes: state.lost_bytes,
    }
}

/// Waits until no retired agent of this process is left, at most until the deadline, and says whether that is so. Those whose threads
/// are in a call that does not return are waited for as well; those that were lost are not: nobody can tell when their reads
/// end.
///
/// For who is about to end the process, behind dropping what reads; a second or two more there may spare a peer its life.
#[must_use]
pub fn wait(deadline: Instant) -> bool {
    let reaper = reaper();
    let mut state = reaper.state.lock();
    while state.retired > 0 {
        if reaper.idle.wait_until(&mut state, deadline).timed_out() {
            return state.retired == 0;
        }
    }
    true
}

/// Takes an agent that may have reads out.
pub(super) fn adopt<A: Agent>(agent: A, charge: Charge, bytes: u64) {
    let name = catch_unwind(AssertUnwindSafe(|| agent.name())).unwrap_or_default();
    tracing::warn!(
        agent = name,
        bytes,
        "an agent is retired with reads out; it is polled until they have settled"
    );
    let since = Instant::now();
    let retired = Box::new(Held { agent, _charge: charge });
    let reaper = reaper();
    let mut state = reaper.state.lock();
    state.adopted += 1;
    let ward = Ward { number: state.adopted, retired, bytes };
    if !state.running {
        let thread = thread::Builder::new().name("refit-reaper".into());
        match thread.spawn(move || reaper.run()) {
            Ok(_) => state.running = true,
            Err(error) => {
                tracing::error!(%error, agent = name, bytes, "no thread to watch an agent: it is leaked");
                state.lose(ward);
                return;
            }
        }
    }
    state.here.insert(ward.number, (bytes, since));
    state.arrivals.push(ward);
    drop(state);
    reaper.arrived.notify_all();
}

impl Reaper {
    fn run(&self) {
        let mut wards = Vec::<Ward>::new();
        loop {
            {
                let mut state = self.state.lock();
                while wards.is_empty() && state.arrivals.is_empty() {
                    self.arrived.wait(&mut state);
                }
                wards.append(&mut state.arrivals);
            }
            // Without the lock: a poll may block for seconds.
            wards = wards.into_iter().filter_map(|ward| self.look(ward)).collect();
            thread::sleep(POLL);
        }
    }

    fn look(&self, mut ward: Ward) -> Option<Ward> {
        let standing = catch_unwind(AssertUnwindSafe(|| ward.retired.poll()));
        let (number, bytes) = (ward.number, ward.bytes);
        match standing {
            Ok(Standing::Restless) => return Some(ward),
            Ok(Standing::Quiet) => {
                let agent = ward.retired.name();
                let gone = catch_unwind(AssertUnwindSafe(|| drop(ward)));
                tracing::info!(agent, bytes, clean = gone.is_ok(), "a retired agent has settled");
                let mut state = self.state.lock();
                state.settled += 1;
                state.here.remove(&number);
            }
            Ok(Standing::Lost) | Err(_) => {
                tracing::error!(bytes, "a retired agent lost its reads: it is leaked");
                let mut state = self.state.lock();
                state.lose(ward);
                state.here.remove(&number);
            }
        }
        None
    }
}

impl State {
    /// One that is waited for no more.
    fn part(&mut self) {
        self.retired = self.retired.saturating_sub(1);
        if self.retired == 0 {
            reaper().idle.notify_all();
        }
    }

    fn lose(&mut self, ward: Ward) {
        self.lost += 1;
        self.lost_bytes = self.lost_bytes.saturating_add(ward.bytes);
        self.part();
        // With its charge: what it keeps is never given back.
        std::mem::forget(ward);
    }
}
