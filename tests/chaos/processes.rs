//! Child processes: started in roles, listened to, stopped, killed, and gone when the supervisor is.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use crate::child::now_micros;
use crate::{source, target};

/// What a process is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Role {
    Source(source::Part),
    /// Each on a thread of its own.
    Targets(Vec<target::Part>),
}

/// Which of UCX's ways bytes take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// One-sided: the processor of the reader copies.
    Cma,
    /// Emulated over messages: the other process has to answer.
    Tcp,
}

impl Lane {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cma => "cma",
            Self::Tcp => "tcp",
        }
    }
}

/// Something that a process said, or that its output ended.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) process: usize,
    /// Which life of it.
    pub(crate) life: u64,
    pub(crate) line: Option<String>,
}

/// A process in a role, in one of its lives. Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    input: Option<ChildStdin>,
    /// What it wrote to its error output.
    log: PathBuf,
    /// When it did not run, by the shared clock.
    stops: Vec<(u64, u64)>,
}

impl Process {
    /// Starts one in its own group of processes.
    pub(crate) fn start(
        role: &Role,
        lane: Lane,
        logs: &Path,
        process: usize,
        life: u64,
        to: Sender<Said>,
    ) -> Self {
        let log = logs.join(format!("{process}-{life}.log"));
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["role", &serde_json::to_string(role).unwrap()]);
        command.env("UCX_NET_DEVICES", "lo").env("UCX_LOG_LEVEL", "fatal");
        command.env("NIXL_LOG_LEVEL", "FATAL").env("RUST_BACKTRACE", "0");
        match lane {
            Lane::Cma => command.env_remove("UCX_TLS"),
            Lane::Tcp => command.env("UCX_TLS", "tcp"),
        };
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(File::create(&log).unwrap()).process_group(0);
        let mut child = command.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let _ = to.send(Said { process, life, line: Some(line) });
            }
            let _ = to.send(Said { process, life, line: None });
        });
        let input = child.stdin.take();
        Self { child, input, log, stops: Vec::new() }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Tells it a line.
    pub(crate) fn tell(&mut self, line: &str) {
        use std::io::Write;
        if let Some(input) = &mut self.input {
            // One that has just died cannot be told.
            let _ = input.write_all(format!("{line}\n").as_bytes());
        }
    }

    /// Asks it to end by itself.
    pub(crate) fn end(&mut self) {
        self.input = None;
    }

    pub(crate) fn stop(&mut self) {
        self.stops.push((now_micros(), u64::MAX));
        self.signal(Signal::STOP);
    }

    pub(crate) fn resume(&mut self) {
        self.signal(Signal::CONT);
        if let Some(stop) = self.stops.last_mut() {
            stop.1 = now_micros();
        }
    }

    pub(crate) fn kill(&mut self) {
        self.signal(Signal::KILL);
    }

    /// How long of this span it did not run because it was stopped.
    pub(crate) fn stopped_within(&self, from: u64, to: u64) -> u64 {
        let overlap = |&(begin, end): &(u64, u64)| end.min(to).saturating_sub(begin.max(from));
        self.stops.iter().map(overlap).sum()
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some(status);
            }
            if Instant::now() >= until {
                return None;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The last lines of its error output.
    pub(crate) fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(6)..].join(" | ")
    }

    fn signal(&self, signal: Signal) {
        // It is a child that was not waited for: its number is nobody else's.
        let id = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        let _ = kill_process(id, signal);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
