use std::collections::HashMap;
use std::mem;
use std::slice;
use std::sync::Arc;

use parking_lot::Mutex;
use refit_planner::Capabilities;
use refit_pool::Region;

use super::blob::{Blob, Part};
use super::choice::{Choice, Ends, Facts, NotNear, choose};
use crate::envelope;
use crate::registry::Ranges;
use crate::suspicion::Suspicion;
use crate::{Cause, Peer, ReadOp, Status, Transport, TransportError, Written};

const NEAR: &str = "peer";
const FAR: &str = "nixl";

/// Most metadata read: that of two transports.
const MAX_METADATA: usize = 64 << 20;

/// Two transports as one; see the [module](super). Use it by the name [`AutoTransport`](super::AutoTransport).
#[derive(Debug)]
pub struct Auto<N: Transport, F: Transport> {
    name: String,
    /// Or why there is none.
    near: Result<N, String>,
    far: Result<F, String>,
    peers: Mutex<HashMap<String, Arc<Known>>>,
    suspect: Suspicion,
}

/// Memory registered with an [`Auto`] transport.
#[derive(Debug)]
pub struct AutoRegistration<N: Transport, F: Transport> {
    near: Option<N::Registration>,
    far: Option<F::Registration>,
}

/// A batch of reads prepared by an [`Auto`] transport: one of either of its two.
#[derive(Debug)]
pub struct AutoReads<N: Transport, F: Transport> {
    reads: Reads<N::Prepared, F::Prepared>,
    peer: Arc<Known>,
}

#[derive(Debug)]
enum Reads<N, F> {
    Near(N),
    Far(F),
    /// Taken out to be posted, and never put back: posting panicked.
    Away,
}

/// How a peer is read.
#[derive(Debug)]
struct Known {
    name: String,
    /// Its names in either transport, as far as it is connected there.
    near: Option<Peer>,
    far: Option<Peer>,
    way: Way,
    route: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Near,
    Far,
}

impl<N: Transport, F: Transport> Auto<N, F> {
    /// An agent of these two, under the far one's name if there is one. In the place of one that is missing, say why.
    ///
    /// # Errors
    /// [`TransportError::Start`] when both are missing.
    pub fn new(near: Result<N, String>, far: Result<F, String>) -> Result<Self, TransportError> {
        let name = match (&near, &far) {
            (_, Ok(far)) => far.agent().to_owned(),
            (Ok(near), Err(_)) => near.agent().to_owned(),
            (Err(no_near), Err(no_far)) => {
                let why = format!("{NEAR}: {no_near}; {FAR}: {no_far}");
                return Err(TransportError::Start {
                    agent: "auto".into(),
                    cause: Cause::NoRoute { why },
                });
            }
        };
        let peers = Mutex::default();
        Ok(Self { name, near, far, peers, suspect: Suspicion::default() })
    }

    /// The transport for peers nearby, or why there is none.
    ///
    /// # Errors
    /// What [`new`](Self::new) was given.
    pub fn near(&self) -> Result<&N, &str> {
        self.near.as_ref().map_err(String::as_str)
    }

    /// The transport for all others, or why there is none.
    ///
    /// # Errors
    /// What [`new`](Self::new) was given.
    pub fn far(&self) -> Result<&F, &str> {
        self.far.as_ref().map_err(String::as_str)
    }

    fn known(&self, peer: &Peer) -> Result<Arc<Known>, Cause> {
        self.peers.lock().get(&peer.name).cloned().ok_or(Cause::UnknownPeer)
    }

    fn connect_error(&self, peer: &str, cause: Cause) -> TransportError {
        TransportError::Connect { agent: self.name.clone(), peer: peer.into(), cause }
    }

    fn failed(&self, batch: &AutoReads<N, F>, cause: Cause) -> TransportError {
        TransportError::Failed { agent: self.name.clone(), peer: batch.peer.name.clone(), cause }
    }

    /// Nobody sees what has become of it.
    fn lost(&self, batch: &AutoReads<N, F>, cause: Cause) -> TransportError {
        self.suspect.raise();
        TransportError::Lost { agent: self.name.clone(), peer: batch.peer.name.clone(), cause }
    }

