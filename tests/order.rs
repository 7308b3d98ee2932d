//! P14, as far as it is not a device's: nothing is landed before its reads have settled, headers are read behind the last
//! byte of data, and nobody gets to see parameters before both, on every path, that of another attempt included.
//!
//! A transport writes down what it is asked for and what becomes of it, and looks at the live parameters whenever it is
//! polled. On a device the landing kernel takes the processor's place, launched behind the same completions.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::ptr;
use std::sync::{Arc, Mutex};

use refit::planner::{Capabilities, LowerOptions, Mode};
use refit::pool::Region;
use refit::transport::local::{LocalOptions, LocalTransport, Network};
use refit::transport::{Cause, Peer, ReadOp, Status, Transport, TransportError, Written};
use refit::{
    Failed, HEADER_BYTES, InvalidTarget, Prepared, Publication, Source, Target, TargetOptions,
    Unfinished,
};
use refit_tests::{models, oracle, ranks};

/// What was read, and what happened to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Posted(What),
    Settled(What),
    Failed(What),
    /// Bytes were copied or converted to their places, all that were asked for.
    Landed,
    /// Others may read it.
    Published,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Data,
    Header,
}

#[derive(Debug, Default)]
struct Log {
    events: Vec<Event>,
    /// Address and length of live parameters that are not to change while reads are under way, and what they were.
    live: Vec<(u64, usize, Vec<u8>)>,
    pending: usize,
    /// Reads of data that are let through before one fails.
    fails: Option<usize>,
}

fn bytes(address: u64, len: usize) -> Vec<u8> {
    let start = ptr::with_exposed_provenance::<u8>(usize::try_from(address).unwrap());
    // SAFETY: the parameters live as long as the test's target. This runs within a poll of the only thread, which writes
    // staging memory alone.
    unsafe { std::slice::from_raw_parts(start, len) }.to_vec()
}

impl Log {
    fn note(&mut self) {
        for (address, len, held) in &mut self.live {
            *held = bytes(*address, *len);
        }
    }

    fn look(&self) {
        for (address, len, held) in &self.live {
            assert!(
                bytes(*address, *len) == *held,
                "live parameters changed while reads were under way"
            );
        }
    }
}

#[derive(Debug)]
struct Logged {
    inner: LocalTransport,
    log: Arc<Mutex<Log>>,
}

#[derive(Debug)]
struct Reads {
    inner: <LocalTransport as Transport>::Prepared,
    what: What,
}

impl Transport for Logged {
    type Registration = <LocalTransport as Transport>::Registration;
    type Prepared = Reads;

    fn backend(&self) -> &'static str {
        "logged"
    }

    fn agent(&self) -> &str {
        self.inner.agent()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn metadata(&self) -> Result<Vec<u8>, TransportError> {
        self.inner.metadata()
    }

    fn register(&self, region: &Region) -> Result<Self::Registration, TransportError> {
        self.inner.register(region)
    }

    fn deregister(&self, registration: Self::Registration) -> Result<(), TransportError> {
        self.inner.deregister(registration)
    }

    fn connect(&self, name: &str, metadata: &[u8]) -> Result<Peer, TransportError> {
        self.inner.connect(name, metadata)
    }

    fn disconnect(&self, peer: &Peer) -> Result<(), TransportError> {
        self.inner.disconnect(peer)
    }

    fn prepare(&self, peer: &Peer, reads: &[ReadOp]) -> Result<Reads, TransportError> {
        // No parameter of the model has so few bytes in one read.
        let header = matches!(reads, [read] if read.run == HEADER_BYTES as u64);
        let what = if header { What::Header } else { What::Data };
        Ok(Reads { inner: self.inner.prepare(peer, reads)?, what })
    }

    fn written<'a>(&self, prepared: &'a Reads) -> &'a [Written] {
        self.inner.written(&prepared.inner)
    }

    fn reads(&self, prepared: &Reads) -> usize {
        self.inner.reads(&prepared.inner)
    }

    unsafe fn post(&self, prepared: &mut Reads) -> Result<Status, TransportError> {
        let mut log = self.log.lock().unwrap();
        if log.pending == 0 {
            log.note();
        }
        log.look();
        // SAFETY: the caller's promise is what this asks for.
        let posted = unsafe { self.inner.post(&mut prepared.inner) };
        log.events.push(Event::Posted(prepared.what));
        log.pending += usize::from(matches!(posted, Ok(Status::Pending)));
        posted
    }

    fn poll(&self, prepared: &mut Reads) -> Result<Status, TransportError> {
        let mut log = self.log.lock().unwrap();
        log.look();
        let mut status = self.inner.poll(&mut prepared.inner);
        log.look();
        if prepared.what == What::Data && status == Ok(Status::Done) {
            match &mut log.fails {
                Some(0) => {
                    log.fails = None;
                    let (agent, peer) = (self.agent().to_owned(), "trainer".to_owned());
                    status = Err(TransportError::Failed { agent, peer, cause: Cause::PeerGone });
                }
                Some(left) => *left -= 1,
                None => {}
            }
        }
        let event = match status {
            Ok(Status::Pending) => return status,
            Ok(Status::Done) => Event::Settled(prepared.what),
            Err(_) => Event::Failed(prepared.what),
        };
        log.pending -= 1;
        log.events.push(event);
        status
    }

    fn suspect(&self, prepared: &Reads) {
        self.inner.suspect(&prepared.inner);
    }
}

