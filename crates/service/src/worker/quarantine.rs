use std::fmt;
use std::sync::Arc;

use super::reaper::{self, Charge, Charges};
use super::{Agent, WorkerError};

/// What agents keep that were retired with reads out, and how much that may be. Clones share one account, so that several
/// ranks of a process can have one limit.
#[derive(Clone)]
pub struct Quarantine {
    owner: Arc<str>,
    limit: u64,
    charges: Arc<Charges>,
}

impl Quarantine {
    /// An account under this name, for errors, that takes so many bytes.
    #[must_use]
    pub fn new(owner: &str, limit_bytes: u64) -> Self {
        Self { owner: owner.into(), limit: limit_bytes, charges: Arc::default() }
    }

    /// The account of a rank that reads beside live parameters of so many bytes: silent peers may keep four times as many
    /// from it.
    #[must_use]
    pub fn of_rank(owner: &str, params_bytes: u64) -> Self {
        Self::new(owner, params_bytes.saturating_mul(4))
    }

    /// Bytes that retired agents keep now.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.charges.bytes()
    }

    /// Retired agents that are not destroyed yet.
    #[must_use]
    pub fn agents(&self) -> u64 {
        self.charges.agents()
    }

    /// Whether an agent may be retired that keeps so many bytes.
    ///
    /// # Errors
    /// [`WorkerError::Quarantine`].
    pub fn has_room(&self, bytes: u64) -> Result<(), WorkerError> {
        let bytes = self.bytes().saturating_add(bytes);
        if bytes <= self.limit {
            return Ok(());
        }
        Err(WorkerError::Quarantine { worker: self.owner.to_string(), bytes, limit: self.limit })
    }

    /// Hands an agent to the [reaper](super::reaper), which destroys it when it is quiet and never before. Whoever calls
    /// this has asked whether there is [room](Self::has_room).
    pub fn retire(&self, agent: impl Agent) {
        let bytes = agent.bytes();
        reaper::adopt(agent, Charge::new(&self.charges, bytes), bytes);
    }

    pub(super) fn charges(&self) -> &Arc<Charges> {
        &self.charges
    }
}

impl fmt::Debug for Quarantine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Quarantine")
            .field("owner", &self.owner)
            .field("limit", &self.limit)
            .field("bytes", &self.bytes())
            .field("agents", &self.agents())
            .finish()
    }
}
