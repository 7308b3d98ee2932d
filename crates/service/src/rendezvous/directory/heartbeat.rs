//! Who is alive: every session has a file that it changes, and everybody looks whether it does.
//!
//! No two clocks are compared. A session is dead when its file stays the same for as long as its ttl allows, by the clock of
//! whoever looks; that process then takes the session out of the state, for all at once.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::state::State;

/// A session renews itself so often in its ttl.
const BEATS: u32 = 8;

/// And is looked at so often.
const LOOKS: u32 = 16;

/// What a look costs is small, but not nothing.
const SHORTEST: Duration = Duration::from_millis(5);

pub(super) fn file(folder: &Path, session: u128) -> PathBuf {
    folder.join(format!("{session:032x}"))
}

/// Beats until `stop` is closed, or until somebody has taken the file away.
pub(super) fn beat(file: &Path, ttl: Duration, stop: &Receiver<()>, ended: &Arc<AtomicBool>) {
    let every = (ttl / BEATS).max(SHORTEST);
    for count in 1_u64.. {
        if stop.recv_timeout(every) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        // Opened anew each time: a file server hears of it when the file is closed.
        let done = OpenOptions::new()
            .write(true)
            .open(file)
            .and_then(|mut file| file.write_all(&count.to_le_bytes()));
        match done {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                ended.store(true, Ordering::Release);
                return;
            }
            Err(error) => tracing::warn!(%error, "a session cannot be renewed"),
        }
    }
}

/// What a process has seen of the sessions.
#[derive(Debug, Default)]
pub(super) struct Observer {
    seen: BTreeMap<u128, Seen>,
}

#[derive(Debug)]
struct Seen {
    beat: Vec<u8>,
    looked: Instant,
    silent: Duration,
}

impl Observer {
    /// Looks at all whose turn it is, and gives those that are dead.
    pub(super) fn look(&mut self, folder: &Path, state: &State) -> Vec<u128> {
        self.seen.retain(|session, _| state.sessions.contains_key(session));
        let mut dead = Vec::new();
        for session in state.sessions.keys() {
            let Some(ttl) = state.ttl(*session) else { continue };
            let every = (ttl / LOOKS).max(SHORTEST);
            let now = Instant::now();
            if self.seen.get(session).is_some_and(|seen| now - seen.looked < every) {
                continue;
            }
            // A file that is gone does not change any more, and one that cannot be read may.
            let beat = match fs::read(file(folder, *session)) {
                Ok(beat) => beat,
                Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
                Err(_) => continue,
            };
            let seen = self.seen.entry(*session).or_insert_with(|| Seen {
                beat: beat.clone(),
                looked: now,
                silent: Duration::ZERO,
            });
            if seen.beat == beat {
                // Time in which this process slept as well is nobody's silence.
                seen.silent += (now - seen.looked).min(every * 2);
            } else {
                (seen.beat, seen.silent) = (beat, Duration::ZERO);
            }
            seen.looked = now;
            // What is left of the ttl is for the looks themselves.
            if seen.silent >= ttl / 4 * 3 {
                dead.push(*session);
            }
        }
        dead
    }

    /// How long until the next look.
    pub(super) fn pause(&self, state: &State) -> Duration {
        let shortest = state.sessions.values().min().copied().unwrap_or(u64::MAX);
        // Sessions may come that live shorter than all that are there.
        (Duration::from_millis(shortest) / LOOKS).clamp(SHORTEST, Duration::from_millis(50))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_silence_that_was_heard_counts() {
        let folder = tempfile::tempdir().unwrap();
        let ttl = Duration::from_millis(320);
        let mut state = State::default();
        state.sessions.insert(7, 320);
        let path = file(folder.path(), 7);
        fs::write(&path, 1_u64.to_le_bytes()).unwrap();
        let mut observer = Observer::default();
        assert!(observer.look(folder.path(), &state).is_empty());
        // As if this process had been stopped: one look later the session is not dead.
        std::thread::sleep(ttl);
        assert!(observer.look(folder.path(), &state).is_empty());
        let started = Instant::now();
        while observer.look(folder.path(), &state).is_empty() {
            assert!(started.elapsed() < Duration::from_secs(30), "never dead");
            std::thread::sleep(SHORTEST);
        }
        fs::write(&path, 2_u64.to_le_bytes()).unwrap();
        std::thread::sleep(ttl / LOOKS);
        assert!(observer.look(folder.path(), &state).is_empty(), "it was not");
    }
}