struct World {
    sources: Vec<Source<LocalTransport>>,
    published: Vec<Publication>,
    log: Arc<Mutex<Log>>,
    target: Target<Logged>,
}

fn world(options: TargetOptions) -> World {
    let network = Network::new();
    let trainer = ranks::agent(&network, "trainer");
    let sources: Vec<_> = models::source(&models::tiny(), 2, 1, 1)
        .iter()
        .map(|layout| ranks::source(&trainer, layout))
        .collect();
    let published = sources.iter().map(|source| source.publication().unwrap()).collect();
    let log = Arc::<Mutex<Log>>::default();
    let slow = LocalOptions::default().with_bytes_per_poll(1_000);
    let inner = LocalTransport::with_options(&network, "engine", slow).unwrap();
    let engine = Arc::new(Logged { inner, log: log.clone() });
    let wanted = models::target(&models::tiny(), 1).remove(0);
    let (target, _, _) = ranks::target(&engine, &wanted, options);
    if options.lower.mode == Mode::Staged {
        let live = target.params().map(|(_, memory)| (memory.address(), memory.len(), Vec::new()));
        log.lock().unwrap().live = live.collect();
    }
    World { sources, published, log, target }
}

/// One attempt, which may fail.
fn attempt(
    prepared: Prepared<Logged>,
    sources: &[Source<LocalTransport>],
    log: &Mutex<Log>,
) -> Result<Target<Logged>, Unfinished<Logged>> {
    let request = prepared.digest_request();
    let pulled = prepared
        .pull()
        .and_then(|pulling| pulling.wait(ranks::soon()))
        .map_err(|Failed { state, .. }| state)?;
    let landed = pulled.land().unwrap();
    log.lock().unwrap().events.push(Event::Landed);
    // What is compared is what has landed.
    let answers: Vec<_> = sources.iter().map(|source| source.digests(&request).unwrap()).collect();
    let (target, _) = landed.verify(&answers).unwrap().install().refreshed();
    Ok(target)
}

/// What an attempt that ended well may have done, in this order; `waves` and ranks aside.
fn check(events: &[Event]) {
    use Event::{Landed, Posted, Published, Settled};
    use What::{Data, Header};
    let last = |event| events.iter().rposition(|it| *it == event).unwrap();
    let first = |event| events.iter().position(|it| *it == event).unwrap();
    let count = |event| events.iter().filter(|it| **it == event).count();
    assert_eq!(count(Posted(Data)), count(Settled(Data)), "{events:?}");
    assert_eq!(count(Posted(Header)), count(Settled(Header)), "{events:?}");
    assert_eq!((count(Landed), count(Published)), (1, 1), "{events:?}");
    // The last look at the headers comes behind the last byte, and all of it behind what was looked at first.
    let behind = events.iter().rposition(|it| *it == Settled(Data)).unwrap();
    assert_eq!(
        events[behind + 1..].iter().filter(|it| **it == Posted(Header)).count(),
        2,
        "{events:?}"
    );
    assert!(
        first(Posted(Header)) < first(Posted(Data)) || count(Posted(Header)) == 2,
        "{events:?}"
    );
    assert!(last(Posted(Data)) < last(Posted(Header)), "{events:?}");
    assert!(
        last(Settled(Header)) < first(Landed) && first(Landed) < first(Published),
        "{events:?}"
    );
}

#[test]
fn p14_nobody_sees_what_has_not_settled_and_landed() {
    let staged = LowerOptions::default().with_mode(Mode::Staged);
    let waves = LowerOptions::default().with_mode(Mode::Staged).with_wave_bytes(2_000);
    for lower in [LowerOptions::default(), staged, waves] {
        for fails in [None, Some(0), Some(1)] {
            let World { sources, published, log, mut target } =
                world(TargetOptions::default().with_lower(lower));
            let wanted = oracle::buffers(target.layout());
            log.lock().unwrap().fails = fails;
            let prepared = target.prepare(&published).unwrap();
            target = match attempt(prepared, &sources, &log) {
                Ok(target) => {
                    assert_eq!(fails, None);
                    target
                }
                Err(state) => {
                    let events = std::mem::take(&mut log.lock().unwrap().events);
                    assert!(events.contains(&Event::Failed(What::Data)), "{events:?}");
                    assert!(!events.contains(&Event::Landed), "{events:?}");
                    let prepared = match state {
                        Unfinished::Whole(target) => target.prepare(&published).unwrap(),
                        Unfinished::Invalid(target) => {
                            InvalidTarget::prepare(target, &published).unwrap()
                        }
                        other => panic!("{other:?}"),
                    };
                    attempt(prepared, &sources, &log).unwrap()
                }
            };
            assert_eq!(ranks::held(&target), wanted);
            let lent = target.lend(0).unwrap();
            assert!(lent.offered().is_some());
            let mut log = log.lock().unwrap();
            log.events.push(Event::Published);
            check(&log.events);
        }
    }
}
