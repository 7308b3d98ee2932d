//! Where ranks meet, as a person names it.

use std::sync::Arc;
use std::time::Duration;

use refit::RefitError;
use refit::transport::draw_incarnation;
use refit_service::keys::Model;
use refit_service::rendezvous::{Key, Rendezvous, Sealed, Writer};
use refit_service::{Seat, Stop};

use super::args::Common;
use crate::error::CliError;

/// A process of a job, in this life of it.
#[derive(Debug)]
pub(super) struct Place<R: Rendezvous> {
    store: Arc<R>,
    ttl: Duration,
    model: Model,
    stop: Stop,
}

impl<R: Rendezvous> Place<Sealed<R>> {
    /// Called `name` in the job of `common`, at a model's rendezvous in this store.
    pub(super) fn new(
        common: &Common,
        store: R,
        name: &str,
        model: &str,
        stop: Stop,
    ) -> Result<Self, CliError> {
        use refit_service::rendezvous::JobKey;
        let key = match (&common.key_file, Common::key_variable()) {
            (Some(file), _) => Some(JobKey::from_file(file)?),
            (None, Some(variable)) => Some(JobKey::from_env(variable)?),
            (None, None) => None,
        };
        let incarnation = draw_incarnation(name).map_err(RefitError::from)?;
        let model = Model::new(Key::new([common.job.as_str(), model])?);
        let store = Sealed::new(store, Writer::new(&common.job, name, incarnation)?, key)?;
        Ok(Self { store: Arc::new(store), ttl: common.ttl, model, stop })
    }
}

impl<R: Rendezvous> Place<R> {
    /// A place under a session of its own.
    pub(super) fn seat(&self) -> Result<Seat<R>, CliError> {
        let session = Arc::new(self.store.session(self.ttl)?);
        let seat = Seat::new(self.store.clone(), session, self.model.clone());
        Ok(seat.with_stop(self.stop.clone()))
    }

    pub(super) fn store(&self) -> &Arc<R> {
        &self.store
    }

    pub(super) fn model(&self) -> &Model {
        &self.model
    }
}
