//! Errors of the crates below as exceptions of `refit_rl.errors`.
//!
//! Only kinds are chosen here; every text comes from where the error does.

use std::error::Error;
use std::fmt;

use pyo3::prelude::*;
use refit::RefitError;
use refit::planner::{LayoutError, PlanError};
use refit::translate::bands::BandsError;
use refit::translate::shards::ShardError;
use refit::translate::{Refusal, TranslateError};
use refit::transport::TransportError;
use refit_service::puller::{Cause, PullFailure};
use refit_service::reader::{Ended, RefreshError};
use refit_service::rendezvous::{AddressError, RendezvousError, SecretError};
use refit_service::replica::ReplicaError;
use refit_service::source::SourceError;

/// What will be raised, made without the interpreter.
#[derive(Debug)]
pub(crate) struct Failure(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    message: String,
    tensors: Vec<String>,
    ranks: Vec<u32>,
    cause: Option<PyErr>,
}

/// The exception's class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Busy,
    Closed,
    Config,
    Engine,
    InvalidTarget,
    Layout,
    NixlUnavailable,
    NotFenced,
    NotReady,
    Plan,
    Refit,
    Refused,
    Rendezvous,
    Taken,
    Tensor,
    Timeout,
    Transport,
    Version,
}

impl Kind {
    const fn class(self) -> &'static str {
        match self {
            Self::Busy => "BusyError",
            Self::Closed => "ClosedError",
            Self::Config => "ConfigError",
            Self::Engine => "EngineError",
            Self::InvalidTarget => "InvalidTargetError",
            Self::Layout => "LayoutError",
            Self::NixlUnavailable => "NixlUnavailableError",
            Self::NotFenced => "NotFencedError",
            Self::NotReady => "NotReadyError",
            Self::Plan => "PlanError",
            Self::Refit => "RefitError",
            Self::Refused => "RefusedError",
            Self::Rendezvous => "RendezvousError",
            Self::Taken => "TakenError",
            Self::Tensor => "TensorError",
            Self::Timeout => "TimeoutError",
            Self::Transport => "TransportError",
            Self::Version => "VersionError",
        }
    }
}

impl Failure {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        let (message, tensors, ranks) = (message.into(), Vec::new(), Vec::new());
        Self(Box::new(Inner { kind, message, tensors, ranks, cause: None }))
    }

    pub(crate) fn about(mut self, tensor: impl Into<String>) -> Self {
        self.0.tensors.push(tensor.into());
        self
    }

    /// The same, in these words.
    fn saying(mut self, message: String) -> Self {
        self.0.message = message;
        self
    }

    /// The same, in this file.
    pub(crate) fn within(mut self, file: &str) -> Self {
        self.0.message = format!("{file}: {}", self.0.message);
        self
    }

    /// The same, of this tensor.
    pub(crate) fn within_tensor(mut self, tensor: &str) -> Self {
        self.0.message = format!("`{tensor}`: {}", self.0.message);
        self.0.kind = Kind::Tensor;
        self.about(tensor)
    }

    /// The same, of a target that is a mix now.
    pub(crate) fn leaving_a_mix(mut self) -> Self {
        self.0.message = format!(
            "the live parameters are a mix of versions until a refresh succeeds: {}",
            self.0.message
        );
        self.0.kind = Kind::InvalidTarget;
        self
    }

    pub(crate) fn is(&self, kind: Kind) -> bool {
        self.0.kind == kind
    }

    pub(crate) fn rank(mut self, rank: u32) -> Self {
        self.0.ranks.push(rank);
        self
    }

    pub(crate) fn ranks(mut self, ranks: impl IntoIterator<Item = u32>) -> Self {
        self.0.ranks.extend(ranks);
        self
    }

    pub(crate) fn caused_by(mut self, cause: PyErr) -> Self {
        self.0.cause = Some(cause);
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        let Inner { kind, message, tensors, ranks, cause } = *failure.0;
        Python::attach(|py| {
            let made = py
                .import("refit_rl.errors")
                .and_then(|errors| errors.getattr(kind.class()))
                .and_then(|class| class.call1((message, tensors, ranks)));
            match made {
                Ok(value) => {
                    let error = Self::from_value(value);
                    if cause.is_some() {
                        error.set_cause(py, cause);
                    }
                    error
                }
                Err(error) => error,
            }
        })
    }
}

impl From<Refusal> for Failure {
    fn from(error: Refusal) -> Self {
        Self::new(Kind::Refused, error.to_string())
    }
}

