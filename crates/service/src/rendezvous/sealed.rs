//! A store whose values cannot be forged, moved or put back.

mod envelope;
mod secret;
mod seen;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

pub use self::secret::{JobKey, SecretError};

use self::envelope::{Header, MAX_NAME_BYTES, MAX_SEAL_BYTES};
use self::seen::{Began, Seen};
use super::{
    Created, Key, Life, MAX_VALUE_BYTES, Reach, Rendezvous, RendezvousError, Revision, Snapshot,
};

/// Who seals: a process of a job, in one of its lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Writer {
    job: String,
    name: String,
    incarnation: u128,
}

impl Writer {
    /// The process called `name` in this job, in the life that `incarnation` was drawn for.
    ///
    /// A number that was ever used before must not be used again: what was written under it would be in the way.
    ///
    /// # Errors
    /// [`RendezvousError::Name`] for a name that is not 1 to 96 letters, digits, `.`, `_` and `-`.
    pub fn new(
        job: impl Into<String>,
        name: impl Into<String>,
        incarnation: u128,
    ) -> Result<Self, RendezvousError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let (job, name) = (job.into(), name.into());
        for (what, given) in [("job", &job), ("writer", &name)] {
            if !(1..=MAX_NAME_BYTES).contains(&given.len()) || !given.bytes().all(plain) {
                let name = given.chars().take(MAX_NAME_BYTES).collect::<String>();
                let name = name.escape_debug().to_string();
                return Err(RendezvousError::Name { what, name, max: MAX_NAME_BYTES });
            }
        }
        Ok(Self { job, name, incarnation })
    }

    /// The job.
    #[must_use]
    pub fn job(&self) -> &str {
        &self.job
    }
}

/// Why a value that lies in the store is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// Not a sealed value.
    #[error(
        "these {bytes} bytes are not sealed, or are cut off: something else than this job writes to the store, or the \
         store lost bytes; remove the entry and publish again"
    )]
    NotSealed {
        /// Bytes of the value.
        bytes: usize,
    },
    /// Written by another release.
    #[error(
        "it is sealed in format {found}, this process reads {expected}: run one release in all processes of a job"
    )]
    Format {
        /// Its format.
        found: u8,
        /// Ours.
        expected: u8,
    },
    /// The writer had no key.
    #[error(
        "it is sealed without a key and this process has one: give the same key to every process of the job"
    )]
    Keyless,
    /// The writer had a key.
    #[error(
        "it is sealed with a key and this process has none: give the same key to every process of the job"
    )]
    Keyed,
    /// The MAC is wrong.
    #[error(
        "its seal is not right: it was changed after it was written, or written with another key than this job's; \
         compare the keys, and if they are the same find out who writes to the store"
    )]
    Forged,
    /// The digest is wrong.
    #[error("its checksum is not right: it was damaged after it was written; publish again")]
    Damaged,
    /// It belongs to another job.
    #[error(
        "it is of job `{found}` and this process is of job `{job}`: give each job a store, or a model name, of its own"
    )]
    OtherJob {
        /// The job that it names. Where the keys differ that is only what it says.
        found: String,
        /// Ours.
        job: String,
    },
    /// It was written to another key.
    #[error(
        "it was written to `{found}` and copied to where it lies: remove the entry and find out who writes to the store"
    )]
    Moved {
        /// Where it belongs.
        found: String,
    },
    /// Another value of the same writer was read here, and it was newer.
    #[error(
        "it is value {sequence} of `{writer}` (incarnation {incarnation:032x}), of which value {newest} was read before: \
         an old one was put back, or two processes use one incarnation; remove the entry, and have every process draw \
         its own"
    )]
    Replayed {
        /// The writer.
        writer: String,
        /// Its life.
        incarnation: u128,
        /// The number of this value.
        sequence: u64,
        /// The largest number read before.
        newest: u64,
    },
    /// The seal is right and what it holds is not.
    #[error("its seal is right and its {part} is not: run one release in all processes of a job")]
    Malformed {
        /// The part that could not be read.
        part: &'static str,
    },
}

/// A store whose values are sealed when they are written and opened when they are read.
///
/// A seal binds a value to the job, to the process that wrote it and its life, to the key that it was written to, and to
/// its place among that process's values. With a [`JobKey`] nobody can make one without it; without a key, seals find
/// damage and mix-ups only, and stores that others can reach are refused. Nothing of a value is parsed before its seal
/// is found right.
///
/// A value that is older than one this process has read of the same writer at the same key is refused. What a process
/// has not read it cannot know: one that begins later can be shown a writer's old value, and any process can be shown
/// that an entry is not there. Entries are remembered for 65,536 keys, the least recently read forgotten first.
///
/// Clones are one writer. Two that are made for one incarnation are in each other's way.
#[derive(Clone)]
pub struct Sealed<R> {
    store: R,
    shared: Arc<Shared>,
}

struct Shared {
    writer: Writer,
    key: Option<JobKey>,
    sequence: AtomicU64,
    seen: Seen,
    /// Values of one key are numbered in the order in which they are written; keys share these by their hash.
    order: [Mutex<()>; 64],
}

