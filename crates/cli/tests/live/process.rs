//! A rank's process, and what it says.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use refit::transport::nixl::NixlLibrary;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// What a step may take on a machine that does other things as well.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What UCX takes by itself on one host: nobody answers for reads.
pub(crate) const ONE_SIDED: &[(&str, &str)] = &[];
/// Reads are emulated over messages: the other process has to answer.
pub(crate) const EMULATED: &[(&str, &str)] = &[("UCX_TLS", "tcp")];

/// Whether NIXL can be had; says so where not.
pub(crate) fn have_nixl(test: &str) -> bool {
    match NixlLibrary::load(&[]) {
        Ok(_) => true,
        Err(error) => {
            skipped(&format!("NIXL: {test}: {error}"));
            false
        }
    }
}

/// Says that a test is skipped for want of something, whether or not what tests print is shown.
pub(crate) fn skipped(what: &str) {
    use std::io::Write;
    std::io::stdout().write_all(format!("skipped for want of {what}\n").as_bytes()).unwrap();
}

/// The config of a model of some hundred kilobytes.
pub(crate) fn config() -> String {
    let case = "../../tests/golden/models/qwen3_tp4_to_tp2/config.json";
    Path::new(env!("CARGO_MANIFEST_DIR")).join(case).display().to_string()
}

/// A directory to meet in, and a key.
#[derive(Debug)]
pub(crate) struct Job {
    folder: tempfile::TempDir,
    pub(crate) secret: String,
}

impl Job {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let job =
            Self { folder, secret: "0123456789abcdef0123456789abcdef-of-this-test".to_owned() };
        job.key("key", &job.secret);
        job
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a key of this name.
    pub(crate) fn key(&self, name: &str, secret: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, secret).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    /// A rank of this job; `arguments` are separated by blanks.
    pub(crate) fn rank(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_refit"));
        command
            .args(arguments.split(' '))
            .args(["--threads", "1", "--json"])
            .env_remove("RUST_LOG");
        if !arguments.contains("--ttl ") {
            command.args(["--ttl", "1"]);
        }
        if !arguments.contains("--rendezvous ") {
            command.arg("--rendezvous");
            command.arg(format!("dir:{}", self.path().join("meet").display()));
        }
        if !arguments.contains("--key-file") {
            command.arg("--key-file").arg(self.path().join("key"));
        }
        if !arguments.contains("--checkpoint") {
            command.args(["--config", &config()]);
        }
        command
    }

    pub(crate) fn start(&self, arguments: &str) -> Rank {
        self.start_on(ONE_SIDED, arguments)
    }

    pub(crate) fn start_on(&self, lane: &[(&str, &str)], arguments: &str) -> Rank {
        let mut command = self.rank(arguments);
        command.envs(lane.iter().copied());
        Rank::start(command)
    }
}

/// A process; ended when it is dropped.
#[derive(Debug)]
pub(crate) struct Rank {
    child: Child,
    lines: Receiver<String>,
    errors: Receiver<String>,
    heard: Vec<String>,
}

impl Rank {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = follow(child.stdout.take().unwrap());
        let errors = follow(child.stderr.take().unwrap());
        Self { child, lines, errors, heard: Vec::new() }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next line that tells of this event.
    pub(crate) fn hear(&mut self, event: &str) -> Value {
        self.hear_where(event, |_| true)
    }

    pub(crate) fn hear_where(&mut self, event: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        self.hear_some(event, |value| value["event"] == event && wanted(value))
    }

    /// The next line that tells of one of these events.
    pub(crate) fn hear_any(&mut self, events: &[&str]) -> Value {
        let wanted = |value: &Value| events.iter().any(|event| value["event"] == *event);
        self.hear_some(&events.join("` or `"), wanted)
    }

    fn hear_some(&mut self, event: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let until = Instant::now() + PATIENCE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                let (heard, errors) = (self.heard.join("\n"), self.errors());
                let errors = &errors[..errors.len().min(4000)];
                panic!("`{event}` was not heard; what was:\n{heard}\n{errors}");
            };
            let value: Value = serde_json::from_str(&line).unwrap();
            self.heard.push(line);
            if wanted(&value) {
                return value;
            }
        }
    }

    pub(crate) fn hear_version(&mut self, event: &str, version: u64) -> Value {
        self.hear_where(event, |value| value["version"] == version)
    }

    /// Whether it has told of this event by now. What it told so far is not heard again.
    pub(crate) fn heard(&mut self, event: &str) -> bool {
        self.heard_where(event, |_| true)
    }

    pub(crate) fn heard_version(&mut self, event: &str, version: u64) -> bool {
        self.heard_where(event, |value| value["version"] == version)
    }

    fn heard_where(&mut self, event: &str, wanted: impl Fn(&Value) -> bool) -> bool {
        self.heard.extend(self.lines.try_iter());
        let mut values = self.heard.iter().map(|line| serde_json::from_str::<Value>(line).unwrap());
        values.any(|value| value["event"] == event && wanted(&value))
    }

    /// What it wrote to standard error so far.
    pub(crate) fn errors(&self) -> String {
        self.errors.try_iter().collect::<Vec<_>>().join("\n")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let id = Pid::from_raw(self.child.id().try_into().unwrap()).unwrap();
        kill_process(id, signal).unwrap();
    }

    /// Waits for its end, and gives back what it wrote to standard error.
    pub(crate) fn end(&mut self) -> (ExitStatus, String) {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                // Its pipes are closed, so both end.
                let errors = self.errors.iter().collect::<Vec<_>>().join("\n");
                self.heard.extend(self.lines.iter());
                return (status, errors);
            }
            assert!(Instant::now() < until, "it does not end: {:?}", self.heard);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Tells it to leave, which it does well.
    pub(crate) fn leave(&mut self) {
        self.signal(Signal::TERM);
        let (status, errors) = self.end();
        assert_eq!(status.code(), Some(0), "{errors}\n{:?}", self.heard);
        assert!(self.heard.last().unwrap().contains("\"left\""), "{:?}", self.heard);
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn follow(pipe: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    lines
}
