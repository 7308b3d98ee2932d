//! What was read before, so that an old value that is put back is known for one.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use super::SealError;
use super::envelope::Opened;
use crate::rendezvous::Key;

/// Keys that are remembered. Beyond that the ones are forgotten that were not read for longest.
const MOST_KEYS: usize = 1 << 16;

/// Writers that are remembered for one key.
const MOST_WRITERS: usize = 8;

/// The newest value that was read of every writer of every key.
#[derive(Debug, Default)]
pub(super) struct Seen(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Counts what happens here.
    now: u64,
    traces: BTreeMap<Key, Trace>,
}

#[derive(Debug, Default)]
struct Trace {
    /// The writers, the one that wrote last at the end.
    writers: Vec<Wrote>,
    /// When a value was last read that was new, or any.
    changed: u64,
    read: u64,
}

#[derive(Clone, Copy, Debug)]
struct Wrote {
    incarnation: u128,
    sequence: u64,
    mark: u64,
}

/// When a call of the store began: what it returns is no older than what had been read by then.
#[derive(Clone, Copy, Debug)]
pub(super) struct Began(u64);

impl Seen {
    /// To be asked for before the store is.
    pub(super) fn begin(&self) -> Began {
        Began(self.0.lock().tick())
    }

    /// Refuses a value that is older than one that had been read when the call began.
    pub(super) fn check(
        &self,
        began: Began,
        key: &Key,
        opened: &Opened<'_>,
    ) -> Result<(), SealError> {
        let header = &opened.header;
        let wrote =
            Wrote { incarnation: header.incarnation, sequence: header.sequence, mark: opened.mark };
        let mut state = self.0.lock();
        let now = state.tick();
        let trace = state.traces.entry(key.clone()).or_default();
        trace.read = now;
        let known = trace.writers.iter().position(|known| known.incarnation == wrote.incarnation);
        if let Some(index) = known {
            let (newest, last) = (trace.writers[index], index + 1 == trace.writers.len());
            if last && (newest.sequence, newest.mark) == (wrote.sequence, wrote.mark) {
                return Ok(());
            }
            if wrote.sequence <= newest.sequence {
                // Another call, which began later than this one, may have read what this one was too early for.
                if trace.changed > began.0 {
                    return Ok(());
                }
                return Err(SealError::Replayed {
                    writer: header.writer.to_owned(),
                    incarnation: wrote.incarnation,
                    sequence: wrote.sequence,
                    newest: newest.sequence,
                });
            }
            trace.writers.remove(index);
        } else if trace.writers.len() == MOST_WRITERS {
            trace.writers.remove(0);
        }
        trace.writers.push(wrote);
        trace.changed = now;
        state.forget();
        Ok(())
    }
}

impl State {
    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// Drops the half that was read least recently once there are too many.
    fn forget(&mut self) {
        if self.traces.len() <= MOST_KEYS {
            return;
        }
        let mut reads: Vec<u64> = self.traces.values().map(|trace| trace.read).collect();
        let (_, &mut middle, _) = reads.select_nth_unstable(MOST_KEYS / 2);
        self.traces.retain(|_, trace| trace.read > middle);
        tracing::debug!(
            kept = self.traces.len(),
            "forgot what was read of keys that are long gone"
        );
    }
}
