//! A rendezvous in a directory that all processes can see.
//!
//! ```text
//! states/<n>          what all entries are after n changes; the last is what holds (chain.rs)
//! values/<id>         values too large to stand in a state
//! sessions/<id>       heartbeats (heartbeat.rs)
//! drafts/<id>         what is being written
//! ```

mod chain;
mod heartbeat;
mod state;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak, mpsc};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use self::chain::{Chain, Head, failed};
use self::heartbeat::Observer;
use self::state::{Entry, INLINE, State, Value};
use super::{
    Created, Key, Life, Reach, Rendezvous, RendezvousError, Revision, Snapshot, check_ttl,
    check_value,
};
use crate::random::random;

const STORE: &str = "directory";

/// How often a process that waits looks: two system calls. Asked instead of told, because the system tells nothing of what
/// other hosts do in a shared directory, and because watches are scarce (128 for each user, as Linux comes).
const POLL: Duration = Duration::from_millis(2);

/// How long a write may be behind others.
const PATIENCE: Duration = Duration::from_secs(5);

/// A rendezvous in a directory: all clones, and all that were made of the same path, are one store.
///
/// On one host everything that [`Rendezvous`] promises holds. On NFS it does when all mounts have `lookupcache=none` or
/// `lookupcache=positive`; otherwise a client may believe for a while that a file is not there, and read what is old. A
/// file system without hard links is refused when something is written. What was written is not forced to the disk: when
/// a host crashes, end all processes and remove the directory.
///
/// Who may read and write there is up to the file system. Where hosts share it, let a [`Sealed`](super::Sealed) with a key say
/// whose entries count.
///
/// Every change writes all small values again, so this is for some hundreds of entries; for more there is etcd.
#[derive(Clone, Debug)]
pub struct Directory(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    chain: Chain,
    /// The last state that was seen here.
    seen: Mutex<Head>,
    /// One write at a time: those of this process need not race each other.
    writing: Mutex<()>,
}

/// Keeps entries while it is held.
#[derive(Debug)]
pub struct DirectorySession {
    shared: Arc<Shared>,
    id: u128,
    ended: Arc<AtomicBool>,
    /// Dropped, it ends the heartbeat.
    _beating: mpsc::Sender<()>,
}

impl Directory {
    /// Meets in `path`, which is made when it is not there, for this user only.
    ///
    /// # Errors
    /// [`RendezvousError::Io`]; [`RendezvousError::Damaged`] when there is something else.
    pub fn new(path: impl Into<PathBuf>) -> Result<Self, RendezvousError> {
        let path = path.into();
        if !path.exists() {
            use std::os::unix::fs::DirBuilderExt;
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.map_err(|error| failed("create", &path, error))?;
        }
        let (chain, head) = Chain::open(&path, PATIENCE)?;
        let shared =
            Arc::new(Shared { path, chain, seen: Mutex::new(head), writing: Mutex::new(()) });
        let weak = Arc::downgrade(&shared);
        spawn("refit-observer", move || observe(&weak))?;
        Ok(Self(shared))
    }

    /// Where.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    fn put_value(
        &self,
        key: &Key,
        value: &[u8],
        life: &Life<'_, DirectorySession>,
        replace: bool,
    ) -> Result<Created, RendezvousError> {
        check_value(key, value)?;
        let session = match life {
            Life::Kept => None,
            Life::Session(session) if !Arc::ptr_eq(&session.shared, &self.0) => {
                return Err(RendezvousError::ForeignSession { store: STORE });
            }
            Life::Session(session) if session.ended.load(Ordering::Acquire) => {
                return Err(RendezvousError::SessionEnded);
            }
            Life::Session(session) => Some(session.id),
        };
        let shared = &self.0;
        let draft = if value.len() > INLINE { Some(shared.chain.put_value(value)?) } else { None };
        let stored = match &draft {
            None => Value::Inline(value.to_vec()),
            Some(draft) => Value::File { id: draft.id, bytes: value.len() as u64 },
        };
        loop {
            let mut found = None;
            let written = shared.write("write an entry", |state, number| {
                if session.is_some_and(|session| !state.sessions.contains_key(&session)) {
                    return Err(RendezvousError::SessionEnded);
                }
                found = state.entries.get(key).filter(|_| !replace).cloned();
                if found.is_some() {
                    return Ok(None);
                }
                let mut state = state.clone();
                let entry = Entry { value: stored.clone(), session, modified: number };
                state.entries.insert(key.clone(), entry);
                Ok(Some(state))
            });
            if let (None, Ok(()) | Err(RendezvousError::Unknown { .. })) = (&found, &written)
                && let Some(draft) = draft
            {
                draft.keep();
                return written.map(|()| Created::New);
            }
            written?;
            let Some(found) = found else { return Ok(Created::New) };
            // Or it went while it was read, and there is another chance.
            if let Some(value) = shared.value(&found)? {
                return Ok(Created::Already(value));
            }
        }
    }
}

impl Shared {
    /// The last state.
    fn last(&self) -> Result<Head, RendezvousError> {
        let seen = self.seen.lock().clone();
        let last = self.chain.last(seen)?;
        self.saw(&last);
        Ok(last)
    }

    fn saw(&self, head: &Head) {
        let mut seen = self.seen.lock();
        if head.number > seen.number {
            *seen = head.clone();
        }
    }

    fn write(
        &self,
        action: &'static str,
        edit: impl FnMut(&State, u64) -> Result<Option<State>, RendezvousError>,
    ) -> Result<(), RendezvousError> {
        let Some(_turn) = self.writing.try_lock_for(PATIENCE) else {
            return Err(RendezvousError::Busy { store: STORE, action, waited: PATIENCE });
        };
        let seen = self.seen.lock().clone();
        let head = self.chain.write(seen, action, edit)?;
        self.saw(&head);
        Ok(())
    }

