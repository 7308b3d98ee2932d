//! Speaking, line by line, with a process that runs the same test in another role.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout};

/// Marks our lines among those of the test harness.
const MARK: &str = "refit-source:";

/// The pipes of such a process.
#[derive(Debug)]
pub struct Link {
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Link {
    /// Takes the pipes of a child that was started with both of them.
    pub fn of(child: &mut Child) -> Self {
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { input, output }
    }

    /// Says a line to it.
    pub fn tell(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    /// The next line that it [answers](answer).
    pub fn reply(&mut self) -> String {
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

/// Says a line to whoever started this process.
pub fn answer(line: &str) {
    let mut out = std::io::stdout();
    out.write_all(format!("{MARK}{line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

/// Bytes as one word of a line.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of such a word.
#[must_use]
pub fn unhex(word: &str) -> Vec<u8> {
    let bytes = (0..word.len()).step_by(2);
    bytes.map(|at| u8::from_str_radix(&word[at..at + 2], 16).unwrap()).collect()
}
