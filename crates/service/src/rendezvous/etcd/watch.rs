//! Waiting for a change.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{Error, Event, WatchClient, WatchOptions};

use super::{PAUSE, Shared, refused, unreachable};
use crate::rendezvous::{Key, RendezvousError, Revision};

const ACTION: &str = "watch entries";

/// How a watch ended.
enum Ended {
    /// Something has changed, or may have.
    Changed,
    /// By the server, for this reason.
    Cancelled(String),
}

impl Shared {
    /// Whether something at or under a key was written or removed after a revision, or the deadline came.
    pub(super) fn watch(
        &self,
        prefix: &Key,
        since: Revision,
        deadline: Instant,
    ) -> Result<bool, RendezvousError> {
        let since = i64::try_from(since.0).unwrap_or(i64::MAX - 1);
        let mut failing: Option<Instant> = None;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let heard = Arc::new(AtomicBool::new(false));
            let watching = self.watching(self.watch.clone(), prefix, since, Arc::clone(&heard));
            let done = self.runtime.run(left, watching);
            let heard = heard.load(Ordering::Acquire);
            let error = match done {
                Some(Ok(Ended::Changed)) => return Ok(true),
                // Of a server that never answered nothing can be said, as long as it had the time to.
                None if !heard && self.is_late(failing, left) => {
                    return Err(unreachable(&self.options, ACTION, "no answer".to_owned()));
                }
                None => return Ok(false),
                Some(Ok(Ended::Cancelled(why))) => unreachable(&self.options, ACTION, why),
                Some(Err(error)) => refused(&self.options, ACTION, &error),
            };
            if !matches!(error, RendezvousError::Unreachable { .. }) {
                return Err(error);
            }
            if heard {
                failing = None;
            }
            // One that restarts is not gone yet.
            failing.get_or_insert_with(Instant::now);
            if self.is_late(failing, Duration::ZERO) || Instant::now() + PAUSE >= deadline {
                return Err(error);
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn is_late(&self, failing: Option<Instant>, waited: Duration) -> bool {
        waited >= self.options.timeout
            || failing.is_some_and(|since| since.elapsed() >= self.options.timeout)
    }

    fn watching(
        &self,
        mut client: WatchClient,
        prefix: &Key,
        since: i64,
        heard: Arc<AtomicBool>,
    ) -> impl Future<Output = Result<Ended, Error>> + Send + 'static {
        let key = self.entry(prefix);
        let options = WatchOptions::new()
            .with_range(format!("{key}0"))
            .with_start_revision(since.saturating_add(1))
            // Or a burst of events may be larger than a message.
            .with_fragment();
        let wanted = prefix.clone();
        let root = self.options.root.len() + "/e/".len();
        async move {
            let mut stream = client.watch(key, Some(options)).await?;
            while let Some(news) = stream.message().await? {
                heard.store(true, Ordering::Release);
                // It has forgotten how things were then: they may be otherwise.
                if news.compact_revision() > 0 {
                    return Ok(Ended::Changed);
                }
                if news.canceled() {
                    return Ok(Ended::Cancelled(news.cancel_reason().to_owned()));
                }
                let touched = news.events().iter().filter_map(Event::kv).any(|pair| {
                    let path = pair.key().get(root..);
                    path.and_then(|path| std::str::from_utf8(path).ok())
                        .and_then(|path| Key::try_from(path.to_owned()).ok())
                        .is_some_and(|key| key.is_under(&wanted))
                });
                if touched {
                    return Ok(Ended::Changed);
                }
            }
            Ok(Ended::Cancelled("the watch was ended".to_owned()))
        }
    }
}
