//! Starting ranks and speaking with them: processes where bytes really cross one, threads for the in-process
//! transport.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use refit::transport::local;

use super::protocol::{Command, Reply};
use super::rank::{self, RankSetup};
use super::{RankArgs, Role};
use crate::device::Home;
use crate::error::CliError;
use crate::transports::TransportName;

/// A running rank.
#[derive(Debug)]
pub(crate) struct Worker {
    role: Role,
    rank: u32,
    replies: mpsc::Receiver<Reply>,
    link: Link,
}

#[derive(Debug)]
enum Link {
    Process { child: Child, commands: Option<ChildStdin> },
    Thread { commands: Option<mpsc::Sender<Command>>, thread: Option<JoinHandle<()>> },
}

/// Starts ranks of one bench.
#[derive(Debug)]
pub(crate) struct Launcher {
    transport: TransportName,
    network: local::Network,
}

impl Launcher {
    pub(crate) fn new(transport: TransportName) -> Self {
        Self { transport, network: local::Network::new() }
    }

    pub(crate) fn own_processes(&self) -> bool {
        self.transport != TransportName::Local
    }

    pub(crate) fn start(&self, role: Role, setup: &RankSetup) -> Result<Worker, CliError> {
        if self.own_processes() {
            process(role, setup, self.transport)
        } else {
            Ok(self.thread(role, setup))
        }
    }

    fn thread(&self, role: Role, setup: &RankSetup) -> Worker {
        let (commands, inbox) = mpsc::channel();
        let (outbox, replies) = mpsc::channel();
        let (setup, network) = (setup.clone(), self.network.clone());
        let rank = setup.rank;
        let thread =
            std::thread::spawn(move || {
                let answer = |reply| drop(outbox.send(reply));
                let served = local::LocalTransport::new(
                    &network,
                    &format!("{}-{}", role.name(), setup.rank),
                )
                .map_err(|error| CliError::Refit(error.into()))
                .and_then(|transport| {
                    let transport = std::sync::Arc::new(transport);
                    match role {
                        Role::Source => {
                            rank::source(&setup, &Home::Host, transport, inbox.into_iter(), answer)
                        }
                        Role::Target => {
                            rank::target(&setup, &Home::Host, transport, inbox.into_iter(), answer)
                        }
                    }
                });
                if let Err(error) = served {
                    drop(outbox.send(Reply::Failed { reason: error.to_string() }));
                }
            });
        let link = Link::Thread { commands: Some(commands), thread: Some(thread) };
        Worker { role, rank, replies, link }
    }
}

fn process(role: Role, setup: &RankSetup, transport: TransportName) -> Result<Worker, CliError> {
    let program = std::env::current_exe().map_err(CliError::system("find this program"))?;
    let mut child = std::process::Command::new(program)
        .arg("bench-rank")
        .args(RankArgs::to_arguments(role, setup, transport))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(CliError::system("start a rank"))?;
    let commands = child.stdin.take();
    let (outbox, replies) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        std::thread::spawn(move || forward(stdout, &outbox));
    }
    Ok(Worker { role, rank: setup.rank, replies, link: Link::Process { child, commands } })
}

/// Turns a rank's lines into replies until it closes its output.
fn forward(stdout: ChildStdout, outbox: &mpsc::Sender<Reply>) {
    for line in BufReader::new(stdout).lines() {
        let Ok(line) = line else { return };
        let reply = serde_json::from_str(&line)
            .unwrap_or_else(|error| Reply::Failed { reason: format!("said `{line}`: {error}") });
        if outbox.send(reply).is_err() {
            return;
        }
    }
}

impl Worker {
    /// Tells the rank to do something; the answer comes with [`Self::reply`].
    pub(crate) fn tell(&mut self, command: &Command) -> Result<(), CliError> {
        let sent = match &mut self.link {
            Link::Process { commands, .. } => {
                let line = serde_json::to_string(command).unwrap_or_default() + "\n";
                commands.as_mut().is_some_and(|pipe| pipe.write_all(line.as_bytes()).is_ok())
            }
            Link::Thread { commands, .. } => {
                commands.as_ref().is_some_and(|channel| channel.send(command.clone()).is_ok())
            }
        };
        // A rank that is gone has usually said why.
        if sent { Ok(()) } else { self.reply(Duration::from_secs(1)).map(|_| ()) }
    }

    /// Waits for the rank's next answer.
    pub(crate) fn reply(&mut self, patience: Duration) -> Result<Reply, CliError> {
        let reason = match self.replies.recv_timeout(patience) {
            Ok(Reply::Failed { reason }) => reason,
            Ok(reply) => return Ok(reply),
            Err(mpsc::RecvTimeoutError::Timeout) => format!("did not answer within {patience:?}"),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                "ended without a word; its output is above".to_owned()
            }
        };
        Err(CliError::Rank { role: self.role.name(), rank: self.rank, reason })
    }
}

impl Drop for Worker {
    /// Asks the rank to leave and sees to it that it has: a bench leaves no process behind.
    fn drop(&mut self) {
        let _ = self.tell(&Command::Stop);
        match &mut self.link {
            Link::Process { child, commands } => {
                drop(commands.take());
                for _ in 0..1000 {
                    if !matches!(child.try_wait(), Ok(None)) {
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                let _ = child.kill();
                let _ = child.wait();
            }
            Link::Thread { commands, thread } => {
                drop(commands.take());
                if let Some(thread) = thread.take() {
                    let _ = thread.join();
                }
            }
        }
    }
}
