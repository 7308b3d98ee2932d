//! A source in another process: the same test, started again with a role.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use refit_pool::cuda::{CudaAllocator, Device, Driver, Stream, set};
use refit_pool::{Allocator, Memory};
use refit_tests::link::{Link, answer, hex, unhex};
use refit_transport::Transport;
use refit_transport::peer::{PeerOptions, PeerTransport};
use rustix::process::{Pid, Signal, kill_process};

/// Device and bytes of a source.
const ROLE: &str = "REFIT_PEER_SOURCE";

/// What a source offers: its metadata, and the block it registered last.
#[derive(Clone)]
pub(crate) struct Offer {
    pub(crate) name: String,
    pub(crate) metadata: Vec<u8>,
    pub(crate) address: u64,
    pub(crate) len: u64,
    pub(crate) ordinal: u32,
}

/// The process of a source.
pub(crate) struct Remote {
    child: Child,
    link: Link,
}

impl Remote {
    /// Serves until the input ends, if this process was started for that.
    pub(crate) fn is_this() -> bool {
        let Ok(role) = std::env::var(ROLE) else { return false };
        let (ordinal, bytes) = role.split_once(' ').unwrap();
        serve(ordinal.parse().unwrap(), bytes.parse().unwrap());
        true
    }

    /// Starts a source of so many bytes on a device, as a process that runs this test.
    pub(crate) fn start(test: &str, ordinal: u32, bytes: usize) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
        command.env(ROLE, format!("{ordinal} {bytes}"));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let link = Link::of(&mut child);
        Self { child, link }
    }

    /// What it offers: once after the start, and after each [`more`](Self::more).
    pub(crate) fn offer(&mut self) -> Offer {
        let line = self.link.reply();
        let mut words = line.split(' ');
        let mut word = || words.next().unwrap();
        let name = word().to_owned();
        let (address, len, ordinal) =
            (word().parse().unwrap(), word().parse().unwrap(), word().parse().unwrap());
        let metadata = unhex(word());
        Offer { name, metadata, address, len, ordinal }
    }

    /// Has every byte of every block set to this.
    pub(crate) fn fill(&mut self, byte: u8) {
        self.link.tell(&format!("fill {byte}"));
        assert_eq!(self.link.reply(), "filled");
    }

    /// Has it allocate and register another block.
    pub(crate) fn more(&mut self, bytes: usize) -> Offer {
        self.link.tell(&format!("more {bytes}"));
        self.offer()
    }

    /// Has it deregister its first block. The memory stays: others may have it mapped.
    pub(crate) fn withdraw_first(&mut self) {
        self.link.tell("withdraw 0");
        assert_eq!(self.link.reply(), "withdrawn");
    }

    pub(crate) fn stop(&self) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, Signal::STOP).unwrap();
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(ordinal: u32, bytes: usize) {
    let device = Device::primary(Driver::load().unwrap(), ordinal).unwrap();
    let stream = Arc::new(Stream::new(&device).unwrap());
    let transport = PeerTransport::new(stream, PeerOptions::new("source")).unwrap();
    let allocator = CudaAllocator::new(device.clone());
    let (mut blocks, mut withdrawn) = (Vec::new(), Vec::new());
    let offer = |blocks: &mut Vec<_>, bytes| {
        let memory: Memory = allocator.allocate(bytes).unwrap();
        let registration = transport.register(memory.allocation()).unwrap();
        let metadata = transport.metadata().unwrap();
        let (name, address, metadata) = (transport.agent(), memory.address(), hex(&metadata));
        answer(&format!("{name} {address} {bytes} {ordinal} {metadata}"));
        blocks.push(Some((memory, registration)));
    };
    offer(&mut blocks, bytes);
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let (verb, number) = line.split_once(' ').unwrap();
        let number: usize = number.parse().unwrap();
        match verb {
            "fill" => {
                for (memory, _) in blocks.iter_mut().flatten() {
                    set(&device, memory, u8::try_from(number).unwrap()).unwrap();
                }
                answer("filled");
            }
            "more" => offer(&mut blocks, number),
            _ => {
                let (memory, registration) = blocks[number].take().unwrap();
                transport.deregister(registration).unwrap();
                withdrawn.push(memory);
                answer("withdrawn");
            }
        }
    }
}
