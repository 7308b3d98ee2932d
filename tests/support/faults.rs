//! A transport that does what its script says: late, short, twice, out of order, never, or after a long block.
//!
//! Bytes move when the [`Wire`] moves and at no other time: polling looks, as with a NIC, and what was posted lands
//! whether anybody looks or not. The wire notes every write, so that tests can say which were allowed.

use std::collections::VecDeque;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use refit_planner::Capabilities;
use refit_pool::{MemoryKind, Region};
use refit_transport::{Cause, Peer, ReadOp, Side, Status, Transport, TransportError, Written};

/// How a batch of reads goes, from its post on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script {
    /// What the post answers.
    pub post: Post,
    /// Moves of the wire before the first read lands.
    pub delay: u32,
    /// Reads that land in one move, at least 1.
    pub pace: usize,
    /// Whether the last read lands first.
    pub backwards: bool,
    /// Whether every read lands twice, the second time after all have landed once.
    pub twice: bool,
    /// How it ends.
    pub end: End,
    /// How long post and every poll block.
    pub block: Duration,
}

/// What a post answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Post {
    /// The reads are under way.
    Starts,
    /// They are done.
    Finishes,
    /// Nothing was started.
    Refuses,
    /// Reads were started that nobody will see end: they go on landing.
    Breaks,
}

/// How reads end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// When all have landed.
    Done,
    /// With an error, when so many have landed.
    Short(usize),
    /// Not before the peer is [killed](Wire::kill).
    Never,
    /// When so many have landed the sight of them is lost; they go on landing.
    Lost(usize),
}

impl Default for Script {
    /// All at the first move.
    fn default() -> Self {
        Self {
            post: Post::Starts,
            delay: 0,
            pace: usize::MAX,
            backwards: false,
            twice: false,
            end: End::Done,
            block: Duration::ZERO,
        }
    }
}

/// How a connection goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connect {
    /// It is made, after so long.
    After(Duration),
    /// The peer is not there, which shows after so long.
    Fails(Duration),
}

/// What carries bytes from the one peer, whose memory is [`FaultTransport::byte`] at every address.
#[derive(Clone, Debug, Default)]
pub struct Wire(Arc<Mutex<Vec<Flight>>>);

#[derive(Debug)]
struct Flight {
    number: u64,
    /// From, into, bytes.
    reads: VecDeque<(u64, u64, u64)>,
    script: Script,
    landed: usize,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Pending,
    Done,
    Failed,
    Lost,
}

/// A transport over one wire.
#[derive(Debug)]
pub struct FaultTransport {
    name: String,
    wire: Wire,
    scripts: Mutex<VecDeque<Script>>,
    connects: Mutex<VecDeque<Connect>>,
    registered: Arc<Mutex<Vec<Region>>>,
    suspects: AtomicUsize,
}

/// A registration, undone when it is dropped.
#[derive(Debug)]
pub struct FaultRegistration(Arc<Mutex<Vec<Region>>>, u64);

/// A batch.
#[derive(Debug)]
pub struct FaultReads {
    wire: Wire,
    reads: Vec<ReadOp>,
    written: Vec<Written>,
    flight: Option<(u64, Duration)>,
    /// Keeps what is written allocated.
    held: Vec<Region>,
}

impl Wire {
    /// Moves once: what is due lands.
    pub fn step(&self) {
        let mut flights = self.0.lock();
        for flight in &mut *flights {
            flight.step();
        }
        // Those that have ended write no more and are looked at once more by whoever watches them.
        drop(flights);
    }

    /// The peer is gone: whatever is under way ends with an error, now. What is lost stays so.
    pub fn kill(&self) {
        for flight in &mut *self.0.lock() {
            if flight.state == State::Pending {
                flight.state = State::Failed;
            }
        }
    }

    /// Batches that may still write.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        let flights = self.0.lock();
        flights.iter().filter(|one| matches!(one.state, State::Pending | State::Lost)).count()
    }

    fn state(&self, number: u64) -> State {
        let flights = self.0.lock();
        flights.iter().find(|one| one.number == number).map_or(State::Failed, |one| one.state)
    }

    fn forget(&self, number: u64) {
        self.0.lock().retain(|one| one.number != number);
    }
}

