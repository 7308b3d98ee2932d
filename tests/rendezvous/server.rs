//! An etcd of a test's own.

use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use refit_service::rendezvous::{Etcd, EtcdOptions};
use refit_tests::skip;
use rustix::process::{Signal, set_parent_process_death_signal};
use tempfile::TempDir;

use super::peer::{Peer, signal_process};
use super::place::Place;

/// What calls may take: long enough for a busy machine.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A server on loopback, with a folder of its own, that ends with this.
pub(crate) struct Server {
    child: Child,
    folder: TempDir,
    pub(crate) ports: [u16; 2],
}

impl Server {
    /// A server, unless there is none here, which the test says then.
    pub(crate) fn new() -> Option<Self> {
        let program = match program() {
            Ok(program) => program,
            Err(why) => {
                assert!(
                    std::env::var_os("REFIT_REQUIRE_ETCD").is_none_or(|value| value != "1"),
                    "etcd: {why}"
                );
                let thread = std::thread::current();
                skip::skipped("etcd", thread.name().unwrap_or("a test"), &why);
                return None;
            }
        };
        // Another process may take a port before the server does.
        for _ in 0..5 {
            let (folder, ports) = (tempfile::tempdir().unwrap(), [free_port(), free_port()]);
            let child = start(&program, folder.path(), ports);
            let mut server = Self { child, folder, ports };
            if server.answers() {
                return Some(server);
            }
        }
        panic!("{} does not start", program.display());
    }

    pub(crate) fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[0])
    }

    pub(crate) fn options(&self) -> EtcdOptions {
        EtcdOptions::new([self.address()]).with_root("tests/refit").with_timeout(TIMEOUT)
    }

    /// Whether it has come up, or false when it has ended instead.
    fn answers(&mut self) -> bool {
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(60) {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            if Etcd::new(self.options().with_timeout(Duration::from_secs(2))).is_ok() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("etcd does not answer");
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub(crate) fn signal(&self, signal: Signal) {
        signal_process(&self.child, signal);
    }

    /// Starts it again where it was.
    pub(crate) fn restart(&mut self) {
        self.child = start(&program().unwrap(), self.folder.path(), self.ports);
    }

    /// Runs `etcdctl`, which comes with it.
    pub(crate) fn control(&self, args: &[&str]) -> String {
        let control = program().unwrap().with_file_name("etcdctl");
        let mut command = Command::new(control);
        command.env("ETCDCTL_API", "3").arg("--endpoints").arg(self.address()).args(args);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Place for Server {
    type Store = Etcd;

    fn open(&self) -> Etcd {
        Etcd::new(self.options()).unwrap()
    }

    fn peer(&self) -> Peer {
        Peer::process(&format!("etcd {}", self.address()))
    }

    const PROCESSES: bool = true;
    const TTL: Duration = Duration::from_secs(2);
}

/// The store of a child process.
pub(crate) fn open(address: &str) -> Etcd {
    let options = EtcdOptions::new([address]).with_root("tests/refit").with_timeout(TIMEOUT);
    Etcd::new(options).unwrap()
}

fn start(program: &Path, folder: &Path, [client, peer]: [u16; 2]) -> Child {
    let (client, peer) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
    let mut command = Command::new(program);
    command.arg("--data-dir").arg(folder.join("data")).args([
        "--listen-client-urls",
        &client,
        "--advertise-client-urls",
        &client,
        "--listen-peer-urls",
        &peer,
        "--initial-advertise-peer-urls",
        &peer,
        "--initial-cluster",
        &format!("default={peer}"),
        "--log-level",
        "fatal",
    ]);
    // What the server lives on is gone with the test.
    command.args(["--unsafe-no-fsync", "--heartbeat-interval=50", "--election-timeout=500"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: the closure makes one system call and touches no memory.
    unsafe {
        command.pre_exec(|| {
            set_parent_process_death_signal(Some(Signal::KILL)).map_err(std::io::Error::from)
        });
    }
    command.spawn().unwrap()
}

fn program() -> Result<PathBuf, String> {
    let path = std::env::var_os("REFIT_ETCD").map(PathBuf::from);
    let path = path.ok_or("REFIT_ETCD is not set")?;
    if path.exists() {
        Ok(path)
    } else {
        Err(format!("{} does not exist; run cargo xtask setup", path.display()))
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
