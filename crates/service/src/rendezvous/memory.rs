//! A rendezvous inside one process.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::removals::Removals;
use super::{
    Created, Key, Life, Reach, Rendezvous, RendezvousError, Revision, Snapshot, check_ttl,
    check_value,
};

const STORE: &str = "in-process";

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
    entries: BTreeMap<Key, Entry>,
    removals: Removals,
}

#[derive(Debug)]
struct Entry {
    value: Vec<u8>,
    /// The session that keeps it.
    session: Option<u64>,
    /// The revision that wrote it.
    modified: u64,
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
        check_value(key, value)?;
        let session = match life {
            Life::Kept => None,
            Life::Session(session) if !Arc::ptr_eq(&session.shared, &self.0) => {
                return Err(RendezvousError::ForeignSession { store: STORE });
            }
            Life::Session(session) => Some(session.number),
        };
        let mut state = self.0.state.lock();
        if !replace && let Some(found) = state.entries.get(key) {
            return Ok(Created::Already(found.value.clone()));
        }
        state.revision += 1;
        let entry = Entry { value: value.to_vec(), session, modified: state.revision };
        state.entries.insert(key.clone(), entry);
        self.0.changed.notify_all();
        Ok(Created::New)
    }
}

impl State {
    fn snapshot(&self, prefix: &Key) -> Snapshot {
        let entries = self.entries.iter().filter(|(key, _)| key.is_under(prefix));
        Snapshot {
            revision: Revision(self.revision),
            entries: entries.map(|(key, entry)| (key.clone(), entry.value.clone())).collect(),
            ..Snapshot::default()
        }
    }

    /// Whether something at or under `prefix` is no more what it was.
    fn differs(&self, prefix: &Key, since: u64) -> bool {
        let mut entries = self.entries.iter();
        entries.any(|(key, entry)| entry.modified > since && key.is_under(prefix))
            || self.removals.touch(prefix, since)
    }

    fn removed(&mut self, key: Key) {
        let revision = self.revision;
        self.removals.push(revision, key);
    }
}

impl Rendezvous for InProcess {
    type Session = InProcessSession;

    fn store(&self) -> &'static str {
        STORE
    }

    fn reach(&self) -> Reach {
        Reach::Process
    }

    fn session(&self, ttl: Duration) -> Result<InProcessSession, RendezvousError> {
        check_ttl(ttl)?;
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
            state.removed(key.clone());
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
        while state.revision <= since.0 || !state.differs(prefix, since.0) {
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
        let mine = |entry: &Entry| entry.session == Some(self.number);
        let keys = state.entries.iter().filter(|(_, entry)| mine(entry));
        let keys: Vec<Key> = keys.map(|(key, _)| key.clone()).collect();
        if keys.is_empty() {
            return;
        }
        state.revision += 1;
        for key in keys {
            state.entries.remove(&key);
            state.removed(key);
        }
        self.shared.changed.notify_all();
    }
}
