//! A process of a job, at a model's rendezvous.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use refit::transport::draw_incarnation;
use refit_service::Seat;
use refit_service::keys::Model;
use refit_service::rendezvous::{Address, JobKey, Key, Rendezvous, Sealed, Store, Writer};

use crate::failure::{Failure, Kind};

/// The variable of the environment that the job's key is taken from when there is no file.
const KEY_VARIABLE: &str = "REFIT_JOB_KEY";

/// The store, whatever kind it is, under the job's seal.
pub(crate) type Meeting = Sealed<Store>;

/// Where ranks meet, and under which names.
#[derive(Clone, Debug)]
pub(crate) struct Where {
    pub(crate) address: Address,
    pub(crate) job: String,
    pub(crate) model: String,
    pub(crate) key_file: Option<PathBuf>,
    pub(crate) ttl: Duration,
}

/// A process of the job, in this life of it.
#[derive(Debug)]
pub(crate) struct Place {
    store: Arc<Meeting>,
    ttl: Duration,
    model: Model,
}

impl Place {
    /// Called `name`.
    pub(crate) fn new(at: &Where, name: &str) -> Result<Self, Failure> {
        let key = match (&at.key_file, std::env::var_os(KEY_VARIABLE)) {
            (Some(file), _) => Some(JobKey::from_file(file)?),
            (None, Some(_)) => Some(JobKey::from_env(KEY_VARIABLE)?),
            (None, None) => None,
        };
        let writer = Writer::new(&at.job, name, draw_incarnation(name)?)?;
        let model = Model::new(Key::new([at.job.as_str(), at.model.as_str()])?);
        let store = Sealed::new(at.address.open()?, writer, key)?;
        Ok(Self { store: Arc::new(store), ttl: at.ttl, model })
    }

    /// A place under a session of its own.
    pub(crate) fn seat(&self) -> Result<Seat<Meeting>, Failure> {
        let session = Arc::new(self.store.session(self.ttl)?);
        Ok(Seat::new(self.store.clone(), session, self.model.clone()))
    }
}

/// A time that a caller gave in seconds.
pub(crate) fn seconds(what: &str, value: f64) -> Result<Duration, Failure> {
    let time = Duration::try_from_secs_f64(value).ok().filter(|time| time.as_secs() <= 86_400 * 7);
    time.ok_or_else(|| {
        let text = format!("{what} is {value} seconds: it goes from 0 to a week");
        Failure::new(Kind::Config, text)
    })
}
