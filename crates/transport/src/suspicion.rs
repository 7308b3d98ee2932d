//! Whether an agent can still be trusted with memory.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::TransportError;

/// Set when an agent abandoned reads that had not settled, or lost sight of them. Never unset.
#[derive(Debug, Default)]
pub(crate) struct Suspicion(AtomicBool);

impl Suspicion {
    pub(crate) fn raise(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Refuses new reads of an agent that is suspect.
    pub(crate) fn check(&self, agent: &str) -> Result<(), TransportError> {
        if self.0.load(Ordering::Acquire) {
            return Err(TransportError::Suspect { agent: agent.into() });
        }
        Ok(())
    }
}
