//! The same over an etcd, which the test starts.

use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::process::{Job, Rank, have_nixl, skipped};

/// A server on loopback that ends with this.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    /// None, unless one is required, where `REFIT_ETCD` does not name it.
    fn new(job: &Job, test: &str) -> Option<Self> {
        let program = std::env::var_os("REFIT_ETCD").map(PathBuf::from).filter(|it| it.exists());
        let Some(program) = program else {
            let required = std::env::var_os("REFIT_REQUIRE_ETCD").is_some_and(|it| it == "1");
            assert!(!required, "REFIT_ETCD names no program: cargo xtask setup");
            skipped(&format!("etcd: {test}"));
            return None;
        };
        let port = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let until = Instant::now() + Duration::from_secs(60);
        // Another process may take a port before the server does.
        for attempt in 0..5 {
            let (client, peer) = (port(), port());
            let address = format!("127.0.0.1:{client}");
            let (client, peer) = (format!("http://{address}"), format!("http://127.0.0.1:{peer}"));
            let mut child = Command::new(&program)
                .arg("--data-dir")
                .arg(job.path().join(format!("etcd-{attempt}")))
                .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
                .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
                .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "fatal"])
                .args(["--unsafe-no-fsync", "--heartbeat-interval=50", "--election-timeout=500"])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            while child.try_wait().unwrap().is_none() {
                assert!(Instant::now() < until, "etcd does not answer");
                if TcpStream::connect(&address).is_ok() {
                    return Some(Self { child, address: client });
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        panic!("{} does not start", program.display());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn ranks_that_meet_in_etcd_go_through_two_versions() {
    const TEST: &str = "ranks_that_meet_in_etcd_go_through_two_versions";
    if !have_nixl(TEST) {
        return;
    }
    let job = Job::new();
    let Some(server) = Server::new(&job, TEST) else { return };
    let start = |what: &str| job.start(&format!("{what} --rendezvous etcd:{}", server.address));
    let mut sources = [0, 1].map(|rank| start(&format!("serve --source tp=2 --rank {rank}")));
    let mut target = start("pull --target tp=1 --rank 0");
    let bytes = target.hear("joined")["bytes"].clone();
    assert_eq!(target.hear_version("installed", 1)["verified_bytes"], bytes);
    sources[1].hear_version("published", 1);
    sources[0].signal(Signal::USR1);
    assert_eq!(target.hear_version("installed", 2)["verified_bytes"], bytes);
    // Its entries go with its session, and its next life counts on.
    sources[0].signal(Signal::KILL);
    sources[0].end();
    sources[0] = start("serve --source tp=2 --rank 0");
    assert_eq!(target.hear_version("installed", 3)["verified_bytes"], bytes);
    target.leave();
    sources.iter_mut().for_each(Rank::leave);
}
