//! What several Python threads share, one call at a time.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use crate::failure::{Failure, Kind};

/// Something that was closed, or that one call at a time may use. Whoever waits for it must not hold the GIL: the call that
/// has it may want that for a callback.
#[derive(Debug)]
pub(crate) struct Desk<T> {
    held: Mutex<Option<T>>,
    by: Mutex<Option<ThreadId>>,
}

impl<T> Desk<T> {
    pub(crate) fn new(held: T) -> Self {
        Self { held: Mutex::new(Some(held)), by: Mutex::new(None) }
    }

    /// Has a call use it.
    pub(crate) fn with<U>(
        &self,
        call: impl FnOnce(&mut T) -> Result<U, Failure>,
    ) -> Result<U, Failure> {
        self.enter()?;
        let mut held = lock(&self.held);
        let held = held.as_mut().ok_or_else(|| Failure::new(Kind::Closed, "it was closed"))?;
        *lock(&self.by) = Some(thread::current().id());
        let _leaving = Leaving(&self.by);
        call(held)
    }

    /// Takes it out for good.
    pub(crate) fn take(&self) -> Result<Option<T>, Failure> {
        self.enter()?;
        Ok(lock(&self.held).take())
    }

    /// Refuses a callback that calls what has called it, which would wait for itself.
    fn enter(&self) -> Result<(), Failure> {
        if *lock(&self.by) == Some(thread::current().id()) {
            let text = "a callback cannot call the target that has called it, but for `version`";
            return Err(Failure::new(Kind::Config, text));
        }
        Ok(())
    }
}

struct Leaving<'a>(&'a Mutex<Option<ThreadId>>);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        *lock(self.0) = None;
    }
}

/// A lock whose holder has panicked: what it holds is checked by whoever uses it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
