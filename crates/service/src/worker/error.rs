use std::error::Error;
use std::io;
use std::sync::Arc;

/// Why a worker gave no answer.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The command was not begun by its deadline.
    #[error(
        "worker `{worker}` did not begin `{what}` in time and will not: its thread has been in `{doing}` for {millis} ms; \
         wait for that, or renew the worker"
    )]
    Busy {
        /// The worker.
        worker: String,
        /// The command.
        what: &'static str,
        /// The command before it.
        doing: &'static str,
        /// For how long that has run.
        millis: u64,
    },
    /// The command was begun and has not returned.
    #[error(
        "worker `{worker}`, agent `{agent}`, did not end `{what}` in time: its thread has been in `{doing}` for {millis} ms, \
         in a call that does not return; what it holds stays with it, renew the worker to go on with a fresh agent"
    )]
    Stuck {
        /// The worker.
        worker: String,
        /// Its agent.
        agent: String,
        /// The command.
        what: &'static str,
        /// What its thread is in.
        doing: &'static str,
        /// For how long.
        millis: u64,
    },
    /// A command, or the agent itself, panicked. The worker does nothing more.
    #[error(
        "worker `{worker}` panicked in `{what}`: {message}; its agent is retired, renew the worker to go on"
    )]
    Panicked {
        /// The worker.
        worker: String,
        /// What it was doing.
        what: &'static str,
        /// What the panic said.
        message: String,
    },
    /// No agent could be made.
    #[error("worker `{worker}` has no agent: {source}")]
    Build {
        /// The worker.
        worker: String,
        /// Why.
        source: Arc<dyn Error + Send + Sync>,
    },
    /// Retired agents keep more memory than they may.
    #[error(
        "agents that `{worker}` retired, and the one it has, keep {bytes} bytes that reads may still write, more \
         than {limit}; end the silent peer, which settles them, or restart this process"
    )]
    Quarantine {
        /// The worker, or the owner of the [account](super::Quarantine).
        worker: String,
        /// Bytes that would be kept.
        bytes: u64,
        /// Bytes that may be.
        limit: u64,
    },
    /// The worker was renewed or shut down while the command waited.
    #[error("worker `{worker}` ended before `{what}`; call it again if it was renewed")]
    Ended {
        /// The worker.
        worker: String,
        /// The command, or what it was asked for.
        what: &'static str,
    },
    /// The system gave no thread.
    #[error("worker `{worker}` cannot have a thread: {source}")]
    Spawn {
        /// The worker.
        worker: String,
        /// Why.
        source: Arc<io::Error>,
    },
}