    /// Connects to a peer by one of the two.
    fn reach(&self, name: &str, blob: &Blob<'_>) -> Result<Known, Cause> {
        let facts = Facts {
            near: Ends::of(self.near.is_ok(), blob.near.is_some()),
            far: Ends::of(self.far.is_ok(), blob.far.is_some()),
            beyond_near: self.is_beyond_near(blob),
        };
        let (near, why) = match choose(facts) {
            choice @ (Choice::Near | Choice::NearThenFar) => match attempt(&self.near, blob.near) {
                Ok(peer) => (Some(peer), String::new()),
                Err(cause) if choice == Choice::Near => {
                    let why = format!("{NEAR}: {cause}; {FAR}: {}", self.missing(&self.far));
                    return Err(Cause::NoRoute { why });
                }
                Err(cause) => (None, cause.to_string()),
            },
            Choice::Far(not_near) => (None, self.explain(not_near)),
            Choice::None(not_near) => {
                let near = self.explain(not_near);
                let why = format!("{NEAR}: {near}; {FAR}: {}", self.missing(&self.far));
                return Err(Cause::NoRoute { why });
            }
        };
        if let (Some(peer), Ok(transport)) = (&near, &self.near) {
            let mut route = transport.route(peer);
            if facts.far != Ends::Both {
                route = format!("{route}; no {FAR}: {}", self.missing(&self.far));
            }
            return Ok(Known { name: name.into(), near, far: None, way: Way::Near, route });
        }
        let far = attempt(&self.far, blob.far)
            .map_err(|cause| Cause::NoRoute { why: format!("{NEAR}: {why}; {FAR}: {cause}") })?;
        let route = self.far.as_ref().map(|transport| transport.route(&far)).unwrap_or_default();
        let route = format!("{route}; not {NEAR}: {why}");
        Ok(Known { name: name.into(), near: None, far: Some(far), way: Way::Far, route })
    }

    /// Whether the peer registered memory with its far transport that its near one has not.
    fn is_beyond_near(&self, blob: &Blob<'_>) -> bool {
        let (Ok(near), Ok(far)) = (&self.near, &self.far) else { return false };
        let ranges = |backend, part: Option<Part<'_>>| -> Option<Ranges> {
            let Part { name, metadata } = part?;
            Some(envelope::decode(backend, name, metadata, MAX_METADATA).ok()?.ranges)
        };
        let (near, far) = (ranges(near.backend(), blob.near), ranges(far.backend(), blob.far));
        // What cannot be read here is refused, with its reason, by the transport that it is for.
        let (Some(near), Some(far)) = (near, far) else { return false };
        !far.iter().all(|(kind, address, len)| near.cover(kind, address, len, |_| {}))
    }

    fn explain(&self, not_near: NotNear) -> String {
        match not_near {
            NotNear::Ours => self.missing(&self.near),
            NotNear::Theirs => "the peer has none".into(),
            NotNear::Beyond => "the peer has registered memory that is not a GPU's too".into(),
        }
    }

    fn missing<T>(&self, ours: &Result<T, String>) -> String {
        match ours {
            Ok(_) => "the peer has none".into(),
            Err(why) => why.clone(),
        }
    }

    /// Posts the batches of one transport together. `take` moves a batch out if it is that transport's, `put` back.
    ///
    /// # Safety
    /// As [`Transport::post_all`].
    unsafe fn post_those<T: Transport>(
        &self,
        transport: &Result<T, String>,
        batches: &mut [AutoReads<N, F>],
        answers: &mut [Option<Result<Status, TransportError>>],
        take: impl Fn(&mut Reads<N::Prepared, F::Prepared>) -> Option<T::Prepared>,
        put: impl Fn(T::Prepared) -> Reads<N::Prepared, F::Prepared>,
    ) -> bool {
        let mut taken = Vec::new();
        let mut places = Vec::new();
        for (place, batch) in batches.iter_mut().enumerate() {
            if let Some(reads) = take(&mut batch.reads) {
                taken.push(reads);
                places.push(place);
            }
        }
        let posted = match (transport, places.first()) {
            (_, None) => Vec::new(),
            // SAFETY: the caller's promise. They go back to where they were, whatever is answered.
            (Ok(transport), _) => unsafe { transport.post_all(&mut taken) },
            (Err(_), Some(&first)) => vec![Err(self.failed(&batches[first], Cause::Foreign))],
        };
        for (&place, reads) in places.iter().zip(taken) {
            batches[place].reads = put(reads);
        }
        let mut well = true;
        for (&place, answer) in places.iter().zip(posted) {
            well &= answer.is_ok();
            answers[place] = Some(answer.map_err(|error| batches[place].named(error)));
        }
        well
    }
}

