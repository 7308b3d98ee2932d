//! A source in another process: the same test, started again with a role.

use std::process::Stdio;
use std::time::Duration;

use refit_pool::{Allocator, HostAllocator};
use refit_tests::link::{Link, answer, hex, unhex};
use refit_transport::Transport;
use refit_transport::conformance::Harness;
use rustix::process::{Pid, Signal, kill_process};

use crate::Nixl;
use crate::isolated::{Guarded, command, current};

const ROLE: &str = "REFIT_NIXL_SOURCE_BYTES";

/// What a source offers.
#[derive(Clone)]
pub(crate) struct Offer {
    pub(crate) name: String,
    pub(crate) metadata: Vec<u8>,
    pub(crate) address: u64,
    pub(crate) len: u64,
}

/// The process of a source.
pub(crate) struct Remote {
    child: Guarded,
    link: Link,
}

impl Remote {
    /// Starts a source of so many bytes. In the source itself, serves until its input ends and returns `None`.
    pub(crate) fn start(bytes: u64) -> Option<Self> {
        if let Ok(bytes) = std::env::var(ROLE) {
            serve(bytes.parse().unwrap());
            return None;
        }
        Some(Self::of((ROLE, &bytes.to_string())))
    }

    /// Starts the same test in another process, in the role that this variable gives it.
    pub(crate) fn of(role: (&str, &str)) -> Self {
        let mut command = command(&current(), &[role]);
        let mut child =
            Guarded(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
        let link = Link::of(&mut child.0);
        Self { child, link }
    }

    /// Says a line to it, and waits for the answer.
    pub(crate) fn ask(&mut self, line: &str) -> String {
        self.link.tell(line);
        self.link.reply()
    }

    pub(crate) fn offer(&mut self) -> Offer {
        let line = self.link.reply();
        let mut words = line.split(' ');
        let mut word = || words.next().unwrap();
        let (name, address, len) =
            (word().to_owned(), word().parse().unwrap(), word().parse().unwrap());
        let metadata = unhex(word());
        Offer { name, metadata, address, len }
    }

    /// Has every byte set to this.
    pub(crate) fn fill(&mut self, byte: u8) {
        self.link.tell(&format!("{byte}"));
        assert_eq!(self.link.reply(), "filled");
    }

    /// Returns when every thread has stopped: the signal alone returns before that.
    pub(crate) fn pause(&mut self) {
        self.signal(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.child.0.id());
        let stopped = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap();
            // The state follows the name, which stands in parentheses.
            stat.rsplit_once(") ").unwrap().1.starts_with('T')
        };
        while !std::fs::read_dir(&tasks).unwrap().all(|task| stopped(task.unwrap())) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn resume(&mut self) {
        self.signal(Signal::CONT);
    }

    pub(crate) fn kill(&mut self) {
        self.child.0.kill().unwrap();
        self.child.0.wait().unwrap();
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.0.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }
}

fn serve(bytes: usize) {
    let mut memory = HostAllocator.allocate(bytes).unwrap();
    let transport = Nixl.agent("source").unwrap();
    let registration = transport.register(memory.allocation()).unwrap();
    let metadata = hex(&transport.metadata().unwrap());
    answer(&format!("{} {} {bytes} {metadata}", transport.agent(), memory.address()));
    for line in std::io::stdin().lines() {
        let byte = line.unwrap().trim().parse().unwrap();
        memory.host_bytes_mut().unwrap().fill(byte);
        answer("filled");
    }
    transport.deregister(registration).unwrap();
}
