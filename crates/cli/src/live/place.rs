//! Where ranks meet, as a person names it.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use refit::RefitError;
use refit::transport::draw_incarnation;
use refit_service::Seat;
use refit_service::keys::Model;
use refit_service::rendezvous::{Key, Rendezvous, Sealed, Writer};

use super::args::Common;
use crate::error::CliError;

/// A store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Store {
    Directory(PathBuf),
    #[cfg_attr(not(feature = "etcd"), allow(dead_code, reason = "only a build with etcd asks it"))]
    Etcd(Vec<String>),
}

impl FromStr for Store {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("dir", path)) if !path.is_empty() => Ok(Self::Directory(path.into())),
            Some(("etcd", urls)) if urls.starts_with("http://") || urls.starts_with("https://") => {
                Ok(Self::Etcd(urls.split(',').map(str::to_owned).collect()))
            }
            Some(("etcd", _)) => {
                Err("an etcd is named by its address: etcd:http://127.0.0.1:2379".to_owned())
            }
            _ => Err("write dir:PATH or etcd:http://HOST:PORT".to_owned()),
        }
    }
}

/// The etcd at these addresses. Its certificates and password come from where no other user can read them: files and
/// variables that the environment names.
#[cfg(feature = "etcd")]
pub(super) fn etcd(endpoints: &[String]) -> Result<refit_service::rendezvous::Etcd, CliError> {
    use refit_service::rendezvous::{Etcd, EtcdOptions};
    let file = |variable| match std::env::var_os(variable) {
        None => Ok(None),
        Some(path) => {
            let path = PathBuf::from(path);
            let read = |source| CliError::Read { path: path.clone(), source };
            std::fs::read(&path).map(Some).map_err(read)
        }
    };
    let mut options = EtcdOptions::new(endpoints.iter().cloned());
    if let Some(authority) = file("REFIT_ETCD_CA")? {
        options = options.with_authority(authority);
    }
    if let (Some(certificate), Some(key)) = (file("REFIT_ETCD_CERT")?, file("REFIT_ETCD_KEY")?) {
        options = options.with_identity(certificate, key);
    }
    if let (Ok(user), Ok(password)) =
        (std::env::var("REFIT_ETCD_USER"), std::env::var("REFIT_ETCD_PASSWORD"))
    {
        options = options.with_user(user, password);
    }
    Ok(Etcd::new(options)?)
}

/// A process of a job, in this life of it.
#[derive(Debug)]
pub(super) struct Place<R: Rendezvous> {
    store: Arc<R>,
    ttl: Duration,
    model: Model,
}

impl<R: Rendezvous> Place<Sealed<R>> {
    /// Called `name` in the job of `common`, at a model's rendezvous in this store.
    pub(super) fn new(
        common: &Common,
        store: R,
        name: &str,
        model: &str,
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
        Ok(Self { store: Arc::new(store), ttl: common.ttl, model })
    }
}

impl<R: Rendezvous> Place<R> {
    /// A place under a session of its own.
    pub(super) fn seat(&self) -> Result<Seat<R>, CliError> {
        let session = Arc::new(self.store.session(self.ttl)?);
        Ok(Seat::new(self.store.clone(), session, self.model.clone()))
    }

    pub(super) fn store(&self) -> &Arc<R> {
        &self.store
    }

    pub(super) fn model(&self) -> &Model {
        &self.model
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_are_read_as_they_are_written() {
        assert_eq!("dir:/a:b".parse(), Ok(Store::Directory("/a:b".into())));
        let etcd = Store::Etcd(vec!["http://a:1".into(), "http://b:2".into()]);
        assert_eq!("etcd:http://a:1,http://b:2".parse(), Ok(etcd));
        for (text, part) in
            [("/tmp/x", "dir:PATH"), ("dir:", "dir:PATH"), ("etcd:a:1", "etcd:http")]
        {
            let error = text.parse::<Store>().unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
