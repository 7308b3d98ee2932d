//! A rendezvous over a directory that all ranks can see: one file per source rank, replaced atomically.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::publication::{MAX_ENCODED_BYTES, Publication, PublicationError};

/// How often a waiting target looks. Start-up only: no cycle waits here.
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
        let path = self.file(publication.rank());
        let draft = path.with_extension(format!("draft-{}", std::process::id()));
        fs::write(&draft, publication.encode())
            .map_err(|source| io_error("write", &draft, source))?;
        fs::rename(&draft, &path).map_err(|source| io_error("rename to", &path, source))
    }

    /// Takes back what a rank published.
    ///
    /// # Errors
    /// [`DirectoryError::Io`]; not when there was nothing.
    pub fn withdraw(&self, rank: u32) -> Result<(), DirectoryError> {
        let path = self.file(rank);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &path, error))
            }
            _ => Ok(()),
        }
    }

    /// What a source rank has published, if it has.
    ///
    /// # Errors
    /// [`DirectoryError`] when there is something but not a publication of that rank.
    pub fn read(&self, rank: u32) -> Result<Option<Publication>, DirectoryError> {
        let path = self.file(rank);
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("read", &path, error)),
            Ok(metadata) if metadata.len() > MAX_ENCODED_BYTES as u64 => {
                let bytes = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
                let source = PublicationError::TooLarge { bytes };
                return Err(DirectoryError::Publication { path, source });
            }
            Ok(_) => {}
        }
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|source| io_error("read", &path, source))?,
        };
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
        let started = Instant::now();
        let mut missing: Vec<u32> = ranks.into_iter().collect();
        let mut found = Vec::with_capacity(missing.len());
        loop {
            let mut still_missing = Vec::new();
            for rank in missing {
                match self.read(rank)? {
                    Some(publication) => found.push(publication),
                    None => still_missing.push(rank),
                }
            }
            missing = still_missing;
            if missing.is_empty() {
                found.sort_by_key(Publication::rank);
                return Ok(found);
            }
            let waited = started.elapsed();
            if waited >= patience {
                return Err(DirectoryError::Deadline { path: self.path.clone(), missing, waited });
            }
            std::thread::sleep(POLL.min(patience - waited));
        }
    }

    fn file(&self, rank: u32) -> PathBuf {
        self.path.join(format!("source-{rank}.refit"))
    }
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> DirectoryError {
    DirectoryError::Io { action, path: path.to_path_buf(), source }
}
