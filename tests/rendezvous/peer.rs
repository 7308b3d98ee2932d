//! Somebody else who meets in the same store.

use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use refit_service::rendezvous::{Created, Key, Life, Rendezvous};
use refit_tests::link::{Link, answer};
use rustix::process::{Pid, Signal, kill_process};

/// Says to a child process where it meets: `directory PATH` or `etcd ADDRESS`.
pub(crate) const PLACE: &str = "REFIT_RENDEZVOUS_PLACE";

/// Does what it is told, a line at a time, in a process of its own or in a thread.
pub(crate) enum Peer {
    Process { child: Child, link: Link },
    Thread { tell: Sender<String>, reply: Receiver<String> },
}

impl Peer {
    /// This program, in the role of the test `peer`.
    pub(crate) fn process(place: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "peer", "--nocapture", "--test-threads=1"]).env(PLACE, place);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let link = Link::of(&mut child);
        Self::Process { child, link }
    }

    pub(crate) fn thread<R: Rendezvous>(store: R) -> Self {
        let (tell, told) = channel::<String>();
        let (replies, reply) = channel();
        std::thread::spawn(move || {
            serve(&store, || told.recv().ok(), |line| drop(replies.send(line.to_owned())));
        });
        Self::Thread { tell, reply }
    }

    pub(crate) fn tell(&mut self, line: &str) {
        match self {
            Self::Process { link, .. } => link.tell(line),
            Self::Thread { tell, .. } => tell.send(line.to_owned()).unwrap(),
        }
    }

    pub(crate) fn reply(&mut self) -> String {
        match self {
            Self::Process { link, .. } => link.reply(),
            Self::Thread { reply, .. } => reply.recv_timeout(Duration::from_secs(60)).unwrap(),
        }
    }

    pub(crate) fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.reply()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let Self::Process { child, .. } = self else { panic!("it has no process") };
        signal_process(child, signal);
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Self::Process { child, .. } = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Sends a signal; one that stops has done so on return, with every thread.
pub(crate) fn signal_process(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
    if signal != Signal::STOP {
        return;
    }
    let stopped = |task: std::io::Result<std::fs::DirEntry>| {
        let stat = std::fs::read_to_string(task.unwrap().path().join("stat"));
        // A thread that is no more does nothing either.
        stat.map_or(true, |stat| stat.rsplit(')').next().unwrap().trim().starts_with('T'))
    };
    let tasks = format!("/proc/{}/task", child.id());
    let started = Instant::now();
    while !std::fs::read_dir(&tasks).unwrap().all(stopped) {
        assert!(started.elapsed() < Duration::from_secs(30), "it does not stop");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The role of a child process.
pub(crate) fn serve_lines<R: Rendezvous>(store: &R) {
    let mut lines = std::io::stdin().lines();
    serve(store, || lines.next()?.ok(), answer);
}

/// Does what it is told until nobody tells it anything.
fn serve<R: Rendezvous>(
    store: &R,
    mut next: impl FnMut() -> Option<String>,
    mut answer: impl FnMut(&str),
) {
    let key = |path: &str| Key::try_from(path.to_owned()).unwrap();
    let mut session = None;
    while let Some(line) = next() {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["put", at, value] => {
                store.put(&key(at), value.as_bytes(), Life::Kept).unwrap();
                answer("done");
            }
            ["count", at, to] => {
                for n in 1..=to.parse::<u64>().unwrap() {
                    store.put(&key(at), n.to_string().as_bytes(), Life::Kept).unwrap();
                }
                answer("done");
            }
            // Writes one entry, and says whether another is there then.
            ["meet", mine, theirs] => {
                store.put(&key(mine), b"here", Life::Kept).unwrap();
                let seen = store.list(&key(theirs)).unwrap();
                answer(if seen.entries.is_empty() { "alone" } else { "met" });
            }
            ["begin", millis] => {
                let ttl = Duration::from_millis(millis.parse().unwrap());
                session = Some(store.session(ttl).unwrap());
                answer("done");
            }
            ["hold", at, value] => {
                let life = Life::Session(session.as_ref().unwrap());
                match store.put(&key(at), value.as_bytes(), life) {
                    Ok(()) => answer("done"),
                    Err(error) => answer(&format!("{error:?}")),
                }
            }
            ["end"] => {
                session = None;
                answer("done");
            }
            ["create", at, value] => {
                match store.create(&key(at), value.as_bytes(), Life::Kept).unwrap() {
                    Created::New => answer("new"),
                    Created::Already(found) => answer(&String::from_utf8(found).unwrap()),
                }
            }
            _ => panic!("{line}"),
        }
    }
}
