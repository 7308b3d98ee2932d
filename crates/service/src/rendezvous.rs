//! Where processes meet: a small map that all of them see, whose entries vanish with the process that wrote them.
//!
//! Nothing large or hot goes through it: who is there, which version is open, who reads it. Bytes of weights never do.

mod address;
mod directory;
#[cfg(feature = "etcd")]
mod etcd;
mod memory;
mod removals;
mod sealed;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use self::address::{Address, AddressError, Store, StoreSession};
pub use self::directory::{Directory, DirectorySession};
#[cfg(feature = "etcd")]
#[cfg_attr(docsrs, doc(cfg(feature = "etcd")))]
pub use self::etcd::{Etcd, EtcdOptions, EtcdSession};
pub use self::memory::{InProcess, InProcessSession};
pub use self::sealed::{JobKey, SealError, Sealed, SecretError, Writer};

/// The name of an entry, as a path of plain parts: `model/trainer/3`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Key(String);

/// How far a store had come when it was asked. Later states have larger numbers; numbers of two stores do not compare.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

/// Everything under a prefix, as it was at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Which moment: what [`Rendezvous::changed`] wants to know.
    pub revision: Revision,
    /// The entries.
    pub entries: BTreeMap<Key, Vec<u8>>,
    /// Entries that are there and were refused by [`Sealed`]; every other store leaves this empty. To be treated as if
    /// they were not there, and named where they were wanted: one bad entry must not stop those who do not need it.
    pub refused: BTreeMap<Key, SealError>,
}

/// Who can reach a store, and with it write into it what it likes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reach {
    /// This process.
    Process,
    /// Processes of this host, as far as the operating system lets them.
    Host,
    /// Whoever can open a connection.
    Network,
}

/// What became of [`Rendezvous::create`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Created {
    /// The entry was not there and is now as given.
    New,
    /// It was there, with this value, and is as it was.
    Already(Vec<u8>),
}

/// For how long an entry stays.
#[derive(Debug)]
#[non_exhaustive]
pub enum Life<'a, S> {
    /// Until it is removed.
    Kept,
    /// Until it is removed, or the session ends or falls silent.
    Session(&'a S),
}

/// A map that processes share.
///
/// Reads are never older than what this process has written or read before, and all processes see the writes to all keys
/// in one order: whoever writes `a` and then reads no `b` knows that whoever writes `b` and then reads finds `a`. The
/// fence between trainer and readers stands on that.
pub trait Rendezvous: Debug + Send + Sync + 'static {
    /// Keeps entries while it is held; dropped, they are removed. When its process dies they vanish within its `ttl`.
    type Session: Debug + Send + Sync + 'static;

    /// The store's name, for logs and errors.
    fn store(&self) -> &'static str;

    /// Who can write into it. Stores beyond this host are used under a job's key only ([`Sealed::new`]), so a store that
    /// does not say is taken for one.
    fn reach(&self) -> Reach {
        Reach::Network
    }

    /// Begins a session, which renews itself in the background. A store may prolong the ttl to the shortest that it keeps.
    ///
    /// # Errors
    /// [`RendezvousError`]; [`RendezvousError::Ttl`] unless it is from [`MIN_TTL`] to [`MAX_TTL`].
    fn session(&self, ttl: Duration) -> Result<Self::Session, RendezvousError>;

    /// Writes an entry, whatever it was before. Readers see the old value or the new, whole.
    ///
    /// # Errors
    /// [`RendezvousError`]; [`RendezvousError::TooLarge`] above [`MAX_VALUE_BYTES`].
    fn put(
        &self,
        key: &Key,
        value: &[u8],
        life: Life<'_, Self::Session>,
    ) -> Result<(), RendezvousError>;

    /// Writes an entry unless there is one. Of several processes that try, one succeeds.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    fn create(
        &self,
        key: &Key,
        value: &[u8],
        life: Life<'_, Self::Session>,
    ) -> Result<Created, RendezvousError>;

    /// Removes an entry, if it is there.
    ///
    /// # Errors
    /// [`RendezvousError`].
    fn remove(&self, key: &Key) -> Result<(), RendezvousError>;

    /// Everything at or under a key.
    ///
    /// # Errors
    /// [`RendezvousError`].
    fn list(&self, prefix: &Key) -> Result<Snapshot, RendezvousError>;

    /// Everything at or under a key, once it is no more what it was at `since`, or `None` at the deadline. Stores that
    /// can watch do. May return early with nothing changed.
    ///
    /// # Errors
    /// [`RendezvousError`].
    fn changed(
        &self,
        prefix: &Key,
        since: Revision,
        deadline: Instant,
    ) -> Result<Option<Snapshot>, RendezvousError>;
}

/// No entry is larger: a publication of a million shards, and its seal.
pub const MAX_VALUE_BYTES: usize = refit::MAX_ENCODED_BYTES + 4096;

/// A session that is renewed more often would be a load.
pub const MIN_TTL: Duration = Duration::from_millis(100);

/// A death that is noticed later might as well not be.
pub const MAX_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// Most bytes of a key.
pub const MAX_KEY_BYTES: usize = 512;

impl Key {
    /// A key of these parts, each of letters, digits, `.`, `_` and `-`.
    ///
    /// # Errors
    /// [`RendezvousError::Key`] for a part that is empty, `.` or `..`, or has other characters, and for more than
    /// [`MAX_KEY_BYTES`] in all.
    pub fn new<P: AsRef<str>>(parts: impl IntoIterator<Item = P>) -> Result<Self, RendezvousError> {
        let mut path = String::new();
        for part in parts {
            let part = part.as_ref();
            let plain =
                |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
            if part.is_empty() || part == "." || part == ".." || !part.bytes().all(plain) {
                return Err(RendezvousError::Key { key: part.escape_debug().to_string() });
            }
            if !path.is_empty() {
                path.push('/');
            }
            path.push_str(part);
        }
        if path.is_empty() || path.len() > MAX_KEY_BYTES {
            return Err(RendezvousError::Key { key: path });
        }
        Ok(Self(path))
    }

