//! Two transports as one: GPUs that map one another's memory where they can, NIXL everywhere else.
//!
//! What an agent publishes is what both of its transports publish. Whoever connects takes the near one if it reaches the
//! peer, and the far one otherwise; each peer is read by one of them, and one program reads from peers of either kind.
//! [`capabilities_of`] says what the lowering may ask of which peer, [`route`] which way was taken
//! and why.
//!
//! Memory is registered with both. Memory that the near one does not handle, the host's, is registered with the far one
//! alone, and its agent is then read through that alone. A refusal of the near one for any other reason is an error:
//! memory that it cannot map is memory that NIXL reads a thousand times slower, without saying so.
//!
//! A batch that fails names the transport in front of the agent's name: `nixl/engine-0-…`.
//!
//! [`capabilities_of`]: crate::Transport::capabilities_of
//! [`route`]: crate::Transport::route
//!
//! # Example
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use refit_pool::cuda::{Device, Driver, Stream};
//! use refit_transport::Transport;
//! use refit_transport::auto::AutoTransport;
//! use refit_transport::peer::{PeerOptions, PeerTransport};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::primary(Driver::load()?, 0)?;
//! let peer = PeerTransport::new(Arc::new(Stream::new(&device)?), PeerOptions::new("engine-0"));
//! // With feature `nixl`: NixlLibrary::load(&[]) and NixlTransport::new, errors turned into text alike.
//! let nixl = Err("this program was built without it".to_owned());
//! let engine = AutoTransport::new(peer.map_err(|error| error.to_string()), nixl)?;
//! # let (name, metadata) = (String::new(), Vec::new());
//! let trainer = engine.connect(&name, &metadata)?;
//! println!("{}", engine.route(&trainer));
//! # Ok(()) }
//! ```

mod blob;
mod choice;
mod never;
mod transport;

use crate::peer::PeerTransport;

pub use never::Never;
pub use transport::{Auto, AutoReads, AutoRegistration};

/// The peer transport and NIXL.
#[cfg(feature = "nixl")]
pub type AutoTransport = Auto<PeerTransport, crate::nixl::NixlTransport>;
/// The peer transport alone: NIXL was left out of this build.
#[cfg(not(feature = "nixl"))]
pub type AutoTransport = Auto<PeerTransport, Never>;
