//! What was removed lately, so that whoever waits for a change under a prefix is not woken by all others.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::Key;

/// How many removals are known one by one.
const MOST: usize = 64;

/// The last removals.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Removals {
    /// Oldest first.
    log: VecDeque<(u64, Key)>,
    /// At this revision or before, more may have been removed than the log says.
    forgotten: u64,
}

impl Removals {
    pub(super) fn push(&mut self, revision: u64, key: Key) {
        self.log.push_back((revision, key));
        if self.log.len() > MOST
            && let Some((revision, _)) = self.log.pop_front()
        {
            self.forgotten = revision;
        }
    }

    /// Whether something at or under `prefix` may have been removed after `since`.
    pub(super) fn touch(&self, prefix: &Key, since: u64) -> bool {
        since < self.forgotten
            || self.log.iter().any(|(revision, key)| *revision > since && key.is_under(prefix))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forgotten_may_have_been_anything() {
        let key = |name: &str| Key::new([name]).unwrap();
        let mut removals = Removals::default();
        for revision in 1..=64 {
            removals.push(revision, key("a"));
        }
        assert!(removals.touch(&key("a"), 63) && !removals.touch(&key("a"), 64));
        assert!(!removals.touch(&key("b"), 0));
        removals.push(65, key("a"));
        assert!(removals.touch(&key("b"), 0) && !removals.touch(&key("b"), 1));
    }
}
