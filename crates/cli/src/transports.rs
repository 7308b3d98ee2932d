//! The transports a person can name.

#[cfg(any(feature = "nixl", feature = "cuda"))]
use std::sync::Arc;

use clap::ValueEnum;

use crate::device::DeviceName;
#[cfg(any(feature = "nixl", feature = "cuda"))]
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
    /// For each pair of ranks what suits it: peer where GPUs can map each other, NIXL elsewhere and on the host (local
    /// in a build without NIXL)
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
    nixl_of(nixl_options(name, answers_peers, home))
}

/// The options of such an agent.
#[cfg(feature = "nixl")]
pub(crate) fn nixl_options(
    name: &str,
    answers_peers: bool,
    home: &Home,
) -> refit::transport::nixl::NixlOptions {
    use refit::transport::nixl::NixlOptions;
    let options = match home {
        Home::Host => NixlOptions::new(name),
        #[cfg(feature = "cuda")]
        Home::Cuda(gpu) => NixlOptions::on_device(name, gpu.device().clone()),
    };
    options.with_progress_thread(answers_peers)
}

/// A NIXL agent with these options.
#[cfg(feature = "nixl")]
pub(crate) fn nixl_of(
    options: refit::transport::nixl::NixlOptions,
) -> Result<Arc<refit::transport::nixl::NixlTransport>, CliError> {
    let transport = nixl_agent(options);
    transport.map(Arc::new).map_err(|error| CliError::Nixl(error.to_string()))
}

#[cfg(feature = "nixl")]
fn nixl_agent(
    options: refit::transport::nixl::NixlOptions,
) -> Result<refit::transport::nixl::NixlTransport, Box<dyn std::error::Error>> {
    use refit::transport::nixl::{NixlLibrary, NixlTransport};
    Ok(NixlTransport::new(NixlLibrary::load(&[])?, options)?)
}

/// A peer agent of the GPU of `home` whose name starts with `name`.
#[cfg(feature = "cuda")]
pub(crate) fn peer(
    name: &str,
    home: &Home,
) -> Result<Arc<refit::transport::peer::PeerTransport>, CliError> {
    Ok(Arc::new(peer_agent(name, home)?))
}

#[cfg(feature = "cuda")]
fn peer_agent(name: &str, home: &Home) -> Result<refit::transport::peer::PeerTransport, CliError> {
    use refit::pool::cuda::Stream;
    use refit::transport::peer::{PeerOptions, PeerTransport};
    let Home::Cuda(gpu) = home else { return Err(missing(TransportName::Peer)) };
    let stream = Arc::new(Stream::new(gpu.device())?);
    Ok(PeerTransport::new(stream, PeerOptions::new(name)).map_err(refit::RefitError::from)?)
}

/// Both at once. One that cannot be had is no error: the other says so where it is chosen.
#[cfg(feature = "cuda")]
pub(crate) fn auto(
    name: &str,
    answers_peers: bool,
    home: &Home,
) -> Result<Arc<refit::transport::auto::AutoTransport>, CliError> {
    #[cfg(feature = "nixl")]
    let far =
        nixl_agent(nixl_options(name, answers_peers, home)).map_err(|error| error.to_string());
    #[cfg(not(feature = "nixl"))]
    let far = {
        let _ = answers_peers;
        Err(without("NIXL", "nixl").to_string())
    };
    auto_of(name, home, far)
}

/// What moves bytes where GPUs cannot map each other.
#[cfg(all(feature = "cuda", feature = "nixl"))]
pub(crate) type Far = refit::transport::nixl::NixlTransport;
#[cfg(all(feature = "cuda", not(feature = "nixl")))]
pub(crate) type Far = refit::transport::auto::Never;

/// Both at once, with this agent of NIXL if it could be had.
#[cfg(feature = "cuda")]
pub(crate) fn auto_of(
    name: &str,
    home: &Home,
    far: Result<Far, String>,
) -> Result<Arc<refit::transport::auto::AutoTransport>, CliError> {
    let near = peer_agent(name, home).map_err(|error| error.to_string());
    let auto = refit::transport::auto::AutoTransport::new(near, far);
    Ok(Arc::new(auto.map_err(refit::RefitError::from)?))
}
