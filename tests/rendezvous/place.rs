//! Where the suite meets.

use std::time::Duration;

use refit_service::rendezvous::{Directory, InProcess, Rendezvous};
use tempfile::TempDir;

use super::peer::Peer;

/// A store that the suite can be run over.
pub(crate) trait Place: Sync {
    type Store: Rendezvous;

    /// The store, as another process would have it where that is possible.
    fn open(&self) -> Self::Store;

    /// Somebody else who meets there.
    fn peer(&self) -> Peer;

    /// Whether a peer has a process of its own, that can be stopped and killed.
    const PROCESSES: bool;

    /// The shortest ttl that this store keeps to.
    const TTL: Duration;
}

/// A store inside this process.
pub(crate) struct Inside(InProcess);

impl Inside {
    pub(crate) fn new() -> Option<Self> {
        Some(Self(InProcess::new()))
    }
}

impl Place for Inside {
    type Store = InProcess;

    fn open(&self) -> InProcess {
        self.0.clone()
    }

    fn peer(&self) -> Peer {
        Peer::thread(self.0.clone())
    }

    const PROCESSES: bool = false;
    const TTL: Duration = Duration::from_millis(400);
}

/// A directory.
pub(crate) struct Folder(pub(crate) TempDir);

impl Folder {
    pub(crate) fn new() -> Option<Self> {
        Some(Self(tempfile::tempdir().unwrap()))
    }
}

impl Place for Folder {
    type Store = Directory;

    fn open(&self) -> Directory {
        Directory::new(self.0.path().join("made/when/missing")).unwrap()
    }

    fn peer(&self) -> Peer {
        Peer::process(&format!("directory {}", self.open().path().display()))
    }

    const PROCESSES: bool = true;
    const TTL: Duration = Duration::from_millis(1000);
}
