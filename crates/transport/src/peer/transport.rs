use std::collections::BTreeMap;
use std::slice;
use std::sync::Arc;

use refit_kernels::{Effect, Move, Mover, Table};
use refit_planner::Capabilities;
use refit_pool::Region;
use refit_pool::cuda::{Device, Stream};

use super::agent::Agent;
use super::batch::{Failure, Parts, PeerReads};
use super::blob::{Allocation, Blob, DeviceId};
use super::driver::{Mapping, export};
use super::engine::{Copy, Engine};
use super::link::{Link, Mapped, Source};
use super::pieces::{Piece, Uncut};
use super::{Engines, PeerOptions};
use crate::envelope;
use crate::peers::{PeerState, Peers};
use crate::reads::{check_shapes, written};
use crate::registry::Registered;
use crate::suspicion::Suspicion;
use crate::{Cause, Peer, ReadOp, Side, Status, Transport, TransportError, Written};

/// An agent of one GPU, which reads the memory of other GPUs of its host.
///
/// Everything it starts is queued on the stream it was given, behind what that holds.
#[derive(Debug)]
pub struct PeerTransport {
    agent: Arc<Agent>,
    engine: Arc<Engine>,
    peers: Peers<Link>,
    suspect: Suspicion,
    options: PeerOptions,
}

/// Memory registered with a [`PeerTransport`].
#[derive(Debug)]
pub struct PeerRegistration(Registered<Allocation>);

impl PeerTransport {
    /// An agent of the stream's device, named by the prefix and a random incarnation. Loads the kernel, once a device.
    ///
    /// # Errors
    /// [`TransportError::Start`] when the prefix is not a plain name, or the driver refuses the kernel or a stream.
    pub fn new(stream: Arc<Stream>, options: PeerOptions) -> Result<Self, TransportError> {
        let start = || {
            let agent = Agent::start(&options.prefix, stream.device())?;
            let mover = Mover::new(stream.device()).map_err(kernel("loading the kernel"))?;
            let engine = Engine::new(Arc::clone(&stream), mover, options.copy_streams)?;
            Ok((agent, engine))
        };
        let (agent, engine) = start()
            .map_err(|cause| TransportError::Start { agent: options.prefix.clone(), cause })?;
        Ok(Self { agent, engine, peers: Peers::new(), suspect: Suspicion::default(), options })
    }

    /// The device whose memory it registers and writes.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.engine.device()
    }

    /// The stream that its work is queued on.
    #[must_use]
    pub fn stream(&self) -> &Arc<Stream> {
        &self.engine.stream
    }

    /// The kernel, for others that work on the same device.
    #[must_use]
    pub fn mover(&self) -> &Arc<Mover> {
        &self.engine.mover
    }

    /// Connects, or learns what a known incarnation has registered since.
    fn learn(&self, name: &str, metadata: &[u8]) -> Result<(), Cause> {
        if name == self.agent() {
            return Err(Cause::Itself);
        }
        let envelope = envelope::decode(self.backend(), name, metadata, self.options.max_metadata)?;
        let blob = Blob::decode(envelope.blob, &envelope.ranges)?;
        let known = self.peers.get(name).ok();
        if let Some(state) = known.filter(|state| state.link.incarnation == blob.incarnation) {
            state.link.map(self.device(), &blob, &envelope.ranges)?;
            state.publish(envelope.ranges);
            return Ok(());
        }
        let link = Link::new(&self.agent, &blob)?;
        link.map(self.device(), &blob, &envelope.ranges)?;
        tracing::debug!(agent = self.agent(), peer = name, route = link.route, "connected");
        self.peers.insert(Arc::new(PeerState::new(name, link, envelope.ranges)));
        Ok(())
    }

    /// Which engine a piece of a read goes to.
    fn is_for_copy_engine(&self, piece: &Piece, bulk: bool) -> bool {
        piece.is_plain()
            && match self.options.engines {
                Engines::AsPlanned => bulk && self.options.capabilities.bulk.is_some(),
                Engines::Kernel => false,
                Engines::Copy => true,
            }
    }

    /// What the engines are to do for these reads.
    fn work(&self, view: &Mapped, reads: &[ReadOp]) -> Result<Work, Cause> {
        let mut own = BTreeMap::new();
        self.agent.registry.published(|allocation| {
            own.insert(allocation.base, allocation.len);
        });
        let own = |address: u64| {
            let (base, len) = own.range(..=address).next_back()?;
            len.checked_sub(address - base).filter(|&room| room > 0)
        };
        let room = |address: u64| view.find(address).map(|found| found.room);
        let mut work = Work::default();
        let (mut pieces, mut copies) = (Vec::new(), Vec::new());
        for (read, op) in reads.iter().enumerate() {
            // The ranges were found to be registered, and registrations lie in allocations.
            let uncut = |uncut| match uncut {
                Uncut::Element => Cause::Divided { read },
                Uncut::Outside => Cause::Metadata { part: "a range outside every allocation" },
            };
            Piece::of(op).cut(&room, &mut pieces).map_err(uncut)?;
            for mut piece in pieces.drain(..) {
                let found = view.find(piece.from).ok_or_else(|| uncut(Uncut::Outside))?;
                if let Some(mapping) = found.mapping {
                    work.mappings.entry(found.base).or_insert_with(|| Arc::clone(mapping));
                }
                piece.from = found.address;
                if self.is_for_copy_engine(&piece, op.bulk) {
                    piece.cut_target(&own, &mut copies).map_err(uncut)?;
                } else {
                    work.moves.push(Move {
                        from: piece.from,
                        into: piece.into,
                        run: piece.run,
                        dims: piece.dims,
                        effect: Effect::Transform(piece.transform),
                    });
                }
            }
            for Piece { from, into, run, .. } in copies.drain(..) {
                let len = usize::try_from(run).map_err(|_| Cause::Wraps)?;
                work.copies.push(Copy { from, into, len });
            }
        }
        Ok(work)
    }

    fn connect_error(&self, peer: &str, cause: Cause) -> TransportError {
        TransportError::Connect { agent: self.agent().into(), peer: peer.into(), cause }
    }

    fn failed(&self, batch: &PeerReads, Failure { cause, settled }: Failure) -> TransportError {
        let (agent, peer) = (self.agent().into(), batch.parts().peer.name.clone());
        if settled {
            TransportError::Failed { agent, peer, cause }
        } else {
            self.suspect.raise();
            TransportError::Lost { agent, peer, cause }
        }
    }
}

