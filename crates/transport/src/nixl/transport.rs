#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::cmp::Reverse;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nixl_sys::MemType;
use parking_lot::Mutex;
use refit_planner::Capabilities;
use refit_pool::Region;

use super::agent::{Agent, Piece, Registration, place};
use super::batch::{Destination, Failure, NixlReads, Requests};
use super::link::Link;
use super::warm_up::{self, Scratch};
use super::{NixlLibrary, NixlOptions};
use crate::envelope;
use crate::peers::{PeerState, Peers};
use crate::reads::{check_shapes, written};
use crate::registry::{Registered, Registry};
use crate::suspicion::Suspicion;
use crate::{Cause, Peer, ReadOp, Side, Status, Transport, TransportError, Written};

pub(super) type PeerLink = PeerState<Link>;

/// Reads into scratch memory that nobody waits for any more. Dropped in flight, they leak themselves and the agent.
pub(super) type Strays = Mutex<Vec<NixlReads>>;

/// A NIXL agent.
///
/// NIXL locks the agent to post and to poll: let one thread at a time drive an agent's pulls.
#[derive(Debug)]
pub struct NixlTransport {
    registry: Arc<Registry<Registration>>,
    peers: Peers<Link>,
    suspect: Suspicion,
    options: NixlOptions,
    /// Device memory that peers' allocations are touched into. Goes before the agent.
    scratch: Option<Arc<Scratch>>,
    touches: AtomicU64,
    strays: Strays,
    agent: Arc<Agent>,
}

/// Memory registered with a [`NixlTransport`].
#[derive(Debug)]
pub struct NixlRegistration(Registered<Registration>);

impl NixlTransport {
    /// An agent with one backend, named by the prefix and a random incarnation. Its listener is off.
    ///
    /// # Errors
    /// [`TransportError::Start`] when the prefix is not a plain name, a parameter is not taken or the backend does
    /// not start.
    pub fn new(library: NixlLibrary, mut options: NixlOptions) -> Result<Self, TransportError> {
        let Capabilities { bytes_per_us, ns_per_read, max_reads, .. } = options.capabilities;
        options.capabilities =
            Capabilities { max_reads, ..Capabilities::plain(bytes_per_us, ns_per_read) };
        let error = |cause| TransportError::Start { agent: options.prefix.clone(), cause };
        let agent = Agent::new(library, &options).map_err(error)?;
        let scratch = Scratch::of_device(&agent, &options).map_err(error)?;
        Ok(Self {
            registry: Registry::new(),
            peers: Peers::new(),
            suspect: Suspicion::default(),
            options,
            scratch,
            touches: AtomicU64::new(0),
            strays: Mutex::default(),
            agent: Arc::new(agent),
        })
    }

    /// The ways to a peer that UCX was told to take: the lanes, and what it takes for `UCX_TLS` and `UCX_NET_DEVICES`.
    #[must_use]
    pub fn lanes(&self) -> String {
        self.agent.lanes()
    }

    /// Where the agent listens for peers, as it was when it started: on loopback, unless its lanes say otherwise.
    #[must_use]
    pub fn listens(&self) -> &[SocketAddr] {
        self.agent.listens()
    }

