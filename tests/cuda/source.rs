//! A source of device memory in another process: the same test, started again with a role.

use std::process::Stdio;

use refit_pool::cuda::{CudaAllocator, Device, set};
use refit_pool::{Allocator, MemoryKind};
use refit_tests::link::{Link, answer, hex, unhex};
use refit_transport::Transport;
use refit_transport::nixl::{NixlOptions, NixlTransport};

use crate::isolated::{Guarded, command, current, library};

const ROLE: &str = "REFIT_CUDA_SOURCE";

/// What a source offers: allocations of one length.
#[derive(Clone)]
pub(crate) struct Offer {
    pub(crate) name: String,
    pub(crate) metadata: Vec<u8>,
    pub(crate) kind: MemoryKind,
    pub(crate) len: u64,
    pub(crate) parts: Vec<u64>,
}

/// What every byte of an allocation is after a fill.
pub(crate) fn byte(part: usize, fill: u8) -> u8 {
    part.to_le_bytes()[0].wrapping_mul(7).wrapping_add(fill)
}

/// The process of a source.
pub(crate) struct Remote {
    _child: Guarded,
    link: Link,
}

impl Remote {
    /// Starts a source of so many allocations. In the source itself, serves until its input ends and returns `None`.
    pub(crate) fn start(device: &Device, parts: usize, len: usize) -> Option<Self> {
        Self::start_with(device, parts, len, &[])
    }

    /// As [`start`](Self::start), with these variables for the source.
    pub(crate) fn start_with(
        device: &Device,
        parts: usize,
        len: usize,
        variables: &[(&str, &str)],
    ) -> Option<Self> {
        if std::env::var_os(ROLE).is_some() {
            serve(device, parts, len);
            return None;
        }
        let mut command = command(&current(), &[(ROLE, "1")]);
        command.envs(variables.iter().copied());
        let mut child =
            Guarded(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
        let link = Link::of(&mut child.0);
        Some(Self { _child: child, link })
    }

    pub(crate) fn offer(&mut self) -> Offer {
        self.link.tell("offer");
        let line = self.link.reply();
        let mut words = line.split(' ');
        let mut word = || words.next().unwrap();
        let name = word().to_owned();
        let kind = MemoryKind::Cuda(word().parse().unwrap());
        let len = word().parse().unwrap();
        let metadata = unhex(word());
        let parts = words.map(|word| word.parse().unwrap()).collect();
        Offer { name, metadata, kind, len, parts }
    }

    /// Has every byte set anew.
    pub(crate) fn fill(&mut self, fill: u8) {
        self.link.tell(&format!("{fill}"));
        assert_eq!(self.link.reply(), "filled");
    }
}

fn serve(device: &Device, parts: usize, len: usize) {
    let allocator = CudaAllocator::new(device.clone());
    let mut memory: Vec<_> = (0..parts).map(|_| allocator.allocate(len).unwrap()).collect();
    let options = NixlOptions::on_device("source", device.clone());
    let transport = NixlTransport::new(library(), options).unwrap();
    let registrations: Vec<_> =
        memory.iter().map(|part| transport.register(part.allocation()).unwrap()).collect();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let Ok(fill) = line.trim().parse() else {
            let metadata = hex(&transport.metadata().unwrap());
            let parts: String = memory.iter().map(|part| format!(" {}", part.address())).collect();
            let (name, ordinal) = (transport.agent(), device.ordinal());
            answer(&format!("{name} {ordinal} {len} {metadata}{parts}"));
            continue;
        };
        for (index, part) in memory.iter_mut().enumerate() {
            set(device, part, byte(index, fill)).unwrap();
        }
        answer("filled");
    }
    for registration in registrations {
        transport.deregister(registration).unwrap();
    }
}