    /// The value of an entry, or none if the entry is no more.
    fn value(&self, entry: &Entry) -> Result<Option<Vec<u8>>, RendezvousError> {
        match &entry.value {
            Value::Inline(value) => Ok(Some(value.clone())),
            Value::File { id, bytes } => self.chain.get_value(*id, *bytes),
        }
    }

    /// What is at or under a key in a state, or none if that is so old that values are gone.
    fn snapshot(&self, prefix: &Key, head: &Head) -> Result<Option<Snapshot>, RendezvousError> {
        let mut entries = BTreeMap::new();
        for (key, entry) in head.state.under(prefix) {
            let Some(value) = self.value(entry)? else { return Ok(None) };
            entries.insert(key.clone(), value);
        }
        let revision = Revision(head.number);
        Ok(Some(Snapshot { revision, entries, ..Snapshot::default() }))
    }

    fn end(&self, session: u128) -> Result<(), RendezvousError> {
        self.write("end a session", |state, number| {
            if !state.sessions.contains_key(&session) {
                return Ok(None);
            }
            let mut state = state.clone();
            state.end(session, number);
            Ok(Some(state))
        })?;
        // After the state: a heartbeat that finds no file knows that its entries are gone.
        let _ = fs::remove_file(heartbeat::file(&self.chain.sessions(), session));
        Ok(())
    }
}

/// Ends sessions that have fallen silent, for as long as the store is held.
fn observe(shared: &Weak<Shared>) {
    let mut observer = Observer::default();
    loop {
        let Some(shared) = shared.upgrade() else { return };
        let pause = match shared.last() {
            Ok(head) => {
                for session in observer.look(&shared.chain.sessions(), &head.state) {
                    tracing::warn!(session = %format_args!("{session:032x}"), "a session fell silent");
                    if let Err(error) = shared.end(session) {
                        tracing::warn!(%error, "a silent session cannot be ended");
                    }
                }
                observer.pause(&head.state)
            }
            Err(error) => {
                tracing::warn!(%error, "sessions cannot be observed");
                Duration::from_millis(50)
            }
        };
        drop(shared);
        std::thread::sleep(pause);
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), RendezvousError> {
    let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(run);
    spawned.map(drop).map_err(|error| failed("start a thread for", Path::new(name), error))
}

impl Rendezvous for Directory {
    type Session = DirectorySession;

    fn store(&self) -> &'static str {
        STORE
    }

    fn reach(&self) -> Reach {
        Reach::Host
    }

    fn session(&self, ttl: Duration) -> Result<DirectorySession, RendezvousError> {
        check_ttl(ttl)?;
        let shared = &self.0;
        let id = random().map_err(|error| failed("read", Path::new("/dev/urandom"), error))?;
        let file = heartbeat::file(&shared.chain.sessions(), id);
        fs::write(&file, 0_u64.to_le_bytes()).map_err(|error| failed("write", &file, error))?;
        let ended = Arc::new(AtomicBool::new(false));
        let (beating, stop) = mpsc::channel();
        let dying = Arc::clone(&ended);
        spawn("refit-heartbeat", {
            let file = file.clone();
            move || heartbeat::beat(&file, ttl, &stop, &dying)
        })?;
        // From here on dropping it ends it.
        let session = DirectorySession { shared: Arc::clone(shared), id, ended, _beating: beating };
        let millis = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        shared.write("begin a session", |state, _| {
            let mut state = state.clone();
            state.sessions.insert(id, millis);
            Ok(Some(state))
        })?;
        Ok(session)
    }

    fn put(
        &self,
        key: &Key,
        value: &[u8],
        life: Life<'_, DirectorySession>,
    ) -> Result<(), RendezvousError> {
        self.put_value(key, value, &life, true).map(drop)
    }

    fn create(
        &self,
        key: &Key,
        value: &[u8],
        life: Life<'_, DirectorySession>,
    ) -> Result<Created, RendezvousError> {
        self.put_value(key, value, &life, false)
    }

    fn remove(&self, key: &Key) -> Result<(), RendezvousError> {
        self.0.write("remove an entry", |state, number| {
            if !state.entries.contains_key(key) {
                return Ok(None);
            }
            let mut state = state.clone();
            state.entries.remove(key);
            state.removals.push(number, key.clone());
            Ok(Some(state))
        })
    }

    fn list(&self, prefix: &Key) -> Result<Snapshot, RendezvousError> {
        let started = Instant::now();
        loop {
            let head = self.0.last()?;
            if let Some(snapshot) = self.0.snapshot(prefix, &head)? {
                return Ok(snapshot);
            }
            let waited = started.elapsed();
            if waited > PATIENCE {
                return Err(RendezvousError::Busy { store: STORE, action: "list entries", waited });
            }
        }
    }

    fn changed(
        &self,
        prefix: &Key,
        since: Revision,
        deadline: Instant,
    ) -> Result<Option<Snapshot>, RendezvousError> {
        loop {
            let head = self.0.last()?;
            if head.number > since.0 && head.state.differs(prefix, since.0) {
                return self.list(prefix).map(Some);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            std::thread::sleep(POLL.min(left));
        }
    }
}

impl Drop for DirectorySession {
    fn drop(&mut self) {
        // If this fails, silence does the same a little later.
        if let Err(error) = self.shared.end(self.id) {
            tracing::warn!(%error, "a session cannot be ended");
        }
    }
}