    /// How many registrations of peers were read from to map them, so far. A batch that is prepared again, or reads
    /// from the same registrations, adds none.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub fn touches(&self) -> u64 {
        self.touches.load(Ordering::Relaxed)
    }

    pub(super) fn handle(&self) -> &Arc<Agent> {
        &self.agent
    }

    pub(super) fn scratch(&self) -> Option<&Arc<Scratch>> {
        self.scratch.as_ref()
    }

    pub(super) fn strays(&self) -> &Strays {
        &self.strays
    }

    /// Has UCX map the peer's allocations that these reads read, unless it has.
    fn touch(&self, peer: &Arc<PeerLink>, reads: &[ReadOp]) -> Result<(), Cause> {
        let Some(scratch) = self.scratch().filter(|_| !self.options.first_byte.is_zero()) else {
            return Ok(());
        };
        let places = peer.link.untouched(&peer.ranges(), scratch.kind(), reads);
        if places.is_empty() {
            return Ok(());
        }
        warm_up::read(&self.agent, &self.strays, peer, scratch, &places, self.options.first_byte)?;
        peer.link.touch(&places);
        self.touches.fetch_add(places.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn build(&self, peer: Arc<PeerLink>, reads: &[ReadOp]) -> Result<NixlReads, TransportError> {
        let error = |cause| TransportError::prepare(self.agent(), &peer.name, cause);
        let outside = |side, read, len| TransportError::not_registered(&peer.name, side, read, len);
        check_shapes(reads, &self.options.capabilities).map_err(error)?;
        // NIXL's own check of ranges wraps; these do not, and come first.
        let (published, own) = (peer.ranges(), self.registry.ranges());
        let mut pieces = Pieces::default();
        let mut cuts = Vec::new();
        for (read, op) in reads.iter().enumerate() {
            cuts.clear();
            let (from, into) = (op.from, op.into);
            if !published.cover(from.kind, from.address, from.len, |start| {
                cuts.push(start.saturating_sub(from.address))
            }) {
                return Err(outside(Side::Remote, read, from.len));
            }
            if !own.cover(into.kind, into.address, into.len, |start| {
                cuts.push(start.saturating_sub(into.address))
            }) {
                return Err(outside(Side::Local, read, into.len));
            }
            pieces.push(op, &mut cuts).map_err(error)?;
        }
        let holds = self.registry.hold_targets(&peer.name, reads)?;
        let written = written(&peer.name, reads)?;
        let (probed, lists) = pieces.in_order();
        let list = lists
            .iter()
            .map(|(from, into, pieces)| self.agent.request(&peer.name, *from, *into, pieces))
            .collect::<Result<_, _>>()
            .map_err(error)?;
        let (requests, into) = (Requests { list, probed }, Destination::Registered(holds));
        Ok(NixlReads::new(requests, into, Arc::clone(&self.agent), peer, written, reads.len()))
    }

    fn connect_error(&self, peer: &str, cause: Cause) -> TransportError {
        TransportError::Connect { agent: self.agent().into(), peer: peer.into(), cause }
    }

    fn failed(&self, prepared: &NixlReads, Failure { cause, settled }: Failure) -> TransportError {
        let (agent, peer) = (self.agent().into(), prepared.peer().name.clone());
        if settled {
            TransportError::Failed { agent, peer, cause }
        } else {
            self.suspect.raise();
            TransportError::Lost { agent, peer, cause }
        }
    }

    pub(super) fn not_suspect(&self) -> Result<(), TransportError> {
        self.suspect.check(self.agent())
    }
}

impl Transport for NixlTransport {
    type Registration = NixlRegistration;
    type Prepared = NixlReads;

    fn backend(&self) -> &'static str {
        "nixl"
    }

    fn agent(&self) -> &str {
        &self.agent.name
    }

    fn capabilities(&self) -> Capabilities {
        self.options.capabilities
    }

    fn metadata(&self) -> Result<Vec<u8>, TransportError> {
        if !self.options.publishes {
            return Err(self.connect_error(self.agent(), Cause::Unpublished));
        }
        let blob =
            self.agent.metadata().map_err(|cause| self.connect_error(self.agent(), cause))?;
        Ok(envelope::encode(self.backend(), self.agent(), &self.registry.ranges(), &blob))
    }

    fn register(&self, region: &Region) -> Result<NixlRegistration, TransportError> {
        let registered = self.registry.register(region, |region| self.agent.register(region));
        registered.map(NixlRegistration).map_err(|cause| {
            TransportError::register(self.agent(), region.kind(), region.len(), cause)
        })
    }

    fn deregister(&self, registration: NixlRegistration) -> Result<(), TransportError> {
        // `nixl_sys` keeps what NIXL answers to itself, so there is nothing more to report.
        self.registry.check_own(self.agent(), &registration.0)
    }

    fn connect(&self, name: &str, metadata: &[u8]) -> Result<Peer, TransportError> {
        let error = |cause| self.connect_error(name, cause);
        if name == self.agent() {
            return Err(error(Cause::Itself));
        }
        crate::reads::check_name(name).map_err(error)?;
        let envelope = envelope::decode(self.backend(), name, metadata, self.options.max_metadata)
            .map_err(error)?;
        let known = self.peers.get(name).ok();
        let found = self.agent.load(envelope.blob).map_err(error)?;
        if found != name {
            return Err(error(Cause::Published { found: found.escape_default().to_string() }));
        }
        self.agent.make_connection(name).map_err(error)?;
        if let Some(state) = known {
            state.publish(envelope.ranges);
            state.link.forget();
        } else {
            let state = Arc::new(PeerState::new(name, Link::default(), envelope.ranges));
            if !self.options.first_byte.is_zero() {
                warm_up::first_byte(self, &state, self.options.first_byte)?;
            }
            self.peers.insert(state);
        }
        Ok(Peer { name: name.into() })
    }

    fn disconnect(&self, peer: &Peer) -> Result<(), TransportError> {
        let error = |cause| self.connect_error(&peer.name, cause);
        self.peers.remove(&peer.name).map_err(error)?;
        self.agent.forget(&peer.name).map_err(error)
    }

    fn prepare(&self, peer: &Peer, reads: &[ReadOp]) -> Result<NixlReads, TransportError> {
        self.not_suspect()?;
        let error = |cause| TransportError::prepare(self.agent(), &peer.name, cause);
        let state = self.peers.get(&peer.name).map_err(error)?;
        let prepared = self.build(Arc::clone(&state), reads)?;
        self.touch(&state, reads).map_err(error)?;
        Ok(prepared)
    }

    fn written<'a>(&self, prepared: &'a NixlReads) -> &'a [Written] {
        prepared.written()
    }

    fn reads(&self, prepared: &NixlReads) -> usize {
        prepared.reads()
    }

    unsafe fn post(&self, prepared: &mut NixlReads) -> Result<Status, TransportError> {
        self.not_suspect()?;
        if !Arc::ptr_eq(prepared.agent(), &self.agent) {
            return Err(self.failed(prepared, Failure { cause: Cause::Foreign, settled: true }));
        }
        // SAFETY: the caller's promise; the batch itself keeps its memory registered, and so allocated.
        unsafe { prepared.post(self.options.probe_after) }
            .map_err(|failure| self.failed(prepared, failure))
    }

    fn poll(&self, prepared: &mut NixlReads) -> Result<Status, TransportError> {
        prepared.poll().map_err(|failure| self.failed(prepared, failure))
    }

    fn suspect(&self, _prepared: &NixlReads) {
        self.suspect.raise();
    }

    fn unsettled(&self) -> usize {
        let mut strays = self.strays.lock();
        strays.retain_mut(|stray| match stray.poll() {
            Ok(Status::Pending) => true,
            Ok(Status::Done) => false,
            // One that was lost can never be dropped.
            Err(failure) => !failure.settled,
        });
        strays.len()
    }
}