impl Flight {
    fn step(&mut self) {
        if self.state == State::Lost {
            // For ever, and all of it.
            self.reads.iter().for_each(land);
            return;
        }
        if self.state != State::Pending {
            return;
        }
        if let Some(left) = self.script.delay.checked_sub(1) {
            self.script.delay = left;
            return;
        }
        let rounds = if self.script.twice { 2 } else { 1 };
        let all = self.reads.len() * rounds;
        for _ in 0..self.script.pace.max(1) {
            match self.script.end {
                End::Short(most) if self.landed >= most => {
                    self.state = State::Failed;
                    return;
                }
                End::Lost(most) if self.landed >= most => {
                    self.state = State::Lost;
                    return;
                }
                _ if self.landed == all => break,
                _ => {}
            }
            let index = self.landed % self.reads.len();
            let index = if self.script.backwards { self.reads.len() - 1 - index } else { index };
            land(&self.reads[index]);
            self.landed += 1;
        }
        if self.landed == all {
            match self.script.end {
                End::Never => {
                    // It goes on, as if the peer sent again and again.
                    self.landed = 0;
                }
                End::Done | End::Short(_) => self.state = State::Done,
                End::Lost(_) => self.state = State::Lost,
            }
        }
    }
}

fn land(&(from, into, len): &(u64, u64, u64)) {
    for at in 0..len {
        let place = usize::try_from(into + at).unwrap();
        let place = ptr::with_exposed_provenance_mut::<u8>(place);
        // SAFETY: `prepare` found the read inside registered memory; the batch, or its leak, keeps that allocated. By
        // the contract of `post` nobody else accesses it until the batch has ended, after which nothing lands.
        unsafe { place.write_volatile(FaultTransport::byte(from + at)) };
    }
}

impl FaultTransport {
    /// An agent of this name.
    #[must_use]
    pub fn new(name: impl Into<String>, wire: &Wire) -> Self {
        Self {
            name: name.into(),
            wire: wire.clone(),
            scripts: Mutex::default(),
            connects: Mutex::default(),
            registered: Arc::default(),
            suspects: AtomicUsize::new(0),
        }
    }

    /// The byte that the peer has at this address.
    #[must_use]
    pub fn byte(address: u64) -> u8 {
        // Never 0, and not what tests fill memory with.
        u8::try_from(address % 113).unwrap() + 1
    }

    /// How the batch posted after those scripted so far goes. Without a script everything lands at the first move.
    pub fn script(&self, script: Script) {
        self.scripts.lock().push_back(script);
    }

    /// How the connection after those scripted so far goes.
    pub fn script_connect(&self, connect: Connect) {
        self.connects.lock().push_back(connect);
    }

    /// Forgets what was scripted and not used.
    pub fn unscript(&self) {
        self.scripts.lock().clear();
        self.connects.lock().clear();
    }

    /// Batches that were abandoned.
    #[must_use]
    pub fn suspects(&self) -> usize {
        self.suspects.load(Ordering::Acquire)
    }

    fn error(&self, cause: Cause) -> TransportError {
        TransportError::Failed { agent: self.name.clone(), peer: "peer".into(), cause }
    }

    fn lost(&self) -> TransportError {
        let (agent, peer) = (self.name.clone(), "peer".into());
        TransportError::Lost { agent, peer, cause: Cause::PeerGone }
    }

    fn check(&self) -> Result<(), TransportError> {
        if self.suspects() == 0 {
            Ok(())
        } else {
            Err(TransportError::Suspect { agent: self.name.clone() })
        }
    }
}

impl Transport for FaultTransport {
    type Registration = FaultRegistration;
    type Prepared = FaultReads;

