//! Whom an agent knows.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::Cause;
use crate::registry::Ranges;

/// One incarnation of a peer. `L` is how the backend reaches it.
#[derive(Debug)]
pub(crate) struct PeerState<L> {
    pub(crate) name: String,
    pub(crate) link: L,
    ranges: RwLock<Arc<Ranges>>,
    connected: AtomicBool,
    in_flight: AtomicUsize,
}

impl<L> PeerState<L> {
    pub(crate) fn new(name: &str, link: L, ranges: Ranges) -> Self {
        Self {
            name: name.into(),
            link,
            ranges: RwLock::new(Arc::new(ranges)),
            connected: AtomicBool::new(true),
            in_flight: AtomicUsize::new(0),
        }
    }

    /// What it published last.
    pub(crate) fn ranges(&self) -> Arc<Ranges> {
        Arc::clone(&self.ranges.read())
    }

    pub(crate) fn publish(&self, ranges: Ranges) {
        *self.ranges.write() = Arc::new(ranges);
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    pub(crate) fn close(&self) {
        self.connected.store(false, Ordering::Release);
    }

    pub(crate) fn started(&self) {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn settled(&self) {
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }
}

/// The peers of one agent, by name.
#[derive(Debug)]
pub(crate) struct Peers<L>(Mutex<HashMap<String, Arc<PeerState<L>>>>);

impl<L> Peers<L> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(HashMap::new()))
    }

    pub(crate) fn get(&self, name: &str) -> Result<Arc<PeerState<L>>, Cause> {
        self.0.lock().get(name).map(Arc::clone).ok_or(Cause::UnknownPeer)
    }

    pub(crate) fn insert(&self, state: Arc<PeerState<L>>) {
        if let Some(old) = self.0.lock().insert(state.name.clone(), state) {
            old.close();
        }
    }

    /// Forgets a peer, unless reads from it have not settled.
    pub(crate) fn remove(&self, name: &str) -> Result<(), Cause> {
        let mut peers = self.0.lock();
        let batches = peers.get(name).ok_or(Cause::UnknownPeer)?.in_flight();
        if batches > 0 {
            return Err(Cause::InFlight { batches });
        }
        if let Some(state) = peers.remove(name) {
            state.close();
        }
        Ok(())
    }
}