/// The pieces of a batch, by the types of memory they join: a NIXL list has one type.
#[derive(Default)]
struct Pieces(Vec<(MemType, MemType, Vec<Piece>)>);

impl Pieces {
    /// Adds a read, cut where registrations end on either side: NIXL wants each descriptor inside one of them.
    fn push(&mut self, op: &ReadOp, cuts: &mut Vec<u64>) -> Result<(), Cause> {
        let (from_type, from_device) = place(op.from.kind)?;
        let (into_type, into_device) = place(op.into.kind)?;
        let index =
            self.0.iter().position(|request| (request.0, request.1) == (from_type, into_type));
        let next = self.0.len();
        let index = index.unwrap_or_else(|| {
            self.0.push((from_type, into_type, Vec::new()));
            next
        });
        cuts.push(op.run);
        cuts.sort_unstable();
        let mut start = 0;
        for &end in cuts.iter() {
            if end > start {
                self.0[index].2.push(Piece {
                    from: op.from.address.saturating_add(start),
                    from_device,
                    into: op.into.address.saturating_add(start),
                    into_device,
                    len: end.saturating_sub(start),
                });
                start = end;
            }
        }
        Ok(())
    }

    /// What to request, behind a single byte if there are more pieces than one, and whether there are.
    ///
    /// UCX copies from one device in one stream, so that its order is ours: between devices the largest come first,
    /// and while they are copied the processor gets ahead with the many small ones.
    fn in_order(self) -> (bool, Vec<(MemType, MemType, Vec<Piece>)>) {
        let mut lists = self.0;
        for (from, into, pieces) in &mut lists {
            if (*from, *into) == (MemType::Vram, MemType::Vram) {
                pieces.sort_by_key(|piece| Reverse(piece.len));
            }
        }
        let many = lists.iter().map(|request| request.2.len()).sum::<usize>() > 1;
        if many && let Some((from, into, pieces)) = lists.first() {
            let byte = Piece { len: 1, ..pieces[0] };
            lists.insert(0, (*from, *into, vec![byte]));
        }
        (many, lists)
    }
}
