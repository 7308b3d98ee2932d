//! What wakes a rank: signals, and changes at the rendezvous.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use refit_service::rendezvous::{Key, Rendezvous};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use crate::error::CliError;

/// What asks for the next version. Not SIGHUP, which UCX takes for itself to log everything, addresses included.
const RELOAD: i32 = SIGUSR1;

/// How long one watch lasts before it is asked for anew, and what is waited for after one failed.
const WATCH: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_secs(1);

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wake {
    /// Leave.
    Stop,
    /// Publish what there is by now.
    Reload,
    /// Something at the rendezvous is new.
    Store,
    /// The time that was given is over.
    Late,
}

/// Whether the process was told to stop; shared by its threads.
#[derive(Clone, Debug, Default)]
pub(super) struct Stop {
    told: Arc<AtomicBool>,
    ranks: refit_service::Stop,
}

impl Stop {
    pub(super) fn is_set(&self) -> bool {
        self.told.load(Ordering::Acquire)
    }

    /// What has ranks come out of what they wait for.
    pub(super) fn of_ranks(&self) -> refit_service::Stop {
        self.ranks.clone()
    }
}

/// Where wakes arrive.
#[derive(Debug)]
pub(super) struct Wakes {
    sender: Sender<Wake>,
    receiver: Receiver<Wake>,
    stop: Stop,
}

impl Wakes {
    /// Listens for signals from now on: SIGTERM and SIGINT stop, a second one ends the process where it stands.
    pub(super) fn listen() -> Result<Self, CliError> {
        let system = CliError::system("listen for signals");
        let stop = Stop::default();
        let register = || {
            for signal in [SIGTERM, SIGINT] {
                // In this order: the first one finds the flag as it was.
                signal_hook::flag::register_conditional_shutdown(signal, 1, stop.told.clone())?;
                signal_hook::flag::register(signal, stop.told.clone())?;
            }
            Signals::new([SIGTERM, SIGINT, RELOAD])
        };
        let mut signals = register().map_err(system)?;
        let (sender, receiver) = mpsc::channel();
        let told = sender.clone();
        spawn("signals", move || {
            for signal in signals.forever() {
                let wake = if signal == RELOAD { Wake::Reload } else { Wake::Stop };
                if told.send(wake).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { sender, receiver, stop })
    }

    pub(super) fn stop(&self) -> Stop {
        self.stop.clone()
    }

    /// Wakes whenever something under a key changes, until the process ends.
    pub(super) fn watch<R: Rendezvous>(&self, store: &Arc<R>, prefix: Key) -> Result<(), CliError> {
        let (store, told) = (store.clone(), self.sender.clone());
        spawn("watch", move || {
            let mut seen = None;
            loop {
                let listed = match seen {
                    None => store.list(&prefix).map(Some),
                    Some(revision) => store.changed(&prefix, revision, Instant::now() + WATCH),
                };
                match listed {
                    Ok(Some(snapshot)) => seen = Some(snapshot.revision),
                    Ok(None) => continue,
                    Err(error) => {
                        tracing::warn!(%prefix, %error, "the rendezvous cannot be watched");
                        seen = None;
                        thread::sleep(PAUSE);
                    }
                }
                if told.send(Wake::Store).is_err() {
                    return;
                }
            }
        })
    }

    /// What comes next, at most until a moment.
    pub(super) fn next(&self, until: Option<Instant>) -> Wake {
        if self.stop.is_set() {
            return Wake::Stop;
        }
        let received = match until {
            None => self.receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(until) => {
                self.receiver.recv_timeout(until.saturating_duration_since(Instant::now()))
            }
        };
        // It cannot be disconnected: this holds a sender.
        let mut wake = received.unwrap_or(Wake::Late);
        // Many changes are one.
        while wake == Wake::Store {
            match self.receiver.try_recv() {
                Ok(next) => wake = next,
                Err(_) => break,
            }
        }
        wake
    }
}

fn spawn(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<(), CliError> {
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(work);
    spawned.map(drop).map_err(CliError::system("start a thread"))
}
