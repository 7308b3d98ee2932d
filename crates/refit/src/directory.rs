//! A rendezvous over a directory that all ranks can see: one file per source rank, and one per target rank that asks for
//! packing, replaced atomically.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::RefitError;
use crate::publication::{MAX_ENCODED_BYTES, Publication, PublicationError};
use crate::request::{MAX_REQUEST_BYTES, PackRequest, RequestError};

/// How often a waiting rank looks. Start-up only: no cycle waits here.
const POLL: Duration = Duration::from_millis(5);

/// A directory where sources publish and targets look.
#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
}

/// Why meeting in a directory failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirectoryError {
    /// The file system refused.
    #[error(
        "cannot {action} {path}: {source}; every rank must be able to write and read this directory"
    )]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not a publication.
    #[error("{path}: {source}")]
    Publication {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: PublicationError,
    },
    /// A file is not a request.
    #[error("{path}: {source}")]
    Request {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: RequestError,
    },
    /// A file holds another rank's request.
    #[error("{path} holds the request of target rank {found}, not of rank {expected}")]
    WrongTarget {
        /// The file.
        path: PathBuf,
        /// The rank in its name.
        expected: u32,
        /// The rank inside.
        found: u32,
    },
    /// Not every target rank said in time what it would like to be packed.
    #[error(
        "target ranks {missing:?} did not ask in {path} within {waited:?}; one that wants nothing packed says so too"
    )]
    NotAsked {
        /// The directory.
        path: PathBuf,
        /// The ranks that are missing.
        missing: Vec<u32>,
        /// How long the source waited.
        waited: Duration,
    },
    /// A file holds another rank's publication.
    #[error("{path} holds the publication of rank {found}, not of rank {expected}")]
    WrongRank {
        /// The file.
        path: PathBuf,
        /// The rank in its name.
        expected: u32,
        /// The rank inside.
        found: u32,
    },
    /// Not every source rank published in time.
    #[error("source ranks {missing:?} did not publish in {path} within {waited:?}")]
    Deadline {
        /// The directory.
        path: PathBuf,
        /// The ranks that are missing.
        missing: Vec<u32>,
        /// How long the target waited.
        waited: Duration,
    },
}

impl Directory {
    /// Meets in `path`, which is created when it is not there.
    ///
    /// # Errors
    /// [`DirectoryError::Io`].
    pub fn new(path: impl Into<PathBuf>) -> Result<Self, DirectoryError> {
        let path = path.into();
        fs::create_dir_all(&path).map_err(|source| io_error("create", &path, source))?;
        Ok(Self { path })
    }

    /// Publishes for one source rank, replacing what it published before. Readers see the old or the new, whole.
    ///
    /// # Errors
    /// [`DirectoryError::Io`].
    pub fn publish(&self, publication: &Publication) -> Result<(), DirectoryError> {
        replace(&self.file(publication.rank()), &publication.encode())
    }

    /// Takes back what a rank published.
    ///
    /// # Errors
    /// [`DirectoryError::Io`]; not when there was nothing.
    pub fn withdraw(&self, rank: u32) -> Result<(), DirectoryError> {
        remove(&self.file(rank))
    }

    /// What a source rank has published, if it has.
    ///
    /// # Errors
    /// [`DirectoryError`] when there is something but not a publication of that rank.
    pub fn read(&self, rank: u32) -> Result<Option<Publication>, DirectoryError> {
        let path = self.file(rank);
        let too_large = |bytes| {
            let (path, source) = (path.clone(), PublicationError::TooLarge { bytes });
            DirectoryError::Publication { path, source }
        };
        let Some(bytes) = contents(&path, MAX_ENCODED_BYTES, too_large)? else { return Ok(None) };
        let publication = match Publication::decode(&bytes) {
            Ok(publication) => publication,
            Err(source) => return Err(DirectoryError::Publication { path, source }),
        };
        if publication.rank() != rank {
            return Err(DirectoryError::WrongRank {
                path,
                expected: rank,
                found: publication.rank(),
            });
        }
        Ok(Some(publication))
    }

    /// Waits until every one of `ranks` has published.
    ///
    /// # Errors
    /// [`DirectoryError::Deadline`] names the ranks that are missing after `patience`.
    pub fn wait(
        &self,
        ranks: impl IntoIterator<Item = u32>,
        patience: Duration,
    ) -> Result<Vec<Publication>, DirectoryError> {
        let found = wait(ranks, patience, |rank| self.read(rank));
        match found {
            Ok(found) => Ok(found),
            Err(Unmet::Error(error)) => Err(error),
            Err(Unmet::Deadline { missing, waited }) => {
                Err(DirectoryError::Deadline { path: self.path.clone(), missing, waited })
            }
        }
    }

    /// Tells sources what a target rank would like to be packed, replacing what it said before.
    ///
    /// # Errors
    /// [`DirectoryError::Io`].
    pub fn ask(&self, request: &PackRequest) -> Result<(), DirectoryError> {
        replace(&self.request_file(request.target()), &request.encode())
    }

    /// Takes back what a target rank asked for.
    ///
    /// # Errors
    /// [`DirectoryError::Io`]; not when there was nothing.
    pub fn withdraw_request(&self, target: u32) -> Result<(), DirectoryError> {
        remove(&self.request_file(target))
    }