impl From<TranslateError> for Failure {
    fn from(error: TranslateError) -> Self {
        let message = error.to_string();
        let of = |kind| Self::new(kind, message.clone());
        match error {
            TranslateError::Refused(refusal) => refusal.into(),
            TranslateError::Layout(error) => error.into(),
            TranslateError::DuplicateParam { rank, param, .. }
            | TranslateError::UnknownParam { rank, param, .. }
            | TranslateError::MissingParam { rank, param, .. }
            | TranslateError::UntiedHead { rank, param }
            | TranslateError::Shape { rank, param, .. }
            | TranslateError::Dtype { rank, param, .. }
            | TranslateError::Block { rank, param, .. }
            | TranslateError::Unwanted { rank, param, .. } => {
                of(Kind::Layout).about(param.as_ref()).rank(rank)
            }
            TranslateError::AmbiguousParam { rank, param, other } => {
                of(Kind::Layout).about(param.as_ref()).about(other.as_ref()).rank(rank)
            }
            TranslateError::NoParams { rank, .. } => of(Kind::Layout).rank(rank),
            TranslateError::LayerRange { rank, .. }
            | TranslateError::DuplicateLayer { rank, .. }
            | TranslateError::Mtp { rank, .. } => of(Kind::Config).rank(rank),
            _ => of(Kind::Config),
        }
    }
}

impl From<LayoutError> for Failure {
    fn from(error: LayoutError) -> Self {
        let failure = Self::new(Kind::Layout, error.to_string());
        match error {
            LayoutError::DuplicateParam { rank, param } => failure.about(param.as_ref()).rank(rank),
            LayoutError::TensorShape { rank, tensor, .. } => {
                failure.about(tensor.as_ref()).rank(rank)
            }
            _ => failure,
        }
    }
}

impl From<ShardError> for Failure {
    fn from(error: ShardError) -> Self {
        let failure = Self::new(Kind::Layout, error.to_string());
        match (error.name().map(ToString::to_string), error) {
            (Some(name), _) => failure.about(name),
            (None, ShardError::Layout(error)) => error.into(),
            (None, _) => failure,
        }
    }
}

impl From<BandsError> for Failure {
    fn from(error: BandsError) -> Self {
        Self::new(Kind::Layout, error.to_string())
    }
}

impl From<RefitError> for Failure {
    fn from(error: RefitError) -> Self {
        of_refit(&error)
    }
}

fn of_refit(error: &RefitError) -> Failure {
    let message = error.to_string();
    let of = |kind| Failure::new(kind, message.clone());
    match error {
        RefitError::Layout(_) | RefitError::Lower(_) | RefitError::Publication(_) => of(Kind::Plan),
        RefitError::Plan(error) => of_plan(error),
        RefitError::Size { rank, param, .. }
        | RefitError::NoMemory { rank, param }
        | RefitError::StrayMemory { rank, param } => {
            of(Kind::Tensor).about(param.as_str()).rank(*rank)
        }
        RefitError::UnknownSourceParam { rank, param } => {
            of(Kind::Plan).about(param.as_str()).rank(*rank)
        }
        RefitError::MissingPublication { rank } => of(Kind::Plan).rank(*rank),
        RefitError::NotHost { param } | RefitError::Corrupt { param, .. } => {
            of(Kind::Transport).about(param.as_str())
        }
        #[cfg(feature = "nixl")]
        RefitError::Transport(TransportError::Unavailable(_)) => of(Kind::NixlUnavailable),
        RefitError::Transport(_) | RefitError::Pool(_) | RefitError::Device { .. } => {
            of(Kind::Transport)
        }
        RefitError::Deadline { .. } => of(Kind::Timeout),
        _ => of(Kind::Refit),
    }
}

fn of_plan(error: &PlanError) -> Failure {
    let failure = Failure::new(Kind::Plan, error.to_string());
    match error {
        PlanError::TensorShape { tensor, .. } => failure.about(tensor.as_ref()),
        PlanError::Uncovered { param, tensor, .. } => {
            failure.about(param.as_ref()).about(tensor.as_ref())
        }
        PlanError::Dtype { param, rank, .. } => failure.about(param.as_ref()).rank(*rank),
        _ => failure,
    }
}

impl From<TransportError> for Failure {
    fn from(error: TransportError) -> Self {
        RefitError::from(error).into()
    }
}

#[cfg(feature = "nixl")]
impl From<refit::transport::nixl::NixlUnavailable> for Failure {
    fn from(error: refit::transport::nixl::NixlUnavailable) -> Self {
        Self::new(Kind::NixlUnavailable, error.to_string())
    }
}

#[cfg(feature = "nixl")]
impl From<refit::transport::nixl::PreflightError> for Failure {
    fn from(error: refit::transport::nixl::PreflightError) -> Self {
        use refit::transport::nixl::PreflightError;
        let kind = match error {
            PreflightError::Library(_) => Kind::NixlUnavailable,
            _ => Kind::Transport,
        };
        Self::new(kind, error.to_string())
    }
}