    fn backend(&self) -> &'static str {
        "faults"
    }

    fn agent(&self) -> &str {
        &self.name
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::plain(1_000, 1_000)
    }

    fn metadata(&self) -> Result<Vec<u8>, TransportError> {
        Ok(Vec::new())
    }

    fn register(&self, region: &Region) -> Result<FaultRegistration, TransportError> {
        self.registered.lock().push(region.clone());
        Ok(FaultRegistration(Arc::clone(&self.registered), region.address()))
    }

    fn deregister(&self, registration: FaultRegistration) -> Result<(), TransportError> {
        drop(registration);
        Ok(())
    }

    fn connect(&self, name: &str, _: &[u8]) -> Result<Peer, TransportError> {
        let connect = self.connects.lock().pop_front();
        match connect.unwrap_or(Connect::After(Duration::ZERO)) {
            Connect::After(time) => {
                thread::sleep(time);
                Ok(Peer { name: name.into() })
            }
            Connect::Fails(time) => {
                thread::sleep(time);
                let millis = u64::try_from(time.as_millis()).unwrap();
                let (agent, peer) = (self.name.clone(), name.into());
                Err(TransportError::Connect { agent, peer, cause: Cause::Silent { millis } })
            }
        }
    }

    fn disconnect(&self, _: &Peer) -> Result<(), TransportError> {
        Ok(())
    }

    fn prepare(&self, peer: &Peer, reads: &[ReadOp]) -> Result<FaultReads, TransportError> {
        self.check()?;
        let registered = self.registered.lock();
        let (mut held, mut written) = (Vec::new(), Vec::new());
        for (read, op) in reads.iter().enumerate() {
            let (start, len) = (op.into.address, op.into.len);
            let around = registered.iter().find(|region| {
                region.address() <= start && start + len <= region.address() + region.len()
            });
            let Some(around) = around else {
                let (peer, side) = (peer.name.clone(), Side::Local);
                return Err(TransportError::NotRegistered { peer, read, side, len });
            };
            held.push(around.clone());
            written.push(Written::range(MemoryKind::Host, start, len));
        }
        written.sort_by_key(|one| one.address);
        let (reads, wire) = (reads.to_vec(), self.wire.clone());
        Ok(FaultReads { wire, reads, written, flight: None, held })
    }

    fn written<'a>(&self, prepared: &'a FaultReads) -> &'a [Written] {
        &prepared.written
    }

    fn reads(&self, prepared: &FaultReads) -> usize {
        prepared.reads.len()
    }

    unsafe fn post(&self, prepared: &mut FaultReads) -> Result<Status, TransportError> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        self.check()?;
        assert!(prepared.flight.is_none(), "posted twice");
        let script = self.scripts.lock().pop_front().unwrap_or_default();
        thread::sleep(script.block);
        let reads = prepared.reads.iter();
        let reads: VecDeque<_> =
            reads.map(|op| (op.from.address, op.into.address, op.into.len)).collect();
        let (state, answer) = match script.post {
            Post::Refuses => return Err(self.error(Cause::PeerGone)),
            Post::Finishes => {
                reads.iter().for_each(land);
                return Ok(Status::Done);
            }
            Post::Starts => (State::Pending, Ok(Status::Pending)),
            Post::Breaks => (State::Lost, Err(self.lost())),
        };
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        prepared.flight = Some((number, script.block));
        self.wire.0.lock().push(Flight { number, reads, script, landed: 0, state });
        answer
    }

    fn poll(&self, prepared: &mut FaultReads) -> Result<Status, TransportError> {
        let (number, block) = prepared.flight.expect("posted");
        thread::sleep(block);
        let state = self.wire.state(number);
        if matches!(state, State::Done | State::Failed) {
            self.wire.forget(number);
            prepared.flight = None;
        }
        match state {
            State::Pending => Ok(Status::Pending),
            State::Done => Ok(Status::Done),
            State::Failed => Err(self.error(Cause::PeerGone)),
            State::Lost => Err(self.lost()),
        }
    }

    fn suspect(&self, _: &FaultReads) {
        self.suspects.fetch_add(1, Ordering::AcqRel);
    }
}

impl Drop for FaultReads {
    fn drop(&mut self) {
        if let Some((number, _)) = self.flight
            && matches!(self.wire.state(number), State::Pending | State::Lost)
        {
            std::mem::forget(std::mem::take(&mut self.held));
        }
    }
}

impl Drop for FaultRegistration {
    fn drop(&mut self) {
        let mut registered = self.0.lock();
        if let Some(index) = registered.iter().position(|region| region.address() == self.1) {
            registered.swap_remove(index);
        }
    }
}