    /// What a target rank has asked for, if it has.
    ///
    /// # Errors
    /// [`DirectoryError`] when there is something but not a request of that rank.
    pub fn request(&self, target: u32) -> Result<Option<PackRequest>, DirectoryError> {
        let path = self.request_file(target);
        let wrong = |source| DirectoryError::Request { path: path.clone(), source };
        let too_large = |bytes| wrong(RequestError::TooLarge { bytes });
        let Some(bytes) = contents(&path, MAX_REQUEST_BYTES, too_large)? else { return Ok(None) };
        let request = PackRequest::decode(&bytes).map_err(wrong)?;
        if request.target() != target {
            let found = request.target();
            return Err(DirectoryError::WrongTarget { path, expected: target, found });
        }
        Ok(Some(request))
    }

    /// Waits until every one of these target ranks has said what it would like to be packed, if only nothing.
    ///
    /// # Errors
    /// [`DirectoryError::NotAsked`] names the ranks that are missing after `patience`. A source can go on without
    /// packing, or with what [`request`](Self::request) finds.
    pub fn wait_for_requests(
        &self,
        targets: impl IntoIterator<Item = u32>,
        patience: Duration,
    ) -> Result<Vec<PackRequest>, DirectoryError> {
        match wait(targets, patience, |target| self.request(target)) {
            Ok(found) => Ok(found),
            Err(Unmet::Error(error)) => Err(error),
            Err(Unmet::Deadline { missing, waited }) => {
                Err(DirectoryError::NotAsked { path: self.path.clone(), missing, waited })
            }
        }
    }

    /// Waits until every one of `ranks` has published and has packed what this request asks of it. What has not been
    /// packed after `patience` comes as it is: it is read as well, at the cost that it had before.
    ///
    /// # Errors
    /// [`DirectoryError::Deadline`] names the ranks that have published nothing after `patience`.
    pub fn wait_until_packed(
        &self,
        ranks: impl IntoIterator<Item = u32>,
        request: &PackRequest,
        patience: Duration,
    ) -> Result<Vec<Publication>, RefitError> {
        let ranks: Vec<u32> = ranks.into_iter().collect();
        let packed = wait(ranks.iter().copied(), patience, |rank| {
            let found = self.read(rank)?;
            let Some(publication) = found else { return Ok(None) };
            Ok::<_, RefitError>(request.is_answered_by(&publication)?.then_some(publication))
        });
        match packed {
            Ok(found) => Ok(found),
            Err(Unmet::Error(error)) => Err(error),
            Err(Unmet::Deadline { missing, waited }) => {
                tracing::warn!(?missing, ?waited, "source ranks did not pack what was asked for");
                Ok(self.wait(ranks, Duration::ZERO)?)
            }
        }
    }

    fn file(&self, rank: u32) -> PathBuf {
        self.path.join(format!("source-{rank}.refit"))
    }

    fn request_file(&self, target: u32) -> PathBuf {
        self.path.join(format!("pack-{target}.refit"))
    }
}

/// Why waiting ended without what was waited for.
enum Unmet<E> {
    Error(E),
    Deadline { missing: Vec<u32>, waited: Duration },
}

/// What `find` finds for every one of `ranks`, in ascending order, once it has found all.
fn wait<V, E>(
    ranks: impl IntoIterator<Item = u32>,
    patience: Duration,
    find: impl Fn(u32) -> Result<Option<V>, E>,
) -> Result<Vec<V>, Unmet<E>> {
    let started = Instant::now();
    let mut missing: Vec<u32> = ranks.into_iter().collect();
    let mut found = BTreeMap::new();
    loop {
        let mut still_missing = Vec::new();
        for rank in missing {
            match find(rank).map_err(Unmet::Error)? {
                Some(value) => drop(found.insert(rank, value)),
                None => still_missing.push(rank),
            }
        }
        missing = still_missing;
        if missing.is_empty() {
            return Ok(found.into_values().collect());
        }
        let waited = started.elapsed();
        if waited >= patience {
            return Err(Unmet::Deadline { missing, waited });
        }
        std::thread::sleep(POLL.min(patience - waited));
    }
}

/// Readers see the old bytes or the new, whole.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), DirectoryError> {
    let draft = path.with_extension(format!("draft-{}", std::process::id()));
    fs::write(&draft, bytes).map_err(|source| io_error("write", &draft, source))?;
    fs::rename(&draft, path).map_err(|source| io_error("rename to", path, source))
}

fn remove(path: &Path) -> Result<(), DirectoryError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error("remove", path, error))
        }
        _ => Ok(()),
    }
}

/// The bytes of a file, if it is there and no larger than `most`.
fn contents(
    path: &Path,
    most: usize,
    too_large: impl Fn(usize) -> DirectoryError,
) -> Result<Option<Vec<u8>>, DirectoryError> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("read", path, error)),
        Ok(metadata) if metadata.len() > most as u64 => {
            return Err(too_large(usize::try_from(metadata.len()).unwrap_or(usize::MAX)));
        }
        Ok(_) => {}
    }
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some).map_err(|source| io_error("read", path, source)),
    }
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> DirectoryError {
    DirectoryError::Io { action, path: path.to_path_buf(), source }
}
