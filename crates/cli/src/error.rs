//! Everything that ends a command with exit status 2 and one line.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use refit::RefitError;
use refit::translate::TranslateError;
use refit_service::MeetingError;
use refit_service::reader::RefreshError;
use refit_service::rendezvous::{AddressError, RendezvousError, SecretError};
use refit_service::replica::ReplicaError;
use refit_service::source::SourceError;

use crate::case::CaseError;

#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("{path}: {source}")]
    Config { path: PathBuf, source: TranslateError },
    #[error(transparent)]
    Case(#[from] CaseError),
    #[error(transparent)]
    Translate(#[from] TranslateError),
    #[error(transparent)]
    Refit(#[from] RefitError),
    #[error(transparent)]
    Meeting(Box<MeetingError>),
    #[error("{side} sizes: {reason}")]
    Sizes { side: &'static str, reason: String },
    #[error("{0}")]
    Usage(String),
    #[error("NIXL cannot be used: {0}")]
    #[cfg_attr(
        not(feature = "nixl"),
        allow(dead_code, reason = "only a build with NIXL can fail to load it")
    )]
    Nixl(String),
    #[cfg(feature = "cuda")]
    #[error("GPUs cannot be used: {0}")]
    Cuda(#[from] refit::pool::cuda::CudaError),
    #[error("{role} rank {rank}: {reason}")]
    Rank { role: &'static str, rank: u32, reason: String },
    #[error("{0}")]
    Mismatch(String),
    #[error("metrics cannot be answered at {at}: {why}")]
    Metrics { at: std::net::SocketAddr, why: String },
    #[error(transparent)]
    Source(#[from] Box<SourceError>),
    #[error(transparent)]
    Replica(#[from] Box<ReplicaError>),
    #[error(transparent)]
    Refresh(#[from] Box<RefreshError>),
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// Not a failure: what was being done is of no use any more.
    #[error("told to stop")]
    Stopped,
    #[error(
        "{readers} readers did not give their leases back within {drain:?} (--drain): what they read fails"
    )]
    Unreleased { readers: usize, drain: Duration },
    #[error("cannot {action}: {source}")]
    System { action: &'static str, source: io::Error },
}

impl From<MeetingError> for CliError {
    fn from(error: MeetingError) -> Self {
        Self::Meeting(Box::new(error))
    }
}

impl From<RendezvousError> for CliError {
    fn from(error: RendezvousError) -> Self {
        MeetingError::from(error).into()
    }
}

impl From<AddressError> for CliError {
    fn from(error: AddressError) -> Self {
        match error {
            AddressError::NoEtcd => crate::transports::without("etcd", "etcd"),
            AddressError::Read { path, source } => Self::Read { path, source },
            AddressError::Rendezvous(error) => error.into(),
            other => Self::Usage(other.to_string()),
        }
    }
}

impl CliError {
    /// Whether another command line, and not another host or another try, is what helps.
    pub(crate) fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Usage(_)
                | Self::Sizes { .. }
                | Self::Config { .. }
                | Self::Translate(_)
                | Self::Secret(_)
        )
    }

    /// Whether another process has this rank's place.
    pub(crate) fn is_taken(&self) -> bool {
        match self {
            Self::Source(error) => matches!(**error, SourceError::Taken { .. }),
            Self::Replica(error) => match &**error {
                ReplicaError::Source(error) => matches!(**error, SourceError::Taken { .. }),
                error => matches!(error, ReplicaError::Taken { .. }),
            },
            _ => false,
        }
    }

    pub(crate) fn system(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { action, source }
    }
}

impl From<SourceError> for CliError {
    fn from(error: SourceError) -> Self {
        Box::new(error).into()
    }
}

impl From<ReplicaError> for CliError {
    fn from(error: ReplicaError) -> Self {
        Box::new(error).into()
    }
}

/// Any step of a refit that failed, without the state it left.
impl<S: std::fmt::Debug> From<refit::Failed<S>> for CliError {
    fn from(failed: refit::Failed<S>) -> Self {
        Self::Refit(failed.error)
    }
}