impl<N: Transport, F: Transport> AutoReads<N, F> {
    /// An error of the transport that the batch is for, by names that whoever asks knows.
    fn named(&self, error: TransportError) -> TransportError {
        named(error, self.peer.way, Some(&self.peer.name))
    }
}

/// Connects by one transport.
fn attempt<T: Transport>(
    transport: &Result<T, String>,
    part: Option<Part<'_>>,
) -> Result<Peer, Cause> {
    let (Ok(transport), Some(Part { name, metadata })) = (transport, part) else {
        return Err(Cause::UnknownPeer);
    };
    transport.connect(name, metadata).map_err(|error| match error {
        TransportError::Connect { cause, .. } => cause,
        other => Cause::NoRoute { why: other.to_string() },
    })
}

/// An error of one transport, which says so, about the peer by the name it has here.
fn named(mut error: TransportError, way: Way, by: Option<&str>) -> TransportError {
    let backend = match way {
        Way::Near => NEAR,
        Way::Far => FAR,
    };
    match &mut error {
        TransportError::Connect { agent, peer, .. }
        | TransportError::Prepare { agent, peer, .. }
        | TransportError::Failed { agent, peer, .. }
        | TransportError::Lost { agent, peer, .. } => {
            *agent = format!("{backend}/{agent}");
            if let Some(name) = by {
                name.clone_into(peer);
            }
        }
        TransportError::NotRegistered { peer, .. } | TransportError::Overlap { peer, .. } => {
            *peer = format!("{backend}/{}", by.unwrap_or(peer));
        }
        TransportError::Start { agent, .. }
        | TransportError::Register { agent, .. }
        | TransportError::Suspect { agent } => *agent = format!("{backend}/{agent}"),
        #[cfg(feature = "nixl")]
        TransportError::Unavailable(_) => {}
    }
    error
}

/// What one of two publishes, under the name that it has.
fn described<T: Transport>(
    transport: &Result<T, String>,
) -> Result<Option<(&str, Vec<u8>)>, TransportError> {
    let Ok(transport) = transport else { return Ok(None) };
    Ok(Some((transport.agent(), transport.metadata()?)))
}

/// Registers with one of two; none if it does not handle that kind of memory, and the other may.
fn register<T: Transport>(
    transport: &Result<T, String>,
    region: &Region,
    way: Way,
    other: bool,
) -> Result<Option<T::Registration>, TransportError> {
    let Ok(transport) = transport else { return Ok(None) };
    match transport.register(region) {
        Ok(registration) => Ok(Some(registration)),
        Err(TransportError::Register { cause: Cause::Kind, .. }) if other => Ok(None),
        Err(error) => Err(named(error, way, None)),
    }
}

impl<N: Transport, F: Transport> Transport for Auto<N, F> {
    type Registration = AutoRegistration<N, F>;
    type Prepared = AutoReads<N, F>;

