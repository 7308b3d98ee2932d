//! Where a store is, as a person names it, and a store of whichever kind that is.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{
    Created, Directory, DirectorySession, InProcess, InProcessSession, Key, Life, Reach,
    Rendezvous, RendezvousError, Revision, Snapshot,
};
#[cfg(feature = "etcd")]
use super::{Etcd, EtcdOptions, EtcdSession};

/// Where a store is: `mem:NAME`, `dir:PATH` or `etcd:URL,..`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// In this process: all that open the same name meet.
    InProcess(String),
    /// In a directory, for processes of one host.
    Directory(PathBuf),
    /// In an etcd at these addresses.
    Etcd(Vec<String>),
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match text.split_once(':') {
            Some(("mem", name)) => Ok(Self::InProcess(name.to_owned())),
            Some(("dir", path)) if !path.is_empty() => Ok(Self::Directory(path.into())),
            Some(("etcd", urls)) if urls.starts_with("http://") || urls.starts_with("https://") => {
                Ok(Self::Etcd(urls.split(',').map(str::to_owned).collect()))
            }
            Some(("etcd", _)) => Err(AddressError::EtcdAddress),
            _ => Err(AddressError::Form),
        }
    }
}

impl Address {
    /// The store. An etcd's certificates and password come from where no other user can read them: the files that the
    /// variables `REFIT_ETCD_CA`, `REFIT_ETCD_CERT` and `REFIT_ETCD_KEY` name, and `REFIT_ETCD_USER` and
    /// `REFIT_ETCD_PASSWORD`.
    ///
    /// # Errors
    /// [`AddressError::Read`] for such a file; [`AddressError::NoEtcd`] in a build without; [`AddressError::Rendezvous`]
    /// with what the store says.
    pub fn open(&self) -> Result<Store, AddressError> {
        match self {
            Self::InProcess(name) => {
                // For the life of the process: whoever comes later has to find what others have written.
                static STORES: Mutex<BTreeMap<String, InProcess>> = Mutex::new(BTreeMap::new());
                Ok(Store::InProcess(STORES.lock().entry(name.clone()).or_default().clone()))
            }
            Self::Directory(path) => Ok(Store::Directory(Directory::new(path)?)),
            Self::Etcd(endpoints) => etcd(endpoints),
        }
    }
}

#[cfg(not(feature = "etcd"))]
fn etcd(_: &[String]) -> Result<Store, AddressError> {
    Err(AddressError::NoEtcd)
}

#[cfg(feature = "etcd")]
fn etcd(endpoints: &[String]) -> Result<Store, AddressError> {
    let file = |variable| match std::env::var_os(variable) {
        None => Ok(None),
        Some(path) => {
            let path = PathBuf::from(path);
            let read = |source| AddressError::Read { path: path.clone(), source };
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
    Ok(Store::Etcd(Box::new(Etcd::new(options)?)))
}

/// Why there is no store at an address.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// Not an address.
    #[error("write dir:PATH, etcd:http://HOST:PORT or, within one process, mem:NAME")]
    Form,
    /// An etcd without an address.
    #[error("an etcd is named by its address: etcd:http://127.0.0.1:2379")]
    EtcdAddress,
    /// This build does not know etcd.
    #[error("this build has no etcd; build it with the feature `etcd`")]
    NoEtcd,
    /// A file that the environment names.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The store.
    #[error(transparent)]
    Rendezvous(#[from] RendezvousError),
}

/// A store of a kind that is known at run time.
#[derive(Debug)]
#[non_exhaustive]
pub enum Store {
    /// In this process.
    InProcess(InProcess),
    /// In a directory.
    Directory(Directory),
    /// In an etcd.
    #[cfg(feature = "etcd")]
    Etcd(Box<Etcd>),
}

/// A session of such a store.
#[derive(Debug)]
#[non_exhaustive]
pub enum StoreSession {
    /// In this process.
    InProcess(InProcessSession),
    /// In a directory.
    Directory(DirectorySession),
    /// In an etcd.
    #[cfg(feature = "etcd")]
    Etcd(EtcdSession),
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.store())
    }
}

/// Has the store of each kind do something.
macro_rules! each {
    ($store:expr, $it:ident => $do:expr) => {
        match $store {
            Store::InProcess($it) => $do,
            Store::Directory($it) => $do,
            #[cfg(feature = "etcd")]
            Store::Etcd($it) => $do,
        }
    };
}