    /// This key with one part more.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn join(&self, part: impl AsRef<str>) -> Result<Self, RendezvousError> {
        Self::new(self.parts().chain([part.as_ref()]))
    }

    /// Its parts.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        self.0.split('/')
    }

    /// Whether it is this prefix or lies under it.
    #[must_use]
    pub fn is_under(&self, prefix: &Self) -> bool {
        self.0.strip_prefix(&prefix.0).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// The whole path, parts between slashes.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Key {
    type Error = RendezvousError;

    fn try_from(path: String) -> Result<Self, RendezvousError> {
        Self::new(path.split('/'))
    }
}

impl From<Key> for String {
    fn from(key: Key) -> Self {
        key.0
    }
}

impl Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a value may be an entry.
fn check_value(key: &Key, value: &[u8]) -> Result<(), RendezvousError> {
    if value.len() > MAX_VALUE_BYTES {
        return Err(RendezvousError::TooLarge { key: key.clone(), bytes: value.len() });
    }
    Ok(())
}

/// Whether a session may live so long unheard.
fn check_ttl(ttl: Duration) -> Result<(), RendezvousError> {
    if (MIN_TTL..=MAX_TTL).contains(&ttl) { Ok(()) } else { Err(RendezvousError::Ttl { ttl }) }
}

/// Why a store could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RendezvousError {
    /// Not a key.
    #[error(
        "`{key}` cannot name an entry: parts are letters, digits, `.`, `_` and `-`, {MAX_KEY_BYTES} bytes in all"
    )]
    Key {
        /// What was given.
        key: String,
    },
    /// A value is larger than any entry.
    #[error("`{key}` would be {bytes} bytes, more than an entry may have ({MAX_VALUE_BYTES})")]
    TooLarge {
        /// The entry.
        key: Key,
        /// Bytes given.
        bytes: usize,
    },
    /// What lies at a key was not written by this job as it is.
    #[error("`{key}`: {source}")]
    Seal {
        /// The entry.
        key: Key,
        /// What is wrong with it.
        source: SealError,
    },
    /// A store beyond this host, and no key.
    #[error(
        "{store} can be written by whoever reaches it over the network, so it is used under a job's key only: give every \
         process of the job the same one (`openssl rand -hex 32 > FILE && chmod 600 FILE`)"
    )]
    KeyRequired {
        /// The store.
        store: &'static str,
    },
    /// The name of a job or of one of its processes.
    #[error("`{name}` cannot name a {what}: 1 to {max} letters, digits, `.`, `_` and `-`")]
    Name {
        /// `job` or `writer`.
        what: &'static str,
        /// What was given.
        name: String,
        /// Most characters.
        max: usize,
    },
    /// The session that keeps an entry has ended.
    #[error(
        "the session has ended: the store did not hear of it in time; begin another and publish again"
    )]
    SessionEnded,
    /// A session of another store was to keep an entry.
    #[error("the session is not one of this {store} store; begin one there")]
    ForeignSession {
        /// The store that was to hold the entry.
        store: &'static str,
    },
    /// A session would be renewed too often, or its death be noticed too late.
    #[error("a session cannot have a ttl of {ttl:?}: from {MIN_TTL:?} to {MAX_TTL:?}")]
    Ttl {
        /// What was asked.
        ttl: Duration,
    },
    /// The file system refused.
    #[error(
        "cannot {action} {path}: {source}; every process that meets here must be able to read and write this directory"
    )]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file of the store was written by something else, or cut short by a crash of the host.
    #[error("{path} is damaged: {why}; end every process that meets here and remove the directory")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Others wrote all the time, so that a write never had its turn.
    #[error(
        "the {store} store was too busy to {action} within {waited:?}; fewer processes, or etcd, may do"
    )]
    Busy {
        /// The store.
        store: &'static str,
        /// What was tried.
        action: &'static str,
        /// For how long.
        waited: Duration,
    },
    /// A server cannot be meant as it is described.
    #[error("{store}: {why}")]
    Options {
        /// The store.
        store: &'static str,
        /// What is wrong.
        why: &'static str,
    },
    /// There is no server, or none that answers. A write may have taken effect.
    #[error(
        "could not {action}: {store} at {at} did not do it within {within:?} ({why}); does it run, and can this process reach it?"
    )]
    Unreachable {
        /// The store.
        store: &'static str,
        /// Its addresses.
        at: String,
        /// What was tried.
        action: &'static str,
        /// What a call may take.
        within: Duration,
        /// What is known.
        why: String,
    },
    /// The server said no.
    #[error("{store} refused to {action}: {why}")]
    Refused {
        /// The store.
        store: &'static str,
        /// What was tried.
        action: &'static str,
        /// What it said.
        why: String,
    },
    /// An entry was not written by a rendezvous, or not whole.
    #[error("`{key}` in {store}: {why}; remove it, and have its process publish again")]
    Foreign {
        /// The store.
        store: &'static str,
        /// The entry.
        key: Key,
        /// What is wrong with it.
        why: &'static str,
    },
    /// It is not known whether a write took effect.
    #[error(
        "the {store} store did not say whether it could {action}; it may have: look before trying again"
    )]
    Unknown {
        /// The store.
        store: &'static str,
        /// What was tried.
        action: &'static str,
    },
}
