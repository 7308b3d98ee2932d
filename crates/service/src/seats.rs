use std::sync::Arc;
use std::time::Duration;

use crate::keys::Model;
use crate::rendezvous::{JobKey, Key, Rendezvous, RendezvousError, Sealed, Writer};
use crate::seat::Seat;
use crate::stop::Stop;

/// A process of a job, in one of its lives, at a model's rendezvous: where its [`Seat`]s come from, one for each of its sessions.
#[derive(Debug)]
pub struct Seats<R: Rendezvous> {
    store: Arc<R>,
    model: Model,
    ttl: Duration,
    stop: Option<Stop>,
}

impl<R: Rendezvous> Seats<Sealed<R>> {
    /// Those of `writer`, who seals with `key` what it says in `store`, at the rendezvous of its job's model of this name. A
    /// session ends when its process has been silent for `ttl`.
    ///
    /// # Errors
    /// [`RendezvousError::Key`] for a name that cannot be a part of a key; what [`Sealed::new`] says.
    pub fn new(
        store: R,
        writer: Writer,
        key: Option<JobKey>,
        model: &str,
        ttl: Duration,
    ) -> Result<Self, RendezvousError> {
        let model = Model::new(Key::new([writer.job(), model])?);
        let store = Arc::new(Sealed::new(store, writer, key)?);
        Ok(Self { store, model, ttl, stop: None })
    }
}

impl<R: Rendezvous> Seats<R> {
    /// Whatever waits on a seat from here comes to an end when `stop` is told.
    #[must_use]
    pub fn with_stop(mut self, stop: Stop) -> Self {
        self.stop = Some(stop);
        self
    }

    /// A seat under a session of its own.
    ///
    /// # Errors
    /// What [`Rendezvous::session`] says.
    pub fn take(&self) -> Result<Seat<R>, RendezvousError> {
        let session = Arc::new(self.store.session(self.ttl)?);
        let seat = Seat::new(self.store.clone(), session, self.model.clone());
        Ok(match &self.stop {
            Some(stop) => seat.with_stop(stop.clone()),
            None => seat,
        })
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> &Arc<R> {
        &self.store
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }
}