impl<R: Rendezvous> Sealed<R> {
    /// Seals what goes into this store.
    ///
    /// # Errors
    /// [`RendezvousError::KeyRequired`] without a key, unless only this host can write into the store.
    pub fn new(store: R, writer: Writer, key: Option<JobKey>) -> Result<Self, RendezvousError> {
        if key.is_none() && store.reach() > Reach::Host {
            return Err(RendezvousError::KeyRequired { store: store.store() });
        }
        tracing::info!(
            store = store.store(),
            job = writer.job,
            writer = writer.name,
            incarnation = format_args!("{:032x}", writer.incarnation),
            keyed = key.is_some(),
            "rendezvous"
        );
        let order = [const { Mutex::new(()) }; 64];
        let (sequence, seen) = (AtomicU64::new(0), Seen::default());
        Ok(Self { store, shared: Arc::new(Shared { writer, key, sequence, seen, order }) })
    }

    /// Writes a sealed value with `write`, behind all earlier values of the same key.
    fn write<V>(
        &self,
        key: &Key,
        value: &[u8],
        write: impl FnOnce(&[u8]) -> Result<V, RendezvousError>,
    ) -> Result<V, RendezvousError> {
        let Shared { writer, key: secret, sequence, order, .. } = &*self.shared;
        if value.len() > MAX_VALUE_BYTES - MAX_SEAL_BYTES {
            return Err(RendezvousError::TooLarge { key: key.clone(), bytes: value.len() });
        }
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        let place = usize::try_from(hasher.finish() % order.len() as u64).unwrap_or(0);
        let _turn = order[place].lock();
        let header = Header {
            job: &writer.job,
            writer: &writer.name,
            key: key.as_str(),
            incarnation: writer.incarnation,
            sequence: sequence.fetch_add(1, Ordering::Relaxed) + 1,
        };
        write(&envelope::seal(secret.as_ref(), &header, value))
    }

    /// Opens a value in place.
    fn open(&self, began: Began, key: &Key, mut value: Vec<u8>) -> Result<Vec<u8>, SealError> {
        let Shared { writer, key: secret, seen, .. } = &*self.shared;
        let other_job = |found: &str| SealError::OtherJob {
            found: found.escape_debug().to_string(),
            job: writer.job.clone(),
        };
        let opened = envelope::open(secret.as_ref(), &value).map_err(|error| {
            // Where the keys of two jobs met, the name says more than the MAC.
            let claimed = Some(&value).filter(|_| error == SealError::Forged);
            let claimed = claimed.and_then(|value| envelope::claimed_job(value));
            claimed.filter(|job| *job != writer.job).map_or(error, other_job)
        })?;
        if opened.header.job != writer.job {
            return Err(other_job(opened.header.job));
        }
        if opened.header.key != key.as_str() {
            return Err(SealError::Moved { found: opened.header.key.escape_debug().to_string() });
        }
        seen.check(began, key, &opened)?;
        let body = opened.body;
        value.truncate(body.end);
        value.drain(..body.start);
        Ok(value)
    }

    fn opened(&self, began: Began, snapshot: Snapshot) -> Snapshot {
        let Snapshot { revision, entries, mut refused } = snapshot;
        let mut right = BTreeMap::new();
        for (key, value) in entries {
            match self.open(began, &key, value) {
                Ok(body) => drop(right.insert(key, body)),
                Err(error) => {
                    tracing::warn!(%key, %error, "an entry is not taken");
                    refused.insert(key, error);
                }
            }
        }
        Snapshot { revision, entries: right, refused }
    }
}

impl<R: Rendezvous> Rendezvous for Sealed<R> {
    type Session = R::Session;

    fn store(&self) -> &'static str {
        self.store.store()
    }

    fn reach(&self) -> Reach {
        self.store.reach()
    }

    fn session(&self, ttl: Duration) -> Result<R::Session, RendezvousError> {
        self.store.session(ttl)
    }

    fn put(
        &self,
        key: &Key,
        value: &[u8],
        life: Life<'_, R::Session>,
    ) -> Result<(), RendezvousError> {
        self.write(key, value, |sealed| self.store.put(key, sealed, life))
    }

    fn create(
        &self,
        key: &Key,
        value: &[u8],
        life: Life<'_, R::Session>,
    ) -> Result<Created, RendezvousError> {
        let began = self.shared.seen.begin();
        match self.write(key, value, |sealed| self.store.create(key, sealed, life))? {
            Created::New => Ok(Created::New),
            Created::Already(found) => self
                .open(began, key, found)
                .map(Created::Already)
                .map_err(|source| RendezvousError::Seal { key: key.clone(), source }),
        }
    }

    fn remove(&self, key: &Key) -> Result<(), RendezvousError> {
        self.store.remove(key)
    }

    fn list(&self, prefix: &Key) -> Result<Snapshot, RendezvousError> {
        let began = self.shared.seen.begin();
        Ok(self.opened(began, self.store.list(prefix)?))
    }

    fn changed(
        &self,
        prefix: &Key,
        since: Revision,
        deadline: Instant,
    ) -> Result<Option<Snapshot>, RendezvousError> {
        let began = self.shared.seen.begin();
        let changed = self.store.changed(prefix, since, deadline)?;
        Ok(changed.map(|snapshot| self.opened(began, snapshot)))
    }
}

impl<R: std::fmt::Debug> std::fmt::Debug for Sealed<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sealed")
            .field("store", &self.store)
            .field("writer", &self.shared.writer)
            .field("key", &self.shared.key)
            .finish_non_exhaustive()
    }
}
