//! The transports a person can name.

#[cfg(feature = "nixl")]
use std::sync::Arc;

use clap::ValueEnum;

/// How bytes move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TransportName {
    /// Inside this process, through the reference transport
    Local,
    /// Through NIXL
    Nixl,
}

impl TransportName {
    /// What is used when nobody says: NIXL where this build has it.
    pub(crate) const fn preferred() -> Self {
        if cfg!(feature = "nixl") { Self::Nixl } else { Self::Local }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Nixl => "nixl",
        }
    }
}

/// A NIXL agent whose name starts with `name`. One that only reads needs no thread to answer peers.
#[cfg(feature = "nixl")]
pub(crate) fn nixl(
    name: &str,
    answers_peers: bool,
) -> Result<Arc<refit::transport::nixl::NixlTransport>, crate::error::CliError> {
    use refit::transport::nixl::{NixlLibrary, NixlOptions, NixlTransport};
    let library =
        NixlLibrary::load(&[]).map_err(|error| crate::error::CliError::Nixl(error.to_string()))?;
    let transport =
        NixlTransport::new(library, NixlOptions::new(name).with_progress_thread(answers_peers))
            .map_err(|error| crate::error::CliError::Nixl(error.to_string()))?;
    Ok(Arc::new(transport))
}

/// What a build without NIXL says.
#[cfg(not(feature = "nixl"))]
pub(crate) fn without_nixl() -> crate::error::CliError {
    let advice =
        "this build has no NIXL; run `cargo xtask refit -- ...`, or build with `--features nixl`";
    crate::error::CliError::Usage(advice.to_owned())
}
