use std::time::Duration;

use super::EngineError;
use crate::worker::BuildError;

/// Why a rank did not read, or did not install what it had read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RankError {
    /// Reads of an attempt that was given up have not settled.
    #[error(
        "reads of group `{group}` into {bytes} bytes are out, {age:?} after they were given up; end the silent peer, which \
         settles them"
    )]
    Out {
        /// The group that is read.
        group: String,
        /// Bytes that they may write.
        bytes: u64,
        /// How long ago they were given up.
        age: Duration,
    },
    /// A call into the transport has not returned.
    #[error(
        "agent `{agent}`, which keeps {bytes} bytes, has been in a call to group `{group}` for {age:?}, which does not \
         return; end the silent peer, or wait for the transport to give it up"
    )]
    Away {
        /// The agent that is in it.
        agent: String,
        /// The group that is read.
        group: String,
        /// Bytes that cannot be used meanwhile.
        bytes: u64,
        /// For how long.
        age: Duration,
    },
    /// A call into the transport panicked.
    #[error("a call of agent `{agent}` panicked, and its memory is lost; start this rank anew")]
    Panicked {
        /// The agent.
        agent: String,
    },
    /// Reads can no longer be watched.
    #[error(
        "agent `{agent}` is of no use since an earlier pull, whose reads it cannot watch; start this rank anew"
    )]
    Lost {
        /// The agent.
        agent: String,
    },
    /// No agent could be made for reading on in other memory.
    #[error("no agent could take over: {source}; end the silent peer, or start this rank anew")]
    NoAgent {
        /// Why not.
        source: BuildError,
    },
    /// The agent for reading on in other memory is not there yet.
    #[error(
        "an agent that is to take over has been in the making for {age:?}; refresh again, it goes on, or give the refresh \
         a longer deadline"
    )]
    NoAgentYet {
        /// For how long.
        age: Duration,
    },
    /// The engine did not do what it was asked to.
    #[error(
        "the engine could not {what}: {source}; it does not go on before a refresh has succeeded"
    )]
    Engine {
        /// What it was asked to do.
        what: &'static str,
        /// What it says.
        source: EngineError,
    },
    /// There is no engine, and the layout needs one.
    #[error("nobody carries out: {action}; give the rank the engine that does (`Engine::derive`)")]
    NobodyDerives {
        /// What is to be done.
        action: String,
    },
    /// A version was to be installed that is not there.
    #[error("version {version} is not staged; stage it before it is installed")]
    NotStaged {
        /// The version.
        version: u64,
    },
    /// A parameter was not staged with the others: an error of this project.
    #[error("parameter `{param}` is not staged; please report this")]
    Missing {
        /// The parameter.
        param: String,
    },
    /// What was staged could not be copied to the live parameters.
    #[error("copying to the live parameters failed: {source}; start this rank's engine anew")]
    Copy {
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
