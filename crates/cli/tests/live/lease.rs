//! A reader that never reads: nothing but its lease.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use refit::transport::draw_incarnation;
use refit_service::keys::Model;
use refit_service::message::{Announcement, Message, Offering, ReaderLease};
use refit_service::rendezvous::{
    Directory, DirectorySession, JobKey, Key, Life, Rendezvous, Sealed, Writer,
};

use crate::process::{Job, PATIENCE};

/// A lease on what the group `trainer` of a job offers, for as long as this is held.
#[derive(Debug)]
pub(crate) struct Lease {
    store: Sealed<Directory>,
    model: Model,
    key: Key,
    _session: Arc<DirectorySession>,
}

impl Lease {
    /// Of the one model of this job.
    pub(crate) fn take(job: &Job, millis: u32) -> Self {
        let store = Directory::new(job.path().join("meet")).unwrap();
        let key = JobKey::from_file(&job.path().join("key")).unwrap();
        // A life of its own: what an earlier one wrote is not written again.
        let life = draw_incarnation("reader").unwrap();
        let writer = Writer::new("refit", "reader", life).unwrap();
        let store = Sealed::new(store, writer, Some(key)).unwrap();
        let all = store.list(&Key::new(["refit"]).unwrap()).unwrap();
        let model = all.entries.keys().find_map(|key| key.parts().nth(1).map(str::to_owned));
        let model = Model::new(Key::new(["refit".to_owned(), model.unwrap()]).unwrap());
        let session = Arc::new(store.session(Duration::from_secs(60)).unwrap());
        let lease = ReaderLease { incarnation: 1, version: 1, millis };
        let key = model.reader("trainer", "endless").unwrap();
        store.put(&key, &lease.encode(), Life::Session(&session)).unwrap();
        Self { store, model, key, _session: session }
    }

    /// Returns when the source has closed its version and waits for this.
    pub(crate) fn is_waited_for(&self) {
        let (until, key) = (Instant::now() + PATIENCE, self.model.version("trainer", 0).unwrap());
        let said = || Announcement::decode(&self.store.list(&key).unwrap().entries[&key]).unwrap();
        while said().offering == Offering::Open {
            assert!(Instant::now() < until, "nobody waits for a lease");
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn give_back(self) {
        self.store.remove(&self.key).unwrap();
    }
}
