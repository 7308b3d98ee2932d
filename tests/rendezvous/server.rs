//! An etcd of a test's own.

use std::fs;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
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
    ports: [u16; 2],
    tls: Option<Certificates>,
}

impl Server {
    /// A server, unless there is none here, which the test says then.
    pub(crate) fn new() -> Option<Self> {
        Self::begin(|| None)
    }

    /// One that speaks TLS to its clients, and to those only that its authority knows.
    pub(crate) fn with_tls() -> Option<Self> {
        Self::begin(|| Some(Certificates::new()))
    }

    fn begin(certificates: impl Fn() -> Option<Certificates>) -> Option<Self> {
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
            let tls = certificates();
            let child = start(&program, folder.path(), ports, tls.as_ref());
            let mut server = Self { child, folder, ports, tls };
            if server.answers() {
                return Some(server);
            }
        }
        panic!("{} does not start", program.display());
    }

    pub(crate) fn address(&self) -> String {
        format!(
            "{}://127.0.0.1:{}",
            if self.tls.is_some() { "https" } else { "http" },
            self.ports[0]
        )
    }

    /// Those of a server with TLS.
    pub(crate) fn certificates(&self) -> &Certificates {
        self.tls.as_ref().unwrap()
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
            let mut options = self.options().with_timeout(Duration::from_secs(2));
            if let Some(tls) = &self.tls {
                options = options.with_authority(&*tls.authority);
                options = options.with_identity(&*tls.client.0, &*tls.client.1);
            }
            if Etcd::new(options).is_ok() {
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
        self.child = start(&program().unwrap(), self.folder.path(), self.ports, self.tls.as_ref());
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

fn start(
    program: &Path,
    folder: &Path,
    [client, peer]: [u16; 2],
    tls: Option<&Certificates>,
) -> Child {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let (client, peer) =
        (format!("{scheme}://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
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
    if let Some(tls) = tls {
        for (argument, file, pem) in [
            ("--trusted-ca-file", "authority.pem", &tls.authority),
            ("--cert-file", "server.pem", &tls.server.0),
            ("--key-file", "server.key", &tls.server.1),
        ] {
            fs::write(folder.join(file), pem).unwrap();
            command.arg(argument).arg(folder.join(file));
        }
        command.arg("--client-cert-auth");
    }
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

/// An authority, and what it has signed: a server and a client, each a certificate and its key. All as PEM.
pub(crate) struct Certificates {
    pub(crate) authority: String,
    server: (String, String),
    pub(crate) client: (String, String),
}

impl Certificates {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        let signed = |name: &str| {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new([name.to_owned()]).unwrap();
            params.extended_key_usages =
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            (params.signed_by(&key, &issuer).unwrap().pem(), key.serialize_pem())
        };
        Self { authority, server: signed("127.0.0.1"), client: signed("rank-0") }
    }
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
