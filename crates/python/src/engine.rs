//! An engine that is Python callbacks.

use std::fmt;
use std::sync::{Arc, Mutex};

use pyo3::prelude::*;
use refit::pool::Memory;
use refit::translate::PostAction;
use refit_service::rank::{Engine, EngineError};

use crate::desk::lock;
use crate::failure::{Failure, Kind};
use crate::home::Home;
use crate::layout::actions_out;

/// What a target calls.
pub(crate) struct Callbacks {
    pub(crate) pause: Option<Py<PyAny>>,
    pub(crate) post_actions: Option<Py<PyAny>>,
    pub(crate) resume: Option<Py<PyAny>>,
    pub(crate) home: Home,
    pub(crate) notes: Notes,
}

/// What callbacks came to, for whoever has called `refresh`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notes(Arc<Mutex<Noted>>);

#[derive(Debug, Default)]
struct Noted {
    /// What was carried out last.
    done: Vec<PostAction>,
    /// Which callback raised, and what.
    raised: Option<(&'static str, PyErr)>,
}

impl Notes {
    pub(crate) fn clear(&self) {
        *lock(&self.0) = Noted::default();
    }

    pub(crate) fn done(&self) -> Vec<PostAction> {
        lock(&self.0).done.clone()
    }

    pub(crate) fn has_raised(&self) -> bool {
        lock(&self.0).raised.is_some()
    }

    /// The failure that a callback is to blame for, in place of this one.
    pub(crate) fn blame(&self, failure: Failure) -> Failure {
        match lock(&self.0).raised.take() {
            None => failure,
            Some((callback, error)) => {
                let text = format!("the callback `{callback}` raised: {failure}");
                Failure::new(Kind::Engine, text).caused_by(error)
            }
        }
    }

    /// What a callback raised that nothing depends on any more.
    pub(crate) fn late(&self) -> Option<Failure> {
        let (callback, error) = lock(&self.0).raised.take()?;
        let text = format!("the version is live, and the callback `{callback}` raised");
        Some(Failure::new(Kind::Engine, text).caused_by(error))
    }

    fn outcome(&self, callback: &'static str, result: PyResult<()>) -> Result<(), EngineError> {
        result.map_err(|error| {
            let text = error.to_string();
            lock(&self.0).raised = Some((callback, error));
            text.into()
        })
    }
}

impl fmt::Debug for Callbacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Callbacks").field("notes", &self.notes).finish_non_exhaustive()
    }
}

impl Engine for Callbacks {
    fn pause(&mut self) -> Result<(), EngineError> {
        if let Some(pause) = &self.pause {
            self.notes.outcome("pause", Python::attach(|py| pause.call0(py).map(drop)))?;
        }
        // Kernels that were launched before may still read.
        Ok(self.home.synchronize().map_err(|failure| failure.to_string())?)
    }

    fn derive(
        &mut self,
        actions: &[PostAction],
        _: &mut dyn Iterator<Item = (&str, &Memory)>,
    ) -> Result<(), EngineError> {
        if actions.is_empty() {
            return Ok(());
        }
        let Some(carry_out) = &self.post_actions else {
            return Err("nobody carries out the post actions".into());
        };
        let result = Python::attach(|py| {
            let actions = actions_out(py, actions)?;
            carry_out.call1(py, (actions,)).map(drop)
        });
        self.notes.outcome("post_actions", result)?;
        lock(&self.notes.0).done = actions.to_vec();
        Ok(())
    }

    fn resume(&mut self, version: u64) {
        if let Some(resume) = &self.resume {
            let result = Python::attach(|py| resume.call1(py, (version,)).map(drop));
            // The version is live whatever this says: it is told when the refresh ends.
            let _ = self.notes.outcome("resume", result);
        }
    }
}