#[cfg(feature = "cuda")]
impl From<refit::pool::cuda::CudaError> for Failure {
    fn from(error: refit::pool::cuda::CudaError) -> Self {
        Self::new(Kind::Transport, format!("the GPU cannot be used: {error}"))
    }
}

impl From<RendezvousError> for Failure {
    fn from(error: RendezvousError) -> Self {
        let kind = match error {
            RendezvousError::Key { .. }
            | RendezvousError::Name { .. }
            | RendezvousError::Ttl { .. } => Kind::Config,
            _ => Kind::Rendezvous,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<AddressError> for Failure {
    fn from(error: AddressError) -> Self {
        match error {
            AddressError::Rendezvous(error) => error.into(),
            error => Self::new(Kind::Config, format!("rendezvous: {error}")),
        }
    }
}

impl From<SecretError> for Failure {
    fn from(error: SecretError) -> Self {
        Self::new(Kind::Config, error.to_string())
    }
}

impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Self {
        let message = error.to_string();
        let of = |kind| Self::new(kind, message.clone());
        match error {
            SourceError::Rendezvous(error) => error.into(),
            SourceError::Refit(error) => error.into(),
            SourceError::WrongRank { rank, found, .. } => of(Kind::Config).ranks([rank, found]),
            SourceError::Taken { rank, .. } => of(Kind::Taken).rank(rank),
            SourceError::Busy { rank, .. } => of(Kind::Busy).rank(rank),
            SourceError::NotNewer { .. } => of(Kind::Version),
            SourceError::Gone => of(Kind::Closed),
            // A member that others would not read: more ranks than there are, say.
            SourceError::Message(_) => of(Kind::Config),
            _ => of(Kind::Refit),
        }
    }
}

impl From<ReplicaError> for Failure {
    fn from(error: ReplicaError) -> Self {
        let message = error.to_string();
        let of = |kind| Self::new(kind, message.clone());
        match error {
            ReplicaError::Rendezvous(error) => error.into(),
            ReplicaError::Taken { place, .. } | ReplicaError::Superseded { place } => {
                of(Kind::Taken).rank(place.rank)
            }
            // The prefix says which rank; what helps is what it is about.
            ReplicaError::Staging { source, .. } => of_refresh(&source).saying(message),
            ReplicaError::Source(error) => (*error).into(),
            ReplicaError::Deadline { behind, .. } => of(Kind::Timeout).ranks(behind),
            // It joins again with every refresh, and there was no time left for that.
            ReplicaError::Vanished { place } => of(Kind::Timeout).rank(place.rank),
            ReplicaError::Invalid { place, .. } => of(Kind::InvalidTarget).rank(place.rank),
            ReplicaError::Message(_) | ReplicaError::View(_) => of(Kind::Config),
            _ => of(Kind::Refit),
        }
    }
}

impl From<Box<RefreshError>> for Failure {
    fn from(error: Box<RefreshError>) -> Self {
        of_refresh(&error)
    }
}

fn of_refresh(error: &RefreshError) -> Failure {
    let message = error.to_string();
    let of = |kind| Failure::new(kind, message.clone());
    let refused = |failure: &PullFailure| failure.cause == Cause::Refused;
    match &error.ended {
        Ended::Store(_) => of(Kind::Rendezvous),
        Ended::Lost(_) | Ended::Quarantined(_) => of(Kind::Transport),
        // No agent could take over, or a relay could not close what it offers.
        Ended::Unsettled(failure) if failure.cause == Cause::Failed => {
            match failure.reason.downcast_ref() {
                Some(SourceError::Rendezvous(_)) => of(Kind::Rendezvous),
                _ => of(Kind::Transport),
            }
        }
        // Whatever was tried cannot be joined: more time would not have helped.
        Ended::Deadline
            if !error.attempts.is_empty()
                && error.attempts.iter().all(|it| refused(&it.failure)) =>
        {
            let reasons = error.attempts.last().and_then(|it| refit_error(&it.failure));
            let about = reasons.map(of_refit);
            about.map_or_else(|| of(Kind::Plan), |about| about.saying(message.clone()))
        }
        Ended::Deadline if error.attempts.is_empty() => of(Kind::NotReady),
        _ => of(Kind::Timeout),
    }
}

/// The error of a refit that made an attempt fail.
fn refit_error(failure: &PullFailure) -> Option<&RefitError> {
    let reason: &(dyn Error + 'static) = failure.reason.as_ref();
    reason.downcast_ref()
}
