use std::error::Error;
use std::fmt::Debug;

use refit::pool::Memory;
use refit::translate::PostAction;

use super::RankError;

/// Why an engine did not do what it was asked to.
pub type EngineError = Box<dyn Error + Send + Sync>;

/// What serves with a rank's live parameters.
pub trait Engine: Debug {
    /// Stops at the end of a step, with its weights mapped. From its return on nobody reads live parameters, and nobody
    /// answers a request, until [`resume`](Self::resume).
    ///
    /// # Errors
    /// [`EngineError`]: nothing was written.
    fn pause(&mut self) -> Result<(), EngineError>;

    /// Derives what it derives from its parameters, which are new: carries out all of `actions`, in their order.
    ///
    /// # Errors
    /// [`EngineError`]: what it computes may be a mix of two versions, and it must not serve.
    fn derive(
        &mut self,
        actions: &[PostAction],
        params: &mut dyn Iterator<Item = (&str, &Memory)>,
    ) -> Result<(), EngineError>;

    /// Goes on, with this version.
    fn resume(&mut self, version: u64);
}

/// No engine: nobody reads the live parameters, and nothing is derived from them. Refuses layouts that call for actions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unattended;

impl Engine for Unattended {
    fn pause(&mut self) -> Result<(), EngineError> {
        Ok(())
    }

    fn derive(
        &mut self,
        actions: &[PostAction],
        _: &mut dyn Iterator<Item = (&str, &Memory)>,
    ) -> Result<(), EngineError> {
        match actions.first() {
            None => Ok(()),
            Some(action) => Err(RankError::NobodyDerives { action: action.to_string() }.into()),
        }
    }

    fn resume(&mut self, _: u64) {}
}
