//! What has a source join again while its trainer does something else.

use std::convert::Infallible;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::Serving;
use crate::desk::Desk;
use crate::failure::{Failure, Kind};

/// Looks, on a thread of its own, whether the store still knows a source. Dropped, it ends.
#[derive(Debug)]
pub(super) struct Keeper(
    #[expect(dead_code, reason = "its end is all that is said")] Sender<Infallible>,
);

impl Keeper {
    /// Looks every so often.
    pub(super) fn new(
        desk: &Arc<Desk<Box<dyn Serving>>>,
        every: Duration,
    ) -> Result<Self, Failure> {
        let desk = Arc::downgrade(desk);
        let (keeps, kept) = mpsc::channel();
        let look = move || {
            while kept.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                if !stay(&desk, every) {
                    return;
                }
            }
        };
        let spawned = thread::Builder::new().name("refit-keeper".to_owned()).spawn(look);
        spawned.map_err(|error| {
            Failure::new(Kind::Refit, format!("cannot start a thread for the source: {error}"))
        })?;
        Ok(Self(keeps))
    }
}

/// Whether there is anything left to look after.
fn stay(desk: &Weak<Desk<Box<dyn Serving>>>, within: Duration) -> bool {
    let Some(desk) = desk.upgrade() else { return false };
    // What it cannot do now the trainer's next call meets as well, and raises.
    let stayed = desk.with(|live| live.stay(Instant::now() + within));
    !stayed.is_err_and(|failure| failure.is(Kind::Closed))
}
