//! The agents that move bytes, by name.

use std::sync::{Arc, OnceLock};

use pyo3::prelude::*;
use refit::transport::{Transport, local};
use refit_service::rendezvous::Address;

use crate::data::one_of;
use crate::failure::{Failure, Kind};
use crate::home::Home;

/// How bytes move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Auto,
    Local,
    Nixl,
    Peer,
}

/// What is wanted of an agent.
#[derive(Clone, Debug)]
#[cfg_attr(
    not(all(feature = "nixl", feature = "cuda")),
    allow(dead_code, reason = "the in-process transport wants little of it")
)]
pub(crate) struct Wish {
    pub(crate) way: Way,
    /// The first part of its name.
    pub(crate) name: String,
    pub(crate) home: Home,
    /// Whether others read from it.
    pub(crate) is_read: bool,
    /// Bytes that it will register.
    pub(crate) bytes: u64,
    pub(crate) insecure_tcp: Option<String>,
    /// Places where NIXL may be.
    pub(crate) nixl: Vec<std::path::PathBuf>,
}

/// Makes agents, each of an incarnation of its own.
pub(crate) type Agents<T> = Box<dyn Fn() -> Result<Arc<T>, Failure> + Send>;

/// What goes on over whichever transport it is.
pub(crate) trait Begin {
    type Made;

    fn over<T: Transport>(self, agents: Agents<T>) -> Result<Self::Made, Failure>;
}

impl Way {
    pub(crate) fn read(name: &str) -> Result<Self, Failure> {
        one_of(
            "transport",
            name,
            &[
                ("auto", Self::Auto),
                ("nixl", Self::Nixl),
                ("peer", Self::Peer),
                ("local", Self::Local),
            ],
        )
    }

    /// What this comes to where ranks meet at an address, with memory of this kind.
    pub(crate) fn at(self, address: &Address, home: &Home) -> Result<Self, Failure> {
        let inside = matches!(address, Address::InProcess(_));
        let host = matches!(home, Home::Host);
        let refuse = |text: &str| Err(Failure::new(Kind::Config, text));
        match self {
            Self::Auto if inside && host => Ok(Self::Local),
            Self::Auto if host => Ok(Self::Nixl),
            Self::Local if !inside => refuse(
                "the local transport does not leave this process: meet at mem:NAME, or take another transport",
            ),
            Self::Local if !host => refuse(
                "the local transport moves host memory only: take transport=\"auto\" for GPUs",
            ),
            Self::Peer if host => {
                refuse("the peer transport moves memory of GPUs only: take transport=\"auto\"")
            }
            way => Ok(way),
        }
    }
}

/// Tries the host once, and begins what is to go on over agents of this wish.
pub(crate) fn begin<B: Begin>(wish: Wish, begin: B) -> Result<B::Made, Failure> {
    match wish.way {
        Way::Local => begin.over(Box::new(move || Ok(Arc::new(local(&wish.name)?)))),
        #[cfg(feature = "nixl")]
        Way::Nixl => {
            let options = options(&wish);
            check(&wish, &options)?;
            begin.over(Box::new(move || Ok(Arc::new(nixl(&wish, &options)?))))
        }
        #[cfg(feature = "cuda")]
        Way::Peer => begin.over(Box::new(move || Ok(Arc::new(peer(&wish)?)))),
        #[cfg(feature = "cuda")]
        Way::Auto => {
            use refit::transport::auto::AutoTransport;
            #[cfg(feature = "nixl")]
            let far = {
                let options = options(&wish);
                // One of the two ways is enough.
                let checked = check(&wish, &options).map_err(|failure| failure.to_string());
                move |wish: &Wish| {
                    let agent = checked.clone().map(|()| nixl(wish, &options));
                    agent.and_then(|agent| agent.map_err(|failure| failure.to_string()))
                }
            };
            #[cfg(not(feature = "nixl"))]
            let far = |_: &Wish| Err("this build has no NIXL".to_owned());
            begin.over(Box::new(move || {
                let near = peer(&wish).map_err(|failure| failure.to_string());
                Ok(Arc::new(AutoTransport::new(near, far(&wish))?))
            }))
        }
        #[allow(unreachable_patterns, reason = "a build with all features has all of them")]
        way => Err(Failure::new(Kind::Config, format!("this build has no transport for {way:?}"))),
    }
}