/// The same with the life of an entry, which must be one of the same kind of store.
macro_rules! with_life {
    ($self:expr, $life:expr, $it:ident, $of_kind:ident => $do:expr) => {
        match ($self, $life) {
            (Store::InProcess($it), Life::Kept) => {
                let $of_kind = Life::Kept;
                $do
            }
            (Store::Directory($it), Life::Kept) => {
                let $of_kind = Life::Kept;
                $do
            }
            #[cfg(feature = "etcd")]
            (Store::Etcd($it), Life::Kept) => {
                let $of_kind = Life::Kept;
                $do
            }
            (Store::InProcess($it), Life::Session(StoreSession::InProcess(session))) => {
                let $of_kind = Life::Session(session);
                $do
            }
            (Store::Directory($it), Life::Session(StoreSession::Directory(session))) => {
                let $of_kind = Life::Session(session);
                $do
            }
            #[cfg(feature = "etcd")]
            (Store::Etcd($it), Life::Session(StoreSession::Etcd(session))) => {
                let $of_kind = Life::Session(session);
                $do
            }
            (store, Life::Session(_)) => {
                Err(RendezvousError::ForeignSession { store: store.store() })
            }
        }
    };
}

impl Rendezvous for Store {
    type Session = StoreSession;

    fn store(&self) -> &'static str {
        each!(self, it => it.store())
    }

    fn reach(&self) -> Reach {
        each!(self, it => it.reach())
    }

    fn session(&self, ttl: Duration) -> Result<StoreSession, RendezvousError> {
        Ok(match self {
            Self::InProcess(it) => StoreSession::InProcess(it.session(ttl)?),
            Self::Directory(it) => StoreSession::Directory(it.session(ttl)?),
            #[cfg(feature = "etcd")]
            Self::Etcd(it) => StoreSession::Etcd(it.session(ttl)?),
        })
    }

    fn put(
        &self,
        key: &Key,
        value: &[u8],
        life: Life<'_, StoreSession>,
    ) -> Result<(), RendezvousError> {
        with_life!(self, life, it, life => it.put(key, value, life))
    }

    fn create(
        &self,
        key: &Key,
        value: &[u8],
        life: Life<'_, StoreSession>,
    ) -> Result<Created, RendezvousError> {
        with_life!(self, life, it, life => it.create(key, value, life))
    }

    fn remove(&self, key: &Key) -> Result<(), RendezvousError> {
        each!(self, it => it.remove(key))
    }

    fn list(&self, prefix: &Key) -> Result<Snapshot, RendezvousError> {
        each!(self, it => it.list(prefix))
    }

    fn changed(
        &self,
        prefix: &Key,
        since: Revision,
        deadline: Instant,
    ) -> Result<Option<Snapshot>, RendezvousError> {
        each!(self, it => it.changed(prefix, since, deadline))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        let read = |text: &str| text.parse::<Address>().unwrap();
        assert_eq!(read("dir:/a:b"), Address::Directory("/a:b".into()));
        let etcd = Address::Etcd(vec!["http://a:1".into(), "http://b:2".into()]);
        assert_eq!(read("etcd:http://a:1,http://b:2"), etcd);
        assert_eq!(read("mem:a"), Address::InProcess("a".into()));
        for (text, part) in
            [("/tmp/x", "dir:PATH"), ("dir:", "dir:PATH"), ("etcd:a:1", "etcd:http")]
        {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn whoever_opens_the_same_name_meets_and_nobody_else() {
        let open = |name: &str| Address::InProcess(name.into()).open().unwrap();
        let (one, same, other) = (open("address-a"), open("address-a"), open("address-b"));
        let key = Key::new(["k"]).unwrap();
        one.put(&key, b"v", Life::Kept).unwrap();
        assert!(same.list(&key).unwrap().entries.contains_key(&key));
        assert!(other.list(&key).unwrap().entries.is_empty());
    }

    #[test]
    fn a_session_of_another_kind_keeps_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let directory = Address::Directory(folder.path().to_owned()).open().unwrap();
        let session = directory.session(Duration::from_secs(5)).unwrap();
        let memory = Address::InProcess("address-c".into()).open().unwrap();
        let key = Key::new(["k"]).unwrap();
        let refused = memory.put(&key, b"v", Life::Session(&session));
        assert!(matches!(refused, Err(RendezvousError::ForeignSession { .. })), "{refused:?}");
        directory.put(&key, b"v", Life::Session(&session)).unwrap();
        drop(session);
        assert!(directory.list(&key).unwrap().entries.is_empty());
    }
}
