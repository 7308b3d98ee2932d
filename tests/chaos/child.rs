//! What every role of a child process does: says lines, listens to what it is told, and dies where it is told to.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use refit_service::keys::Model as ModelKeys;
use refit_service::rendezvous::{Directory, Key, Rendezvous, RendezvousError};
use refit_service::{Point, Seat};
use refit_transport::nixl::{NixlLibrary, NixlOptions, NixlTransport};
use rustix::process::{Signal, getpid, kill_process, set_parent_process_death_signal};
use rustix::time::{ClockId, clock_gettime};

/// The end of a process that asks to be started anew: its memory may be a mix, or is lost.
pub(crate) const ANEW: u8 = 7;

/// How long a session outlives its process: above the pauses of a busy machine, below the length of the longer stops.
pub(crate) const TTL: Duration = Duration::from_millis(400);

/// Whether a call may be tried again: the session ended, or the process was stopped in the middle of a write for so long
/// that nobody can say what became of it.
pub(crate) fn passes(error: &RendezvousError) -> bool {
    matches!(
        error,
        RendezvousError::SessionEnded
            | RendezvousError::Unknown { .. }
            | RendezvousError::Busy { .. }
    )
}

/// Microseconds of the clock that all processes of a host share.
pub(crate) fn now_micros() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap() * 1_000_000 + u64::try_from(now.tv_nsec).unwrap() / 1_000
}

pub(crate) fn after(duration: Duration) -> Instant {
    Instant::now() + duration
}

/// Says a line to the supervisor.
pub(crate) fn say(line: &str) {
    // Where it is gone, this process is about to end as well.
    let _ = std::io::stdout().write_all(format!("{line}\n").as_bytes());
}

/// What the supervisor wants of this process.
#[derive(Clone, Debug, Default)]
pub(crate) struct Orders {
    ended: Arc<AtomicBool>,
    dies_at: Arc<Mutex<Option<Point>>>,
}

impl Orders {
    /// Listens until the input ends, which is the order to end.
    pub(crate) fn listen() -> Self {
        set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
        let orders = Self::default();
        let theirs = orders.clone();
        std::thread::spawn(move || {
            for line in std::io::stdin().lines().map_while(Result::ok) {
                let point = Point::ALL.into_iter().find(|it| format!("{it:?}") == line);
                *theirs.dies_at.lock() = point;
            }
            theirs.ended.store(true, Ordering::Relaxed);
        });
        orders
    }

    pub(crate) fn ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// A place at a model's rendezvous, under a session of its own.
    pub(crate) fn seat(&self, store: &Arc<Directory>, model: &str) -> Seat<Directory> {
        // One that was stopped in the middle of it has to begin again.
        let session = (0..5).find_map(|_| store.session(TTL).ok());
        let session = Arc::new(session.expect("the store gives a session"));
        let dies_at = self.dies_at.clone();
        let observer = move |point| {
            if *dies_at.lock() == Some(point) {
                let _ = kill_process(getpid(), Signal::KILL);
            }
        };
        let model = ModelKeys::new(Key::new([model]).unwrap());
        Seat::new(store.clone(), session, model).with_observer(Arc::new(observer))
    }
}

/// An agent. The lane is what the environment says.
pub(crate) fn agent(role: &str) -> Arc<NixlTransport> {
    let library = NixlLibrary::load(&[]).unwrap();
    Arc::new(NixlTransport::new(library, NixlOptions::new(role)).unwrap())
}
