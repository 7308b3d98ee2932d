//! `refit serve` and `refit pull`: one rank each, as a process that runs until it is told to stop.
//!
//! A process has a main thread, which waits for signals and for the end of the other, and one that does everything else:
//! whatever a call into a transport does, a second signal and the bound on leaving hold.

mod args;
mod checkpoint;
mod cycle;
mod endpoint;
mod figures;
mod log;
mod pull;
mod rank;
mod serve;
#[cfg_attr(
    not(feature = "nixl"),
    allow(
        dead_code,
        reason = "what only NIXL asks for, and without a way between processes nobody meets"
    )
)]
mod start;
#[cfg_attr(
    not(feature = "nixl"),
    allow(
        dead_code,
        reason = "what only NIXL asks for, and without a way between processes nobody meets"
    )
)]
mod voice;
mod wakes;

pub(crate) use self::args::{PullArgs, ServeArgs};
pub(crate) use self::checkpoint::Checkpoint;
pub(crate) use self::pull::run as run_pull;
pub(crate) use self::serve::run as run_serve;
