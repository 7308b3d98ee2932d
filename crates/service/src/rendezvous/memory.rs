//! A rendezvous inside one process.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::{
    Created, Key, Life, MAX_VALUE_BYTES, Reach, Rendezvous, RendezvousError, Revision, Snapshot,
};

/// A rendezvous inside one process: all clones are one store.
#[derive(Clone, Debug, Default)]
pub struct InProcess(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    revision: u64,
    sessions: u64,
    /// By key: the value and the session that keeps it.
    entries: BTreeMap<Key, (Vec<u8>, Option<u64>)>,
}

/// Keeps entries while it is held. One process cannot outlive itself: there is nothing to renew.
#[derive(Debug)]
pub struct InProcessSession {
    shared: Arc<Shared>,
    number: u64,
}

impl InProcess {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn write(
        &self,
        key: &Key,
        value: &[u8],
        life: Life<'_, InProcessSession>,
        replace: bool,
    ) -> Result<Created, RendezvousError> {
        if value.len() > MAX_VALUE_BYTES {
            return Err(RendezvousError::TooLarge { key: key.clone(), bytes: value.len() });
        }
        let session = match life {
            Life::Kept => None,
            Life::Session(session) => Some(session.number),
        };
        let mut state = self.0.state.lock();
        if !replace && let Some((found, _)) = state.entries.get(key) {
            return Ok(Created::Already(found.clone()));
        }
        state.revision += 1;
        state.entries.insert(key.clone(), (value.to_vec(), session));
        self.0.changed.notify_all();
        Ok(Created::New)
    }
}

impl State {
    fn snapshot(&self, prefix: &Key) -> Snapshot {
        let entries = self.entries.iter().filter(|(key, _)| key.is_under(prefix));
        Snapshot {
            revision: Revision(self.revision),
            entries: entries.map(|(key, (value, _))| (key.clone(), value.clone())).collect(),
            ..Snapshot::default()
        }
    }
}

impl Rendezvous for InProcess {
    type Session = InProcessSession;

    fn store(&self) -> &'static str {
        "in-process"
    }

    fn reach(&self) -> Reach {
        Reach::Process
    }

    fn session(&self, _ttl: Duration) -> Result<InProcessSession, RendezvousError> {
        let mut state = self.0.state.lock();
        state.sessions += 1;
        Ok(InProcessSession { shared: self.0.clone(), number: state.sessions })
    }

    fn put(
        &self,
        key: &Key,
        value: &[u8],
        life: Life<'_, InProcessSession>,
    ) -> Result<(), RendezvousError> {
        self.write(key, value, life, true).map(drop)
    }

    fn create(
        &self,
        key: &Key,
        value: &[u8],
        life: Life<'_, InProcessSession>,
    ) -> Result<Created, RendezvousError> {
        self.write(key, value, life, false)
    }

    fn remove(&self, key: &Key) -> Result<(), RendezvousError> {
        let mut state = self.0.state.lock();
        if state.entries.remove(key).is_some() {
            state.revision += 1;
            self.0.changed.notify_all();
        }
        Ok(())
    }

    fn list(&self, prefix: &Key) -> Result<Snapshot, RendezvousError> {
        Ok(self.0.state.lock().snapshot(prefix))
    }

    fn changed(
        &self,
        prefix: &Key,
        since: Revision,
        deadline: Instant,
    ) -> Result<Option<Snapshot>, RendezvousError> {
        let mut state = self.0.state.lock();
        while state.revision <= since.0 {
            if self.0.changed.wait_until(&mut state, deadline).timed_out() {
                return Ok(None);
            }
        }
        Ok(Some(state.snapshot(prefix)))
    }
}

impl Drop for InProcessSession {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        let before = state.entries.len();
        state.entries.retain(|_, (_, session)| *session != Some(self.number));
        if state.entries.len() != before {
            state.revision += 1;
            self.shared.changed.notify_all();
        }
    }
}