/// An agent that all others of this process can read.
fn local(name: &str) -> Result<local::LocalTransport, Failure> {
    static NETWORK: OnceLock<local::Network> = OnceLock::new();
    let network = NETWORK.get_or_init(local::Network::new);
    // Several ranks of one name may live one after the other.
    let incarnation = refit::transport::draw_incarnation(name)?;
    Ok(local::LocalTransport::new(network, &format!("{name}-{incarnation:032x}"))?)
}

/// The file that NIXL was loaded from.
#[cfg(feature = "nixl")]
pub(crate) fn load_nixl(candidates: &[std::path::PathBuf]) -> Result<String, Failure> {
    use refit::transport::nixl::NixlLibrary;
    let place = NixlLibrary::load(&paths(candidates))?.path();
    Ok(place.map_or_else(|| "libnixl_capi.so".to_owned(), |place| place.display().to_string()))
}

#[cfg(not(feature = "nixl"))]
pub(crate) fn load_nixl(_: &[std::path::PathBuf]) -> Result<String, Failure> {
    Err(Failure::new(Kind::NixlUnavailable, "this build has no NIXL"))
}

#[cfg(feature = "nixl")]
fn options(wish: &Wish) -> refit::transport::nixl::NixlOptions {
    use refit::transport::nixl::{Lanes, NixlOptions};
    let lanes = match wish.insecure_tcp.as_deref() {
        None => Lanes::Auto,
        Some("all") => Lanes::InsecureTcp { interface: None },
        Some(interface) => Lanes::InsecureTcp { interface: Some(interface.to_owned()) },
    };
    let options = match &wish.home {
        Home::Host => NixlOptions::new(&wish.name),
        #[cfg(feature = "cuda")]
        Home::Cuda(device) => NixlOptions::on_device(&wish.name, device.clone()),
    };
    options.with_progress_thread(wish.is_read).with_publishing(wish.is_read).with_lanes(lanes)
}

/// Tries the host before a model depends on it.
#[cfg(feature = "nixl")]
fn check(wish: &Wish, options: &refit::transport::nixl::NixlOptions) -> Result<(), Failure> {
    use refit::transport::nixl::{Demands, preflight};
    /// Peers that a rank may have at a time.
    const PEERS: u32 = 64;
    preflight(&paths(&wish.nixl), options, Demands::new(wish.bytes, PEERS))?;
    Ok(())
}

#[cfg(feature = "nixl")]
fn nixl(
    wish: &Wish,
    options: &refit::transport::nixl::NixlOptions,
) -> Result<refit::transport::nixl::NixlTransport, Failure> {
    use refit::transport::nixl::{NixlLibrary, NixlTransport};
    Ok(NixlTransport::new(NixlLibrary::load(&paths(&wish.nixl))?, options.clone())?)
}

#[cfg(feature = "nixl")]
fn paths(candidates: &[std::path::PathBuf]) -> Vec<&std::path::Path> {
    candidates.iter().map(std::path::PathBuf::as_path).collect()
}

#[cfg(feature = "cuda")]
fn peer(wish: &Wish) -> Result<refit::transport::peer::PeerTransport, Failure> {
    use refit::pool::cuda::Stream;
    use refit::transport::peer::{PeerOptions, PeerTransport};
    let Home::Cuda(device) = &wish.home else {
        return Err(Failure::new(Kind::Config, "the peer transport moves memory of GPUs only"));
    };
    let stream = Arc::new(Stream::new(device)?);
    Ok(PeerTransport::new(stream, PeerOptions::new(&wish.name))?)
}

/// Where `refit_rl` knows NIXL to be.
pub(crate) fn nixl_places(py: Python<'_>) -> PyResult<Vec<std::path::PathBuf>> {
    py.import("refit_rl._nixl")?.call_method0("candidates")?.extract()
}
