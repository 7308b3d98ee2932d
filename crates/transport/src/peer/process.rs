//! Which process an agent lives in, in terms that another process can compare with its own.

use std::fs;
use std::sync::OnceLock;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::Cause;
use crate::random::random;

const HOST_CONTEXT: &str = "refit-transport host identity v1";

/// Where an agent lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    /// The running kernel: containers of one host have it in common, and a reboot changes it.
    pub(super) host: [u8; 16],
    /// Which process numbers are meant; 0 where the kernel does not say.
    pub(super) namespace: u64,
    /// Drawn by each process. With `pid` it tells processes apart whose numbers are counted differently, and a
    /// process from one that it was forked from.
    pub(super) token: [u8; 16],
    /// The number of the process in its namespace.
    pub(super) pid: u32,
    /// When it started, in the kernel's ticks; 0 where the kernel does not say. A number that is used again starts
    /// later.
    pub(super) started: u64,
}

impl Process {
    /// The process that calls.
    pub(super) fn current() -> Result<Self, Cause> {
        static TOKEN: OnceLock<[u8; 16]> = OnceLock::new();
        let token = match TOKEN.get() {
            Some(token) => *token,
            None => {
                let drawn = random()?;
                *TOKEN.get_or_init(|| drawn)
            }
        };
        let pid = std::process::id();
        let namespace = fs::metadata("/proc/self/ns/pid").map_or(0, |namespace| {
            use std::os::unix::fs::MetadataExt;
            namespace.ino()
        });
        Ok(Self { host: host()?, namespace, token, pid, started: started(pid).unwrap_or(0) })
    }

    pub(super) fn is_same_process(&self, other: &Self) -> bool {
        self.is_same_host(other) && (self.token, self.pid) == (other.token, other.pid)
    }

    pub(super) fn is_same_host(&self, other: &Self) -> bool {
        self.host == other.host
    }

    /// Whether process numbers of the one mean the same to the other.
    pub(super) fn is_same_namespace(&self, other: &Self) -> bool {
        self.is_same_host(other) && self.namespace != 0 && self.namespace == other.namespace
    }
}

/// A process that is watched, so that its end is noticed although its memory stays mapped here.
#[derive(Debug)]
pub(super) struct Watch(OwnedFd);

/// Whether a process can be watched.
#[derive(Debug)]
pub(super) enum Watched {
    /// It can.
    Yes(Watch),
    /// It has ended already.
    Gone,
    /// It cannot: another namespace, or the kernel does not know how.
    Unseen,
}

impl Watch {
    /// Starts watching a process, as long as it is the one that published `process`.
    pub(super) fn start(own: &Process, process: &Process) -> Watched {
        if !own.is_same_namespace(process) || process.started == 0 {
            return Watched::Unseen;
        }
        let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) else {
            return Watched::Gone;
        };
        let watch = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(descriptor) => Self(descriptor),
            Err(rustix::io::Errno::SRCH) => return Watched::Gone,
            Err(_) => return Watched::Unseen,
        };
        // Asked after the descriptor is there: it holds on to whoever had the number then.
        match started(process.pid) {
            _ if !watch.is_running() => Watched::Gone,
            Some(started) if started == process.started => Watched::Yes(watch),
            // The number was given away again.
            Some(_) => Watched::Gone,
            // Processes of others are hidden here.
            None => Watched::Unseen,
        }
    }

    /// Whether the process has not ended. One that is being taken apart counts as running until it is.
    pub(super) fn is_running(&self) -> bool {
        let mut ended = [PollFd::new(&self.0, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // An error says nothing about the process.
        !matches!(poll(&mut ended, Some(&now)), Ok(1..))
    }
}

/// The identity of the running kernel. Hashed: what a host calls itself is nobody's business.
fn host() -> Result<[u8; 16], Cause> {
    const BOOT: &str = "/proc/sys/kernel/random/boot_id";
    let mut hasher = blake3::Hasher::new_derive_key(HOST_CONTEXT);
    match fs::read(BOOT) {
        Ok(boot) if !boot.is_empty() => {
            hasher.update(b"boot");
            hasher.update(&boot);
        }
        // Kernels that are emulated may lack it. Name and boot time do: agents of one container then find each other.
        _ => {
            let boot = fs::read_to_string("/proc/stat").unwrap_or_default();
            let boot = boot.lines().find(|line| line.starts_with("btime ")).unwrap_or_default();
            let name = fs::read("/proc/sys/kernel/hostname").unwrap_or_default();
            if boot.is_empty() && name.is_empty() {
                let status = "there is no such file, and no boot time and name in its place".into();
                return Err(Cause::Call { call: "read /proc/sys/kernel/random/boot_id", status });
            }
            hasher.update(b"name");
            hasher.update(boot.as_bytes());
            hasher.update(&name);
        }
    }
    let mut identity = [0; 16];
    hasher.finalize_xof().fill(&mut identity);
    Ok(identity)
}

/// When a process started.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may hold anything; the start is the 20th field behind it.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_knows_itself() {
        let [own, again] = [(); 2].map(|()| Process::current().unwrap());
        assert_eq!(own, again);
        assert!(own.is_same_process(&again) && own.is_same_namespace(&again));
        assert!(own.started > 0 && own.namespace > 0);
        for other in [
            Process { token: [0; 16], ..own },
            Process { pid: own.pid + 1, ..own },
            Process { host: [0; 16], ..own },
        ] {
            assert!(!own.is_same_process(&other));
        }
        assert!(!own.is_same_namespace(&Process { namespace: 1, ..own }));
        let unknown = Process { namespace: 0, ..own };
        assert!(!unknown.is_same_namespace(&unknown) && unknown.is_same_host(&own));
    }

    #[test]
    fn the_end_of_a_process_is_noticed() {
        let own = Process::current().unwrap();
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let there = Process {
            pid: child.id(),
            started: started(child.id()).unwrap(),
            token: [1; 16],
            ..own
        };
        let Watched::Yes(watch) = Watch::start(&own, &there) else {
            child.kill().unwrap();
            panic!("a child cannot be watched");
        };
        assert!(watch.is_running());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!watch.is_running());
        assert!(matches!(Watch::start(&own, &there), Watched::Gone));
    }

    #[test]
    fn numbers_used_again_or_counted_elsewhere_are_not_watched() {
        let own = Process::current().unwrap();
        let earlier = Process { started: own.started - 1, ..own };
        assert!(matches!(Watch::start(&own, &earlier), Watched::Gone));
        for odd in [0, u32::MAX] {
            assert!(matches!(Watch::start(&own, &Process { pid: odd, ..own }), Watched::Gone));
        }
        for unseen in [
            Process { namespace: own.namespace + 1, ..own },
            Process { started: 0, ..own },
            Process { host: [0; 16], ..own },
        ] {
            assert!(matches!(Watch::start(&own, &unseen), Watched::Unseen));
        }
    }
}
