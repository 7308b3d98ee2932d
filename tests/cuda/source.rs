//! A source of device memory in another process: the same test, started again with a role.

use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout, Stdio};

use refit_pool::cuda::{CudaAllocator, Device, set};
use refit_pool::{Allocator, MemoryKind};
use refit_transport::Transport;
use refit_transport::nixl::{NixlOptions, NixlTransport};

use crate::isolated::{Guarded, command, current, library};

const ROLE: &str = "REFIT_CUDA_SOURCE";
/// Marks our lines among those of the test harness.
const MARK: &str = "refit-source:";

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
    input: ChildStdin,
    output: BufReader<ChildStdout>,
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
        let input = child.0.stdin.take().unwrap();
        let output = BufReader::new(child.0.stdout.take().unwrap());
        Some(Self { _child: child, input, output })
    }

    pub(crate) fn offer(&mut self) -> Offer {
        writeln!(self.input, "offer").unwrap();
        let line = self.reply();
        let mut words = line.split(' ');
        let mut word = || words.next().unwrap();
        let name = word().to_owned();
        let kind = MemoryKind::Cuda(word().parse().unwrap());
        let len = word().parse().unwrap();
        let hex = word();
        let metadata = (0..hex.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
            .collect();
        let parts = words.map(|word| word.parse().unwrap()).collect();
        Offer { name, metadata, kind, len, parts }
    }

    /// Has every byte set anew.
    pub(crate) fn fill(&mut self, fill: u8) {
        writeln!(self.input, "{fill}").unwrap();
        assert_eq!(self.reply(), "filled");
    }

    fn reply(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the source has ended");
            // The harness may print in front of it, on the same line.
            if let Some((_, reply)) = line.split_once(MARK) {
                return reply.trim().to_owned();
            }
        }
    }
}

fn serve(device: &Device, parts: usize, len: usize) {
    let answer = |line: &str| {
        let mut out = std::io::stdout();
        out.write_all(format!("{MARK}{line}\n").as_bytes()).unwrap();
        out.flush().unwrap();
    };
    let allocator = CudaAllocator::new(device.clone());
    let mut memory: Vec<_> = (0..parts).map(|_| allocator.allocate(len).unwrap()).collect();
    let options = NixlOptions::on_device("source", device.clone());
    let transport = NixlTransport::new(library(), options).unwrap();
    let registrations: Vec<_> =
        memory.iter().map(|part| transport.register(part.allocation()).unwrap()).collect();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let Ok(fill) = line.trim().parse() else {
            let metadata: String =
                transport.metadata().unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
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
