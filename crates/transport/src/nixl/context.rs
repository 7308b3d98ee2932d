//! The device that is current while NIXL is called.
//!
//! UCX looks at what is current on the calling thread: to unpack a peer's keys, to find out which devices it may map,
//! to pick a stream. Threads of a host need not have anything current, and keep what they have.

#[cfg(feature = "cuda")]
use refit_pool::cuda::Device;

use super::NixlOptions;
use crate::Cause;

/// An agent's device, if it has one. Without the feature `cuda` no agent has.
#[derive(Clone, Debug)]
pub(super) struct Context {
    #[cfg(feature = "cuda")]
    device: Option<Device>,
}

#[cfg(feature = "cuda")]
impl Context {
    pub(super) fn of(options: &NixlOptions) -> Self {
        Self { device: options.device.clone() }
    }

    /// Makes the device current on this thread until the guard goes.
    pub(super) fn enter(&self) -> Result<impl Sized + '_, Cause> {
        let entered = self.device.as_ref().map(Device::enter).transpose();
        entered.map_err(|error| Cause::Call {
            call: "make a device current",
            status: error.to_string(),
        })
    }
}

#[cfg(not(feature = "cuda"))]
impl Context {
    pub(super) fn of(_options: &NixlOptions) -> Self {
        Self {}
    }

    #[allow(
        clippy::unused_self,
        clippy::unnecessary_wraps,
        reason = "with the feature it can fail"
    )]
    pub(super) fn enter(&self) -> Result<impl Sized + '_, Cause> {
        Ok(())
    }
}

impl Context {
    /// As [`enter`](Self::enter), where going on without is better than not going on.
    pub(super) fn try_enter(&self) -> Option<impl Sized + '_> {
        let entered = self.enter();
        if let Err(cause) = &entered {
            tracing::warn!(%cause, "NIXL is called without its device");
        }
        entered.ok()
    }
}
