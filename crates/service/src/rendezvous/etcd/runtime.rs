//! The client is asynchronous; nobody else need know.

use std::future::Future;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use tokio::runtime::{Builder, Handle};

/// One thread that drives the client. Callers wait on a channel, so they may themselves be of any runtime.
#[derive(Debug)]
pub(super) struct Runtime(Option<tokio::runtime::Runtime>, Handle);

/// Over a call's limit, for the thread to say so itself.
const GRACE: Duration = Duration::from_millis(200);

impl Runtime {
    pub(super) fn new() -> std::io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("refit-etcd")
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        Ok(Self(Some(runtime), handle))
    }

    /// What the future comes to, or none if it has not within the limit. It is dropped then.
    pub(super) fn run<T: Send + 'static>(
        &self,
        limit: Duration,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        let (send, receive) = mpsc::sync_channel(1);
        let task = self.1.spawn(async move {
            let _ = send.send(tokio::time::timeout(limit, future).await.ok());
        });
        match receive.recv_timeout(limit.saturating_add(GRACE)) {
            Ok(done) => done,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                task.abort();
                None
            }
        }
    }

    /// Runs beside everything else, until it ends or the guard is dropped.
    pub(super) fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) -> Guard {
        Guard(self.1.spawn(future).abort_handle())
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        // Waiting for the thread is a panic where this is dropped by a task of another runtime.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Ends a task when it is dropped.
#[derive(Debug)]
pub(super) struct Guard(tokio::task::AbortHandle);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn nothing_takes_longer_than_its_limit() {
        let runtime = Runtime::new().unwrap();
        let started = Instant::now();
        assert_eq!(runtime.run(Duration::from_secs(10), async { 7 }), Some(7));
        let never = std::future::pending::<()>();
        assert_eq!(runtime.run(Duration::from_millis(50), never), None);
        // Even where the thread itself hangs.
        let hang = async { std::thread::sleep(Duration::from_secs(2)) };
        assert_eq!(runtime.run(Duration::from_millis(50), hang), None);
        assert!(started.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn it_can_be_used_and_dropped_inside_another() {
        let outer = Runtime::new().unwrap();
        let done = outer.run(Duration::from_secs(10), async {
            Runtime::new().unwrap().run(Duration::from_secs(5), async { 7 })
        });
        assert_eq!(done, Some(Some(7)));
    }
}