    fn backend(&self) -> &'static str {
        "auto"
    }

    fn agent(&self) -> &str {
        &self.name
    }

    /// What both can do: the far one's, which can do less.
    fn capabilities(&self) -> Capabilities {
        match (&self.far, &self.near) {
            (Ok(far), _) => far.capabilities(),
            (_, Ok(near)) => near.capabilities(),
            (Err(_), Err(_)) => unreachable!("`new` refuses this"),
        }
    }

    fn capabilities_of(&self, peer: &Peer) -> Capabilities {
        let known = self.known(peer).ok();
        match known.as_deref() {
            Some(Known { way: Way::Near, near: Some(peer), .. }) => {
                self.near.as_ref().map_or_else(|_| self.capabilities(), |t| t.capabilities_of(peer))
            }
            Some(Known { way: Way::Far, far: Some(peer), .. }) => {
                self.far.as_ref().map_or_else(|_| self.capabilities(), |t| t.capabilities_of(peer))
            }
            _ => self.capabilities(),
        }
    }

    fn route(&self, peer: &Peer) -> String {
        match self.known(peer) {
            Ok(known) => known.route.clone(),
            Err(cause) => format!("auto: {cause}"),
        }
    }

    fn metadata(&self) -> Result<Vec<u8>, TransportError> {
        let near = described(&self.near).map_err(|error| named(error, Way::Near, None))?;
        let far = described(&self.far).map_err(|error| named(error, Way::Far, None))?;
        let near = near.as_ref().map(|(name, metadata)| Part { name, metadata });
        let far = far.as_ref().map(|(name, metadata)| Part { name, metadata });
        let blob = Blob { near, far };
        Ok(envelope::encode(self.backend(), &self.name, &Ranges::default(), &blob.encode()))
    }

    fn register(&self, region: &Region) -> Result<AutoRegistration<N, F>, TransportError> {
        let near = register(&self.near, region, Way::Near, self.far.is_ok())?;
        let far = register(&self.far, region, Way::Far, near.is_some())?;
        Ok(AutoRegistration { near, far })
    }

    fn deregister(&self, registration: AutoRegistration<N, F>) -> Result<(), TransportError> {
        let AutoRegistration { near, far } = registration;
        let near = match (&self.near, near) {
            (Ok(transport), Some(registration)) => transport.deregister(registration),
            _ => Ok(()),
        };
        let far = match (&self.far, far) {
            (Ok(transport), Some(registration)) => transport.deregister(registration),
            _ => Ok(()),
        };
        near.map_err(|error| named(error, Way::Near, None))?;
        far.map_err(|error| named(error, Way::Far, None))
    }

    fn connect(&self, name: &str, metadata: &[u8]) -> Result<Peer, TransportError> {
        let error = |cause| self.connect_error(name, cause);
        if name == self.name {
            return Err(error(Cause::Itself));
        }
        let envelope =
            envelope::decode(self.backend(), name, metadata, MAX_METADATA).map_err(error)?;
        let blob = Blob::decode(envelope.blob).map_err(error)?;
        let mut known = self.reach(name, &blob).map_err(error)?;
        tracing::debug!(agent = self.name, peer = name, route = known.route, "connected");
        let mut peers = self.peers.lock();
        if let Some(before) = peers.get(name) {
            // Batches of before may still be read the other way: it stays connected until the peer is left.
            known.near = known.near.or_else(|| before.near.clone());
            known.far = known.far.or_else(|| before.far.clone());
        }
        peers.insert(name.into(), Arc::new(known));
        Ok(Peer { name: name.into() })
    }

    fn disconnect(&self, peer: &Peer) -> Result<(), TransportError> {
        let known = self.known(peer).map_err(|cause| self.connect_error(&peer.name, cause))?;
        let leave = |way, error: TransportError| named(error, way, Some(&known.name));
        if let (Ok(transport), Some(inner)) = (&self.near, &known.near) {
            match transport.disconnect(inner) {
                // Left before, when leaving the other one failed.
                Ok(()) | Err(TransportError::Connect { cause: Cause::UnknownPeer, .. }) => {}
                Err(error) => return Err(leave(Way::Near, error)),
            }
        }
        if let (Ok(transport), Some(inner)) = (&self.far, &known.far) {
            transport.disconnect(inner).map_err(|error| leave(Way::Far, error))?;
        }
        self.peers.lock().remove(&peer.name);
        Ok(())
    }

    fn prepare(&self, peer: &Peer, reads: &[ReadOp]) -> Result<AutoReads<N, F>, TransportError> {
        self.suspect.check(self.agent())?;
        let error = |cause| TransportError::Prepare {
            agent: self.name.clone(),
            peer: peer.name.clone(),
            cause,
        };
        let known = self.known(peer).map_err(error)?;
        let prepared = match (known.way, &self.near, &self.far) {
            (Way::Near, Ok(near), _) => {
                let inner = known.near.as_ref().ok_or(Cause::UnknownPeer).map_err(error)?;
                near.prepare(inner, reads).map(Reads::Near)
            }
            (Way::Far, _, Ok(far)) => {
                let inner = known.far.as_ref().ok_or(Cause::UnknownPeer).map_err(error)?;
                far.prepare(inner, reads).map(Reads::Far)
            }
            _ => return Err(error(Cause::UnknownPeer)),
        };
        match prepared {
            Ok(reads) => Ok(AutoReads { reads, peer: known }),
            Err(error) => Err(named(error, known.way, Some(&known.name))),
        }
    }

    fn written<'a>(&self, prepared: &'a AutoReads<N, F>) -> &'a [Written] {
        match (&prepared.reads, &self.near, &self.far) {
            (Reads::Near(reads), Ok(near), _) => near.written(reads),
            (Reads::Far(reads), _, Ok(far)) => far.written(reads),
            _ => &[],
        }
    }

    fn reads(&self, prepared: &AutoReads<N, F>) -> usize {
        match (&prepared.reads, &self.near, &self.far) {
            (Reads::Near(reads), Ok(near), _) => near.reads(reads),
            (Reads::Far(reads), _, Ok(far)) => far.reads(reads),
            _ => 0,
        }
    }

    unsafe fn post(&self, prepared: &mut AutoReads<N, F>) -> Result<Status, TransportError> {
        // SAFETY: the caller's promise.
        let answers = unsafe { self.post_all(slice::from_mut(prepared)) };
        answers.into_iter().next().unwrap_or(Ok(Status::Done))
    }

    /// Those of the near transport first, together, for they are quickly started; then those of the far one.
    unsafe fn post_all(
        &self,
        batches: &mut [AutoReads<N, F>],
    ) -> Vec<Result<Status, TransportError>> {
        if let Err(error) = self.suspect.check(self.agent()) {
            return vec![Err(error)];
        }
        let mut answers: Vec<_> = batches.iter().map(|_| None).collect();
        let near = |reads: &mut _| match mem::replace(reads, Reads::Away) {
            Reads::Near(near) => Some(near),
            other => {
                *reads = other;
                None
            }
        };
        let far = |reads: &mut _| match mem::replace(reads, Reads::Away) {
            Reads::Far(far) => Some(far),
            other => {
                *reads = other;
                None
            }
        };
        // SAFETY: the caller's promise.
        if unsafe { self.post_those(&self.near, batches, &mut answers, near, Reads::Near) } {
            // SAFETY: the caller's promise.
            unsafe { self.post_those(&self.far, batches, &mut answers, far, Reads::Far) };
        }
        for (batch, answer) in batches.iter().zip(&mut answers) {
            if matches!(batch.reads, Reads::Away) {
                *answer = Some(Err(self.lost(batch, Cause::State { state: "lost" })));
            }
        }
        let tried = answers.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        answers.truncate(tried);
        // The others were posted out of turn: one between them that was not has an answer too.
        let skipped = Cause::State { state: "not posted, because another one failed" };
        let answers = answers.into_iter().zip(batches.iter());
        answers
            .map(|(answer, batch)| {
                answer.unwrap_or_else(|| Err(self.failed(batch, skipped.clone())))
            })
            .collect()
    }

    fn poll(&self, prepared: &mut AutoReads<N, F>) -> Result<Status, TransportError> {
        let polled = match (&mut prepared.reads, &self.near, &self.far) {
            (Reads::Near(reads), Ok(near), _) => near.poll(reads),
            (Reads::Far(reads), _, Ok(far)) => far.poll(reads),
            _ => return Err(self.lost(prepared, Cause::Foreign)),
        };
        polled.map_err(|error| prepared.named(error))
    }

    fn suspect(&self, prepared: &AutoReads<N, F>) {
        self.suspect.raise();
        match (&prepared.reads, &self.near, &self.far) {
            (Reads::Near(reads), Ok(near), _) => near.suspect(reads),
            (Reads::Far(reads), _, Ok(far)) => far.suspect(reads),
            _ => {}
        }
    }

    fn unsettled(&self) -> usize {
        self.near.as_ref().map_or(0, Transport::unsettled)
            + self.far.as_ref().map_or(0, Transport::unsettled)
    }
}
