//! The transports a person can name.

#[cfg(feature = "nixl")]
use std::sync::Arc;

use clap::ValueEnum;

use crate::device::DeviceName;
#[cfg(feature = "nixl")]
use crate::device::Home;
use crate::error::CliError;

/// How bytes move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TransportName {
    /// Inside this process, through the reference transport; host memory only
    Local,
    /// Through NIXL
    Nixl,
    /// Between GPUs that can map each other's memory
    Peer,
    /// For each pair of ranks what suits it: peer where GPUs can map each other, NIXL elsewhere
    Auto,
}

impl TransportName {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Nixl => "nixl",
            Self::Peer => "peer",
            Self::Auto => "auto",
        }
    }

    /// The transport that moves memory of this kind, and whether this build has it.
    ///
    /// # Errors
    /// [`CliError::Usage`] for combinations that there are not, with one that there is.
    pub(crate) fn on(self, device: DeviceName) -> Result<Self, CliError> {
        let chosen = match (self, device) {
            (Self::Auto, DeviceName::Host) if cfg!(feature = "nixl") => Self::Nixl,
            (Self::Auto, DeviceName::Host) => Self::Local,
            (Self::Local, DeviceName::Cuda) => {
                let text = "the local transport moves host memory only; with --device cuda take --transport auto, peer \
                            or nixl";
                return Err(CliError::Usage(text.to_owned()));
            }
            (Self::Peer, DeviceName::Host) => {
                let text = "the peer transport moves memory of GPUs only; add --device cuda, or take --transport nixl \
                            or local";
                return Err(CliError::Usage(text.to_owned()));
            }
            (chosen, _) => chosen,
        };
        if device == DeviceName::Cuda && cfg!(not(feature = "cuda")) {
            return Err(without("CUDA", "cuda"));
        }
        if chosen == Self::Nixl && cfg!(not(feature = "nixl")) {
            return Err(without("NIXL", "nixl"));
        }
        Ok(chosen)
    }
}

/// What a build says that lacks something.
pub(crate) fn without(what: &str, feature: &str) -> CliError {
    CliError::Usage(format!(
        "this build has no {what}; run `cargo xtask refit -- ...`, or build with `--features {feature}`"
    ))
}

/// What is said where a transport that [`TransportName::on`] let pass is not there all the same.
pub(crate) fn missing(name: TransportName) -> CliError {
    CliError::Usage(format!(
        "the transport `{}` is not one that this build can use here",
        name.name()
    ))
}

/// A NIXL agent whose name starts with `name`, for memory that lives in `home`. One that only reads needs no thread to
/// answer peers.
#[cfg(feature = "nixl")]
pub(crate) fn nixl(
    name: &str,
    answers_peers: bool,
    home: &Home,
) -> Result<Arc<refit::transport::nixl::NixlTransport>, CliError> {
    use refit::transport::nixl::{NixlLibrary, NixlOptions, NixlTransport};
    home.enter()?;
    let library = NixlLibrary::load(&[]).map_err(|error| CliError::Nixl(error.to_string()))?;
    let transport =
        NixlTransport::new(library, NixlOptions::new(name).with_progress_thread(answers_peers))
            .map_err(|error| CliError::Nixl(error.to_string()))?;
    Ok(Arc::new(transport))
}