/// What the engines do for a batch.
#[derive(Default)]
struct Work {
    moves: Vec<Move>,
    copies: Vec<Copy>,
    /// What has to stay mapped meanwhile.
    mappings: BTreeMap<u64, Arc<Mapping>>,
}

impl Transport for PeerTransport {
    type Registration = PeerRegistration;
    type Prepared = PeerReads;

    fn backend(&self) -> &'static str {
        "peer"
    }

    fn agent(&self) -> &str {
        &self.agent.name
    }

    fn capabilities(&self) -> Capabilities {
        self.options.declared()
    }

    fn route(&self, peer: &Peer) -> String {
        match self.peers.get(&peer.name) {
            Ok(state) => format!("peer: {}", state.link.route),
            Err(cause) => format!("peer: {cause}"),
        }
    }

    fn metadata(&self) -> Result<Vec<u8>, TransportError> {
        let mut allocations = BTreeMap::new();
        let ranges = self.agent.registry.published(|allocation| {
            allocations.insert(allocation.base, *allocation);
        });
        let device = self.device();
        let blob = Blob {
            process: self.agent.process,
            incarnation: self.agent.incarnation,
            device: DeviceId { ordinal: device.ordinal(), uuid: device.uuid() },
            allocations: allocations.into_values().collect(),
        };
        Ok(envelope::encode(self.backend(), self.agent(), &ranges, &blob.encode()))
    }

    fn register(&self, region: &Region) -> Result<PeerRegistration, TransportError> {
        let device = self.device();
        let make = |region: &Region| match region.kind() {
            kind if kind == device.kind() => export(device, region),
            refit_pool::MemoryKind::Cuda(_) => Err(Cause::Device { agent: device.ordinal() }),
            _ => Err(Cause::Kind),
        };
        let registered = self.agent.registry.register(region, make);
        registered.map(PeerRegistration).map_err(|cause| {
            TransportError::register(self.agent(), region.kind(), region.len(), cause)
        })
    }

    fn deregister(&self, registration: PeerRegistration) -> Result<(), TransportError> {
        self.agent.registry.check_own(self.agent(), &registration.0)
    }

    fn connect(&self, name: &str, metadata: &[u8]) -> Result<Peer, TransportError> {
        self.learn(name, metadata).map_err(|cause| self.connect_error(name, cause))?;
        Ok(Peer { name: name.into() })
    }

    fn disconnect(&self, peer: &Peer) -> Result<(), TransportError> {
        self.peers.remove(&peer.name).map_err(|cause| self.connect_error(&peer.name, cause))
    }

    fn prepare(&self, peer: &Peer, reads: &[ReadOp]) -> Result<PeerReads, TransportError> {
        self.suspect.check(self.agent())?;
        let error = |cause| TransportError::prepare(self.agent(), &peer.name, cause);
        let state = self.peers.get(&peer.name).map_err(error)?;
        check_shapes(reads, &self.capabilities()).map_err(error)?;
        // In this order: a peer that is learnt of again meanwhile has mapped at least what it published.
        let published = state.ranges();
        let view = state.link.view();
        let sources = Source::list(&published, reads).map_err(|read| {
            TransportError::not_registered(&peer.name, Side::Remote, read, reads[read].from.len)
        })?;
        let holds = self.agent.registry.hold_targets(&peer.name, reads)?;
        let written = written(&peer.name, reads)?;
        let work = self.work(&view, reads).map_err(error)?;
        let table = (!work.moves.is_empty())
            .then(|| Table::new(&work.moves).and_then(|table| self.engine.mover.upload(&table)))
            .transpose()
            .map_err(|failure| error(kernel("building the kernel's table")(failure)))?;
        Ok(PeerReads::new(Parts {
            table,
            copies: work.copies,
            _mappings: work.mappings,
            _holds: holds,
            engine: Arc::clone(&self.engine),
            peer: state,
            sources,
            written,
            reads: reads.len(),
        }))
    }

    fn written<'a>(&self, prepared: &'a PeerReads) -> &'a [Written] {
        &prepared.parts().written
    }

    fn reads(&self, prepared: &PeerReads) -> usize {
        prepared.parts().reads
    }

    unsafe fn post(&self, prepared: &mut PeerReads) -> Result<Status, TransportError> {
        // SAFETY: the caller's promise.
        let answers = unsafe { self.post_all(slice::from_mut(prepared)) };
        answers.into_iter().next().unwrap_or(Ok(Status::Done))
    }

    /// One launch of the kernel for up to 64 batches, of however many peers.
    unsafe fn post_all(&self, batches: &mut [PeerReads]) -> Vec<Result<Status, TransportError>> {
        let mut answers = Vec::with_capacity(batches.len());
        // Those before the first that cannot be posted, and what each has to hold meanwhile.
        let mut ready = Vec::with_capacity(batches.len());
        let mut refused = None;
        for (index, batch) in batches.iter().enumerate() {
            let held = self.suspect.check(self.agent()).and_then(|()| {
                if !Arc::ptr_eq(&batch.parts().engine, &self.engine) {
                    let cause = Cause::Foreign;
                    return Err(self.failed(batch, Failure { cause, settled: true }));
                }
                batch.ready().map_err(|failure| self.failed(batch, failure))
            });
            match held {
                Ok(_) if batch.parts().reads == 0 => answers.push(Ok(Status::Done)),
                Ok(held) => {
                    ready.push((index, held));
                    answers.push(Ok(Status::Pending));
                }
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            }
        }
        if !ready.is_empty() {
            let parts = || ready.iter().map(|(index, _)| batches[*index].parts());
            let tables: Vec<_> = parts().filter_map(|parts| parts.table.as_ref()).collect();
            let copies: Vec<_> = parts().map(|parts| parts.copies.as_slice()).collect();
            // SAFETY: each batch keeps what it reads mapped (`_mappings`, and `held`) and what it writes allocated, until
            // its flight is done, or for ever where that is not seen. Nobody accesses what it writes, says the caller,
            // and by `prepare` every address lies in published or registered memory.
            match unsafe { self.engine.launch(&tables, &copies) } {
                Ok(flight) => {
                    for (index, held) in ready {
                        batches[index].fly(Arc::clone(&flight), held);
                    }
                }
                Err(fault) if fault.started => {
                    for (index, held) in ready {
                        batches[index].lose(held);
                        let failure = Failure { cause: fault.cause.clone(), settled: false };
                        answers[index] = Err(self.failed(&batches[index], failure));
                    }
                }
                Err(fault) => {
                    let (first, _) = ready[0];
                    answers.truncate(first);
                    let failure = Failure { cause: fault.cause, settled: true };
                    answers.push(Err(self.failed(&batches[first], failure)));
                    return answers;
                }
            }
        }
        answers.extend(refused.map(Err));
        answers
    }

    fn poll(&self, prepared: &mut PeerReads) -> Result<Status, TransportError> {
        prepared.poll().map_err(|failure| self.failed(prepared, failure))
    }

    fn suspect(&self, _prepared: &PeerReads) {
        self.suspect.raise();
    }
}

fn kernel(call: &'static str) -> impl Fn(refit_kernels::KernelError) -> Cause {
    move |error| Cause::Call { call, status: error.to_string() }
}
