//! What all entries are at one moment, as one file.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::rendezvous::removals::Removals;
use crate::rendezvous::{Key, MAX_VALUE_BYTES, RendezvousError};

/// The first bytes of every state.
const MAGIC: &[u8; 16] = b"refit-meeting-01";

/// Bytes of the digest at the end. Against damage, not against forgery: whoever can write here is trusted, or a seal
/// around every value says whether to.
const DIGEST: usize = 16;

/// Larger values have files of their own, since all others are written again with every change.
pub(super) const INLINE: usize = 256;

/// No state is larger: a hundred thousand entries of the largest kind.
pub(super) const MAX_STATE_BYTES: u64 = 128 << 20;

/// All entries and sessions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) entries: BTreeMap<Key, Entry>,
    /// For how many milliseconds each may be silent.
    pub(super) sessions: BTreeMap<u128, u64>,
    pub(super) removals: Removals,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) value: Value,
    /// The session that keeps it.
    pub(super) session: Option<u128>,
    /// Number of the state that it first stood in.
    pub(super) modified: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Value {
    Inline(Vec<u8>),
    /// In a file with this name, which no other value ever had.
    File {
        id: u128,
        bytes: u64,
    },
}

impl State {
    /// Whether something at or under `prefix` may be other than it was in state `since`.
    pub(super) fn differs(&self, prefix: &Key, since: u64) -> bool {
        self.under(prefix).any(|(_, entry)| entry.modified > since)
            || self.removals.touch(prefix, since)
    }

    /// The entries at or under a key.
    pub(super) fn under(&self, prefix: &Key) -> impl Iterator<Item = (&Key, &Entry)> {
        self.entries.range(prefix..).take_while(|(key, _)| starts_with(key, prefix)).filter(
            // Between `a` and `a/b` others may sort: `a-b`.
            |(key, _)| key.is_under(prefix),
        )
    }

    /// Takes a session out, and all that it keeps.
    pub(super) fn end(&mut self, session: u128, revision: u64) {
        self.sessions.remove(&session);
        let removals = &mut self.removals;
        self.entries.retain(|key, entry| {
            let kept = entry.session != Some(session);
            if !kept {
                removals.push(revision, key.clone());
            }
            kept
        });
    }

    /// Names of the files with its larger values.
    pub(super) fn files(&self) -> impl Iterator<Item = u128> {
        self.entries.values().filter_map(|entry| match entry.value {
            Value::File { id, .. } => Some(id),
            Value::Inline(_) => None,
        })
    }

    /// As a file.
    pub(super) fn encode(&self, path: &Path) -> Result<Vec<u8>, RendezvousError> {
        let damaged = |why| RendezvousError::Damaged { path: path.to_path_buf(), why };
        let mut bytes = postcard::to_extend(self, MAGIC.to_vec())
            .map_err(|_| damaged("it cannot be encoded"))?;
        let digest = blake3::hash(&bytes);
        bytes.extend_from_slice(&digest.as_bytes()[..DIGEST]);
        if bytes.len() as u64 > MAX_STATE_BYTES {
            return Err(damaged("too many entries for a directory; meet in etcd"));
        }
        Ok(bytes)
    }

    /// From a file.
    pub(super) fn decode(bytes: &[u8], path: &Path) -> Result<Self, RendezvousError> {
        let damaged = |why| RendezvousError::Damaged { path: path.to_path_buf(), why };
        let (body, digest) =
            bytes.split_last_chunk::<DIGEST>().ok_or_else(|| damaged("it is cut short"))?;
        if blake3::hash(body).as_bytes()[..DIGEST] != digest[..] {
            return Err(damaged("its bytes do not match their digest"));
        }
        let body = body.strip_prefix(MAGIC).ok_or_else(|| damaged("another release wrote it"))?;
        let state: Self = postcard::from_bytes(body).map_err(|_| damaged("it is no state"))?;
        let large = |entry: &Entry| matches!(entry.value, Value::File { bytes, .. } if bytes > MAX_VALUE_BYTES as u64);
        if state.entries.values().any(large) {
            return Err(damaged("it has an entry that is too large"));
        }
        Ok(state)
    }

    /// For how long a session may be silent.
    pub(super) fn ttl(&self, session: u128) -> Option<Duration> {
        self.sessions.get(&session).map(|millis| Duration::from_millis(*millis))
    }
}

fn starts_with(key: &Key, prefix: &Key) -> bool {
    key.as_str().starts_with(prefix.as_str())
}
